"""Directions: how a cached entry changes the output of the attention if it is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.kv.hf.tensor_parallel import local_columns
from suffice.kv.policy.attention_stats import AttentionStats


class Directions(ABC):
    """Base class of all directions; a subclass defines `vectors`."""

    @abstractmethod
    def vectors(self, stats: AttentionStats) -> Tensor:
        """Return u, float32 [batch, num_key_value_heads, entries, dim]; values at padding are ignored."""

    @property
    def needs_rotary(self) -> bool:
        """Whether the directions need the rotary embedding of the model, to rotate keys back."""
        return False

    def norms(self, stats: AttentionStats, p: float) -> Tensor:
        """Return the p-norms of u, [batch, num_key_value_heads, entries]."""
        return self.vectors(stats).norm(p=p, dim=-1)


@dataclass(frozen=True)
class Constant(Directions):
    """u = 1: all entries change the output equally."""

    def vectors(self, stats: AttentionStats) -> Tensor:
        """Return ones, [batch, num_key_value_heads, entries, 1]."""
        return torch.ones(stats.batch_size, stats.num_key_value_heads, stats.num_entries, 1, device=stats.device)

    def __str__(self) -> str:
        return "1"


@dataclass(frozen=True)
class Value(Directions):
    """u = v (2604.25975, Eq. 7)."""

    def vectors(self, stats: AttentionStats) -> Tensor:
        """Return the values, [batch, num_key_value_heads, entries, value_dim]."""
        return stats.values32

    def __str__(self) -> str:
        return "v"


@dataclass(frozen=True)
class OutputValue(Directions):
    """u = W_O v: the value after the output projection, which is added to the residual stream.

    Each query head of a GQA group has its own W_O. Results are averaged over the group.
    """

    def vectors(self, stats: AttentionStats) -> Tensor:
        """Return C v with CᵀC = mean of W_OᵀW_O over the group, [batch, num_key_value_heads, entries, value_dim].

        C v has the same inner products as W_O v, averaged over the group. Leverage scores and 2-norms depend on inner
        products only, and C v has fewer dimensions.

        Raises:
            ValueError: the attention has no output projection.

        """
        gram = torch.stack([weight.mT @ weight for weight in self._head_weights(stats)])
        gram = gram.unflatten(0, (stats.num_key_value_heads, stats.num_key_value_groups)).mean(1)
        eigenvalues, eigenvectors = torch.linalg.eigh(gram)
        return stats.values32 @ (eigenvectors * eigenvalues.clamp_min(0).sqrt()[:, None])

    def norms(self, stats: AttentionStats, p: float) -> Tensor:
        """Return the p-norms of W_O v, averaged over the group, [batch, num_key_value_heads, entries].

        Only one head's projected values are in memory at a time.

        Raises:
            ValueError: the attention has no output projection.

        """
        return stats.group_heads(self.norms_by_head(stats, p)).mean(2)

    def norms_by_head(self, stats: AttentionStats, p: float) -> Tensor:
        """Return the p-norms of W_O v for each query head, [batch, heads, entries]; see `norms`."""
        norms = [
            (stats.values32[:, head // stats.num_key_value_groups] @ weight.mT).norm(p=p, dim=-1)
            for head, weight in enumerate(self._head_weights(stats))
        ]
        return torch.stack(norms, 1)

    def _head_weights(self, stats: AttentionStats) -> list[Tensor]:
        """Return W_O of each query head, [hidden, value_dim]."""
        if stats.output_weight is None:
            raise ValueError(
                "directions must be Value() or another class that needs no output projection, because the attention of "
                "the model has no linear layer named `o_proj`, got OutputValue()"
            )
        value_dim = stats.values.shape[-1]
        weight = local_columns(stats.output_weight, stats.queries.shape[1] * value_dim)
        return list(weight.float().split(value_dim, dim=1))

    def __str__(self) -> str:
        return "W_O v"


@dataclass(frozen=True)
class Key(Directions):
    """u = k.

    Args:
        rotary: use the cached keys, after the rotary embedding; False uses the keys rotated back to position 0.
        centered: subtract the mean over the entries of a head.
        unit: scale each key to norm 1.

    """

    rotary: bool = True
    centered: bool = False
    unit: bool = False

    @property
    def needs_rotary(self) -> bool:
        """Whether keys are rotated back."""
        return not self.rotary

    def vectors(self, stats: AttentionStats) -> Tensor:
        """Return the keys, [batch, num_key_value_heads, entries, head_dim]."""
        keys = stats.keys32 if self.rotary else stats.unrotated_keys()
        if self.centered:
            keys = keys - stats.mean_over_entries(keys)[:, :, None]
        return torch.nn.functional.normalize(keys, dim=-1) if self.unit else keys

    def __str__(self) -> str:
        return "k/‖k‖" if self.unit else "k"
