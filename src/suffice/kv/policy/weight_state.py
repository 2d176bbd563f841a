"""State of weights that also depend on queries before the last eviction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from suffice.gpu import async_tensor


@dataclass(frozen=True)
class QueryMoments:
    """Weighted mean and mean square of queries, by row and query head, in float32.

    Args:
        weight: sum of the weights, [batch].
        count: number of queries, long [batch].
        mean: [batch, heads, head_dim].
        square: mean of the squares, [batch, heads, head_dim].

    """

    weight: Tensor
    count: Tensor
    mean: Tensor
    square: Tensor

    @classmethod
    def from_queries(cls, queries: Tensor, valid: Tensor | None, half_life: float) -> QueryMoments:
        """Compute the moments of queries; the newest has weight 1, the one `half_life` tokens before it weight ½.

        Args:
            queries: [batch, heads, m, head_dim].
            valid: bool [batch, m], False for queries to leave out; None to use all.
            half_life: in tokens.

        """
        batch, _, m, _ = queries.shape
        age = torch.arange(m - 1, -1, -1, device=queries.device)
        share = (0.5 ** (age / half_life)).expand(batch, -1)
        count = torch.full((batch,), m, device=queries.device)
        if valid is not None:
            share, count = share * valid, valid.sum(-1)
        weight = share.sum(-1)
        row = (share / weight.clamp_min(torch.finfo(share.dtype).tiny)[:, None])[:, None, None]
        x = queries.float()
        mean, square = ((row @ y).squeeze(2) for y in (x, x.square()))
        return cls(weight, count, mean, square)

    def combine_with_earlier(self, earlier: QueryMoments | None, half_life: float) -> QueryMoments:
        """Return the moments of these queries and of those that came before them."""
        if earlier is None:
            return self
        old = earlier.weight * 0.5 ** (self.count / half_life)
        weight = old + self.weight
        share = (old / weight.clamp_min(torch.finfo(weight.dtype).tiny))[:, None, None]
        return QueryMoments(
            weight,
            earlier.count + self.count,
            share * earlier.mean + (1 - share) * self.mean,
            share * earlier.square + (1 - share) * self.square,
        )

    @property
    def variance(self) -> Tensor:
        """Variance of each dimension, [batch, heads, head_dim]."""
        return (self.square - self.mean.square()).clamp_min(0)

    def replace_rows(self, other: QueryMoments | None, rows: Tensor) -> QueryMoments:
        """Return these moments with those of some rows replaced.

        Args:
            other: the new moments; None stands for moments of no queries.
            rows: bool [batch], True for the rows to replace.

        """

        def replace(own: Tensor, name: str) -> Tensor:
            new = torch.zeros_like(own) if other is None else getattr(other, name)
            return torch.where(rows.view(-1, *[1] * (own.dim() - 1)), new, own)

        return QueryMoments(*(replace(getattr(self, name), name) for name in self.__dataclass_fields__))

    def select_rows(self, index: Tensor) -> QueryMoments:
        """Select rows of the batch, as `torch.index_select` does: the new row j is the old row index[j]."""
        index = index.to(self.weight.device)
        return QueryMoments(*(getattr(self, name).index_select(0, index) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class WeightState:
    """What stateful weights carry from one eviction of a layer to the next.

    Args:
        attention_received: attention that each entry has received so far, [batch, num_key_value_heads, entries];
            None if no weight accumulates it.
        query_moments: exponentially weighted moments of all queries so far, by half-life.

    """

    attention_received: Tensor | None = None
    query_moments: dict[float, QueryMoments] = field(default_factory=dict[float, QueryMoments])

    def merge(self, other: WeightState) -> WeightState:
        """Return the union of two states of the same call."""
        received = self.attention_received if self.attention_received is not None else other.attention_received
        return WeightState(received, {**self.query_moments, **other.query_moments})

    def keep_rows(self, earlier: WeightState, is_due: Sequence[bool]) -> WeightState:
        """Return this state for the rows that evict, and the earlier state for the others.

        Args:
            earlier: state of the last eviction.
            is_due: for each row, whether it evicts.

        """
        if all(is_due):
            return self
        received, moments = self.attention_received, self.query_moments
        if received is not None:
            old = torch.zeros_like(received) if earlier.attention_received is None else earlier.attention_received
            received = torch.where(async_tensor(is_due, received.device)[:, None, None], received, old)
        kept = {
            half_life: new.replace_rows(earlier.query_moments.get(half_life), ~async_tensor(is_due, new.weight.device))
            for half_life, new in moments.items()
        }
        return WeightState(received, kept)

    def select_rows(self, index: Tensor) -> WeightState:
        """Select rows of the batch, as `torch.index_select` does: the new row j is the old row index[j]."""
        received = self.attention_received
        return WeightState(
            None if received is None else received.index_select(0, index.to(received.device)),
            {half_life: moments.select_rows(index) for half_life, moments in self.query_moments.items()},
        )
