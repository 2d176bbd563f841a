"""Tensor parallelism: which of a model's KV heads this process holds, and the little that processes tell each other."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How the bits of a claim are looked at, from the highest on: shift and number of bits.
_DIGITS = ((21, 11), (10, 11), (0, 10))


@dataclass(frozen=True)
class Sharding:
    """KV heads of a model split over processes, as transformers' tensor parallelism does (`tp_plan="auto"`).

    Process r of n holds the r-th n-th of the heads of every layer, and of the cache their entries alone. All
    processes see the same tokens.

    Args:
        group: the processes.
        rank: of this process in the group.
        size: number of processes.
        heads: KV heads of the whole model.

    """

    group: Any
    rank: int
    size: int
    heads: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Sharding | None:
        """Return how a model's heads are split; None if it is not tensor-parallel.

        Raises:
            ValueError: its layers are split over processes.

        """
        size = model.tp_size
        mesh: Any = getattr(model, "_device_mesh", None)
        if not size or size == 1 or mesh is None:
            return None
        names: tuple[str, ...] = mesh.mesh_dim_names or ()
        if "pp" in names and mesh["pp"].size() > 1:
            raise ValueError("the model is pipeline-parallel; accepted: tensor parallelism, or a device_map")
        group = mesh.get_group("tp") if "tp" in names else mesh.get_group()
        config: Any = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return cls(group, dist.get_rank(group), size, heads)

    def splits(self, heads: int) -> bool:
        """Return whether a layer that sees so many KV heads sees a part of them; some models' plans split none.

        Raises:
            ValueError: it sees neither all nor its share.

        """
        if heads == self.heads:
            return False
        if heads * self.size != self.heads:
            raise ValueError(
                f"process {self.rank} of {self.size} holds {heads} of {self.heads} KV heads; accepted: all of them, "
                f"or {self.heads}/{self.size}"
            )
        return True

    def part(self, x: Tensor, dim: int) -> Tensor:
        """Return this process's heads of something given for all heads."""
        return x.chunk(self.size, dim)[self.rank]

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """Gather the heads of all processes, in their order."""
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim)

    def total(self, x: Tensor) -> Tensor:
        """Return the sum over processes."""
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x

    def mean(self, x: Tensor) -> Tensor:  # [batch, tokens]
        """Return the mean over processes of what is right-aligned and may be longer in others, as long as here."""
        width = torch.tensor(x.shape[-1], device=x.device)
        dist.all_reduce(width, dist.ReduceOp.MAX, group=self.group)
        padded = torch.nn.functional.pad(x, (int(width) - x.shape[-1], 0))
        return self.total(padded)[..., padded.shape[-1] - x.shape[-1] :] / self.size

    def first(self, x: Tensor) -> Tensor:
        """Return what the first process has."""
        x = x.clone()
        dist.broadcast(x, dist.get_global_rank(self.group, 0), group=self.group)
        return x


def gathered(model: PreTrainedModel, name: str, weight: Tensor) -> Tensor:
    """Return a weight of a tensor-parallel model as it is in the model's file; all processes must ask.

    Args:
        model: the model.
        name: of the weight in its state.
        weight: this process's part.

    """
    if hasattr(weight, "full_tensor"):
        full: Any = weight
        return full.full_tensor()
    # Transformers that keep plain tensors know from the model's plan how each was split.
    from transformers.integrations.tensor_parallel import gather_state_dict_for_save

    sharding = Sharding.of(model)
    assert sharding is not None
    mesh = SimpleNamespace(size=lambda: sharding.size, mesh_dim_names=("tp",), get_group=lambda *_: sharding.group)
    plan: Any = model.tp_plan
    return gather_state_dict_for_save({name: weight}, plan, mesh, sharding.size)[name]


def columns(weight: Tensor, needed: int) -> Tensor:
    """Return a projection's weight with the columns of the heads that are here, as a plain tensor [out, needed].

    Raises:
        ValueError: they are not here.

    """
    split: Any = weight  # a plain tensor has neither of the two methods
    local: Tensor = split.to_local() if hasattr(split, "to_local") else weight
    if local.shape[1] != needed and hasattr(split, "full_tensor"):
        local = split.full_tensor()
    if local.shape[1] != needed:
        raise ValueError(
            f"the attention's output projection has {local.shape[1]} columns here, its heads {needed} dimensions: it "
            "is split over processes, or packed. Use directions other than OutputValue()"
        )
    return local


def largest(values: list[Tensor], counts: list[int], sharding: Sharding | None = None) -> list[Tensor]:
    """Return which values of each row are among its largest, of all processes; −inf never is.

    Processes tell each other how many of their values have which leading bits, 64 kB a row in three messages,
    however many values there are.

    Args:
        values: of this process, one float32 tensor [any] for each row.
        counts: how many of each row, over all processes.
        sharding: the processes; None for this one alone.

    Returns:
        Bool, as `values`.

    """
    if sharding is None:
        return [_largest(own, count) for own, count in zip(values, counts, strict=True)]
    keys = [_keys(own) for own in values]
    device = keys[0].device
    left = torch.tensor(counts, device=device)
    found = torch.zeros_like(left)  # leading bits of the smallest value that stays
    ties = left
    for number, (shift, bits) in enumerate(_DIGITS):
        bins = 1 << bits
        counted = torch.stack(
            [
                torch.bincount(own[(own >> (shift + bits)) == lead] >> shift & (bins - 1), minlength=bins)
                for own, lead in zip(keys, found, strict=True)
            ]
        )
        upto = sharding.total(counted).flip(-1).cumsum(-1)  # values in the so many highest bins
        if number == 0:
            left = torch.minimum(left, upto[:, -1])
        place = (upto < left[:, None]).sum(-1, keepdim=True)
        above = torch.where(place > 0, upto.gather(1, (place - 1).clamp_min(0)), 0)[:, 0]
        ties = upto.gather(1, place)[:, 0] - above
        left = left - above
        found = (found << bits) | (bins - 1 - place[:, 0])
    equal = [own == lead for own, lead in zip(keys, found, strict=True)]
    if not torch.equal(ties, left):
        # Of equal values, those of the first process and head stay.
        own = torch.stack([part.sum() for part in equal])
        before = sharding.whole(own[None], 0)[: sharding.rank].sum(0)
        left = left - before
    return [
        (own > lead) | (same & (same.cumsum(-1) <= room))
        for own, lead, same, room in zip(keys, found, equal, left, strict=True)
    ]


def _largest(values: Tensor, count: int) -> Tensor:
    there = values > float("-inf")
    if int(there.sum()) <= count:
        return there
    return torch.zeros_like(there).scatter_(-1, values.topk(count).indices, True)


def _keys(values: Tensor) -> Tensor:
    """Return whole numbers 0 … 2³² − 1 in the order of float32 values, −1 for −inf."""
    bits = (values.float() + 0.0).view(torch.int32)  # −0 becomes 0
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).long() + (1 << 31)
    return ordered.masked_fill(values == float("-inf"), -1)
