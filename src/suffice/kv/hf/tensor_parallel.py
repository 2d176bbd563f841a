"""Tensor parallelism: which KV heads of a model this process holds, and the collective operations on them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The radix selection of `topk_masks` reads 32-bit keys in three digits, highest first: (shift, number of bits).
_DIGITS = ((21, 11), (10, 11), (0, 10))


@dataclass(frozen=True)
class Sharding:
    """How a model's KV heads are split over processes by transformers' tensor parallelism (`tp_plan="auto"`).

    Each process holds `num_key_value_heads / world_size` consecutive heads of every layer, in the order of the ranks,
    and only their cache entries. All processes see the same tokens.

    Args:
        group: the process group.
        rank: rank of this process in the group.
        world_size: number of processes in the group.
        num_key_value_heads: number of KV heads of the whole model.

    """

    group: Any
    rank: int
    world_size: int
    num_key_value_heads: int

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> Sharding | None:
        """Return how a model's heads are split; None if the model is not tensor-parallel.

        Raises:
            ValueError: the model is pipeline-parallel.

        """
        world_size = model.tp_size
        mesh: Any = getattr(model, "_device_mesh", None)
        if not world_size or world_size == 1 or mesh is None:
            return None
        names: tuple[str, ...] = mesh.mesh_dim_names or ()
        if "pp" in names and mesh["pp"].size() > 1:
            raise ValueError(
                "model must be on one process, tensor-parallel, or spread by a device_map, got a pipeline-parallel one"
            )
        group = mesh.get_group("tp") if "tp" in names else mesh.get_group()
        config: Any = model.config.get_text_config()
        num_key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return cls(group, dist.get_rank(group), world_size, num_key_value_heads)

    def is_split(self, num_heads: int) -> bool:
        """Return whether a layer with `num_heads` KV heads on this process is split. Some plans do not split KV heads.

        Raises:
            ValueError: the layer has neither all KV heads nor this process's share of them.

        """
        if num_heads == self.num_key_value_heads:
            return False
        if num_heads * self.world_size != self.num_key_value_heads:
            raise ValueError(
                f"the KV heads of a layer on process {self.rank} of {self.world_size} must be all "
                f"{self.num_key_value_heads} or {self.num_key_value_heads}/{self.world_size} of them, got {num_heads}"
            )
        return True

    def local_part(self, x: Tensor, dim: int) -> Tensor:
        """Return this process's heads of a tensor that holds all heads along `dim`."""
        return x.chunk(self.world_size, dim)[self.rank]

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Concatenate the tensors of all processes along `dim`, in the order of the ranks."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.world_size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Return the sum over processes."""
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x

    def all_reduce_mean(self, x: Tensor) -> Tensor:  # [batch, entries]
        """Return the mean over processes of right-aligned rows, in this process's width.

        The processes may have rows of different widths; missing entries on the left count as 0.
        """
        width = torch.tensor(x.shape[-1], device=x.device)
        dist.all_reduce(width, dist.ReduceOp.MAX, group=self.group)
        padded = torch.nn.functional.pad(x, (int(width) - x.shape[-1], 0))
        return self.all_reduce_sum(padded)[..., padded.shape[-1] - x.shape[-1] :] / self.world_size

    def broadcast(self, x: Tensor) -> Tensor:
        """Return the tensor of the first process."""
        x = x.clone()
        dist.broadcast(x, dist.get_global_rank(self.group, 0), group=self.group)
        return x


def gather_weight(model: PreTrainedModel, name: str, weight: Tensor) -> Tensor:
    """Return the whole weight of a tensor-parallel model. All processes must call this function.

    Args:
        model: the model.
        name: name of the weight in the model's state dict.
        weight: this process's part of it.

    """
    if hasattr(weight, "full_tensor"):
        full: Any = weight
        return full.full_tensor()
    # Versions of transformers that shard into plain tensors record the split of each weight in the model's plan.
    from transformers.integrations.tensor_parallel import gather_state_dict_for_save

    sharding = Sharding.from_model(model)
    assert sharding is not None
    mesh = SimpleNamespace(
        size=lambda: sharding.world_size, mesh_dim_names=("tp",), get_group=lambda *_: sharding.group
    )
    plan: Any = model.tp_plan
    return gather_state_dict_for_save({name: weight}, plan, mesh, sharding.world_size)[name]


def local_columns(weight: Tensor, num_columns: int) -> Tensor:
    """Return the columns of an output projection that belong to this process's heads.

    Args:
        weight: the projection's weight, a plain or a distributed tensor.
        num_columns: query heads on this process × head dimension.

    Returns:
        A plain tensor [out, num_columns].

    Raises:
        ValueError: the weight has another number of columns.

    """
    distributed: Any = weight  # only a distributed tensor has the methods `to_local` and `full_tensor`
    local: Tensor = distributed.to_local() if hasattr(distributed, "to_local") else weight
    if local.shape[1] != num_columns and hasattr(distributed, "full_tensor"):
        local = distributed.full_tensor()
    if local.shape[1] != num_columns:
        raise ValueError(
            f"the attention's output projection must have {num_columns} columns, one for each dimension of its heads, "
            f"got {local.shape[1]}: the weight is split over processes, or packed. Use directions other than "
            "OutputValue()"
        )
    return local


def topk_masks(values: list[Tensor], counts: list[int], sharding: Sharding | None = None) -> list[Tensor]:
    """Return masks of the largest values of each row over all processes. −inf is never marked.

    Between processes this is a radix selection: three messages with counts of leading bits, 64 kB per row for any
    number of values.

    Args:
        values: values of this process, one float32 tensor [any] for each row.
        counts: number of values to mark in each row, over all processes.
        sharding: the processes; None if there is only this one.

    Returns:
        Bool tensors with the shapes of `values`.

    """
    if sharding is None:
        return [_topk_mask(row, count) for row, count in zip(values, counts, strict=True)]
    keys = [_sort_keys(row) for row in values]
    device = keys[0].device
    remaining = torch.tensor(counts, device=device)
    prefix = torch.zeros_like(remaining)  # leading bits of the smallest marked key
    ties = remaining  # number of keys that begin with the prefix
    for digit, (shift, bits) in enumerate(_DIGITS):
        num_bins = 1 << bits
        histogram = torch.stack(
            [
                torch.bincount(row[(row >> (shift + bits)) == lead] >> shift & (num_bins - 1), minlength=num_bins)
                for row, lead in zip(keys, prefix, strict=True)
            ]
        )
        from_top = sharding.all_reduce_sum(histogram).flip(-1).cumsum(-1)  # keys in the highest bins
        if digit == 0:
            remaining = torch.minimum(remaining, from_top[:, -1])
        bin_from_top = (from_top < remaining[:, None]).sum(-1, keepdim=True)
        above = torch.where(bin_from_top > 0, from_top.gather(1, (bin_from_top - 1).clamp_min(0)), 0)[:, 0]
        ties = from_top.gather(1, bin_from_top)[:, 0] - above
        remaining = remaining - above
        prefix = (prefix << bits) | (num_bins - 1 - bin_from_top[:, 0])
    equal = [row == smallest for row, smallest in zip(keys, prefix, strict=True)]
    if not torch.equal(ties, remaining):
        # If values are equal, those of the lowest ranks and heads are marked.
        num_equal = torch.stack([row.sum() for row in equal])
        remaining = remaining - sharding.all_gather(num_equal[None], 0)[: sharding.rank].sum(0)
    return [
        (row > smallest) | (same & (same.cumsum(-1) <= num_ties))
        for row, smallest, same, num_ties in zip(keys, prefix, equal, remaining, strict=True)
    ]


def _topk_mask(values: Tensor, count: int) -> Tensor:
    candidates = values > -torch.inf
    if int(candidates.sum()) <= count:
        return candidates
    return torch.zeros_like(candidates).scatter_(-1, values.topk(count).indices, True)


def _sort_keys(values: Tensor) -> Tensor:
    """Map float32 values to integers 0 … 2³² − 1 in the same order, and −inf to −1."""
    bits = (values.float() + 0.0).view(torch.int32)  # −0 becomes 0
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).long() + (1 << 31)
    return ordered.masked_fill(values == -torch.inf, -1)
