"""The newest queries of a layer, which weights need at the next eviction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RecentQueries:
    """The newest queries of a layer and their positions, in parts that are joined only when they are needed.

    Args:
        parts: queries, oldest first, each [batch, num_heads, any, head_dim].
        positions: positions of the queries of each part, long [batch, any]; negative for masked tokens.

    """

    parts: tuple[Tensor, ...] = ()
    positions: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return sum(part.shape[2] for part in self.parts)

    def append(self, queries: Tensor, positions: Tensor, needed: int | None) -> RecentQueries:
        """Add newer queries, and drop parts that are not among the newest `needed` queries; None drops none."""
        parts, all_positions = [*self.parts], [*self.positions]
        if needed is not None and queries.shape[2] > needed:
            queries, positions = queries[:, :, -needed:], positions[:, -needed:]
        parts.append(_on_its_own(queries))
        all_positions.append(_on_its_own(positions))
        while needed is not None and sum(part.shape[2] for part in parts[1:]) >= needed:
            parts.pop(0)
            all_positions.pop(0)
        return RecentQueries(tuple(parts), tuple(all_positions))

    def num_slots(self, needed: int) -> int:
        """Return how many of the newest queries include `needed` that are not masked, in each row that has so many."""
        is_token = torch.cat(self.positions, dim=1) >= 0
        has_fewer = is_token.flip(-1).cumsum(-1) < needed
        return min(int(has_fewer.sum(-1).max()) + 1, is_token.shape[1])

    def join(self) -> tuple[Tensor, Tensor]:
        """Return the queries [batch, num_heads, queries, head_dim] and their positions [batch, queries]."""
        if len(self.parts) == 1:  # for example those of a whole prompt, which would be expensive to copy
            return self.parts[0], self.positions[0]
        return torch.cat(self.parts, dim=2), torch.cat(self.positions, dim=1)

    def right_aligned(self) -> RecentQueries:
        """Return copies in which the queries of masked tokens come first in every row."""
        if not self.parts:
            return self
        queries, positions = self.join()
        index = (positions >= 0).long().sort(dim=-1, stable=True).indices
        queries = queries.take_along_dim(index[:, None, :, None], dim=2)
        return RecentQueries((queries,), (positions.gather(1, index),))

    def mask_positions(self, limits: Tensor) -> RecentQueries:
        """Mask the queries of each row whose position is at least a limit, long [batch]."""
        positions = tuple(x.masked_fill(x >= limits.to(x.device)[:, None], -1) for x in self.positions)
        return RecentQueries(self.parts, positions)

    def newest(self, count: int) -> RecentQueries:
        """Return copies of the newest `count` queries of each row."""
        if count == 0 or not self.parts:
            return RecentQueries()
        queries, positions = self.join()
        if queries.shape[2] > count:
            # Copied, because a slice would keep all queries in memory.
            queries, positions = queries[:, :, -count:].clone(), positions[:, -count:].clone()
        return RecentQueries((queries,), (positions,))

    def drop_last(self, count: int) -> RecentQueries:
        """Return the queries without the newest `count`."""
        if not self.parts:
            return self
        queries, positions = self.join()
        return RecentQueries((_on_its_own(queries[:, :, :-count]),), (_on_its_own(positions[:, :-count]),))

    def select_rows(self, index: Tensor) -> RecentQueries:
        """Select rows of the batch, as `torch.index_select` does: the new row j is the old row index[j]."""
        parts, positions = (
            tuple(x.index_select(0, index.to(x.device)) for x in tensors) for tensors in (self.parts, self.positions)
        )
        return RecentQueries(parts, positions)


def _on_its_own(x: Tensor) -> Tensor:
    """Return a tensor whose memory holds its numbers only, once each.

    A slice would keep a larger tensor from being freed: that of all tokens of a call, or, in some models, that of
    queries, keys and values. Rows with equal positions share the memory of one row.
    """
    return x.clone() if x.untyped_storage().nbytes() != x.nbytes else x
