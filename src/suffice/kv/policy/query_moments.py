"""Moments of a stream of queries, recent ones weighing more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Weighted mean and mean square of queries, by row and query head, float32.

    Args:
        weight: sum of the weights, [batch].
        count: tokens since the first query, long [batch].
        mean: [batch, heads, dim].
        square: mean of the squares, [batch, heads, dim].

    """

    weight: Tensor
    count: Tensor
    mean: Tensor
    square: Tensor

    @classmethod
    def of(cls, queries: Tensor, asked: Tensor | None, half_life: float) -> Moments:
        """Moments of queries [batch, heads, m, dim], the newest with weight 1, `half_life` tokens before it with ½.

        Args:
            queries: [batch, heads, m, dim].
            asked: bool [batch, m], False for queries that do not count; None for all.
            half_life: in tokens.

        """
        batch, _, m, _ = queries.shape
        age = torch.arange(m - 1, -1, -1, device=queries.device)
        share = (0.5 ** (age / half_life)).expand(batch, -1)
        if asked is not None:
            share = share * asked
        weight = share.sum(-1)
        row = (share / weight.clamp_min(torch.finfo(share.dtype).tiny)[:, None])[:, None, None]
        x = queries.float()
        mean, square = ((row @ y).squeeze(2) for y in (x, x.square()))
        return cls(weight, torch.full_like(weight, m, dtype=torch.long), mean, square)

    def after(self, earlier: Moments | None, half_life: float) -> Moments:
        """Join the moments of the queries that came before these."""
        if earlier is None:
            return self
        old = earlier.weight * 0.5 ** (self.count / half_life)
        weight = old + self.weight
        share = (old / weight.clamp_min(torch.finfo(weight.dtype).tiny))[:, None, None]
        return Moments(
            weight,
            earlier.count + self.count,
            share * earlier.mean + (1 - share) * self.mean,
            share * earlier.square + (1 - share) * self.square,
        )

    @property
    def variance(self) -> Tensor:
        """Variance of each dimension, [batch, heads, dim]."""
        return (self.square - self.mean.square()).clamp_min(0)

    def rows(self, index: Tensor) -> Moments:
        """Keep, reorder or repeat rows of the batch."""
        own = index.to(self.weight.device)
        return Moments(*(getattr(self, name).index_select(0, own) for name in self.__dataclass_fields__))
