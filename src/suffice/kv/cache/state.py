"""State of one layer of the cache: what it stores, and what it remembers for the next eviction."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from suffice.gpu import async_tensor
from suffice.kv.attention.call import Padding
from suffice.kv.cache.recent_queries import RecentQueries
from suffice.kv.policy.weight_state import WeightState
from suffice.kv.storage.base import Storage


@dataclass(frozen=True)
class RowState:
    """State of one row of the batch in a layer.

    Args:
        num_padding: number of left-padding tokens.
        num_kept: number of entries kept by the last eviction, averaged over heads and layers; 0 before it.
        window: number of last tokens that every head kept in the last eviction; 0 before it, or if there were masked
            tokens between them.
        num_appended: number of tokens between the last eviction of this row and the last eviction of any row.
        num_masked: number of masked tokens since the last eviction of any row.

    """

    num_padding: int = 0
    num_kept: int = 0
    window: int = 0
    num_appended: int = 0
    num_masked: int = 0

    def mask_tokens(self, count: int) -> RowState:
        """Return the state after more tokens since the last eviction are masked."""
        return replace(self, num_padding=self.num_padding + count, num_masked=self.num_masked + count)


@dataclass(frozen=True)
class EarlierMask:
    """Summary of an attention mask over the tokens that a cache has seen.

    Args:
        num_valid: for each row, the number of tokens that are not masked.
        num_trailing: for each row, the number of masked tokens at the end.

    """

    num_valid: list[int]
    num_trailing: list[int]

    @classmethod
    def from_mask(cls, valid: Tensor) -> EarlierMask:
        """Read a mask over all earlier tokens, bool [batch, earlier], False on masked tokens."""
        trailing = (valid.flip(-1).cumsum(-1) == 0).sum(-1)
        return cls(*torch.stack((valid.sum(-1), trailing)).tolist())


@dataclass(frozen=True)
class LayerState:
    """State of a layer. The object does not change, but its storage does: new tokens are appended to it in place.

    Args:
        storage: keys and values of the entries; None before the first token.
        rows: state of each row of the batch.
        num_seen: number of tokens of the model's input so far, including padding.
        num_appended: number of tokens since the last eviction, including padding.
        has_evicted: whether entries were evicted.
        capacity: share of the capacity that the kept entries carry, [batch, num_key_value_heads]; None if it was not
            measured.
        repair_errors: held-out errors before and after the last repair that each head has kept, or, if it has kept
            none, after its last eviction, see `suffice.kv.policy.repair.Repair`; None without repair.
        queries: the newest queries that the weights of the policy need. If the weights need all queries since the last
            eviction, each row needs those since its own last eviction.
        has_holes: whether masked tokens follow other tokens in the storage. If so, their slots are moved to the front
            before the next eviction.
        weight_state: state of stateful weights.

    """

    storage: Storage | None = None
    rows: tuple[RowState, ...] = ()
    num_seen: int = 0
    num_appended: int = 0
    has_evicted: bool = False
    capacity: Tensor | None = None
    repair_errors: Tensor | None = None
    queries: RecentQueries = field(default_factory=RecentQueries)
    has_holes: bool = False
    weight_state: WeightState = field(default_factory=WeightState)

    @property
    def nbytes(self) -> int:
        """Bytes of queries, moments and capacities, without the storage."""
        moments = self.weight_state.query_moments.values()
        tensors = [x for own in moments for x in (own.weight, own.count, own.mean, own.square)]
        tensors += [x for x in (self.capacity, self.repair_errors) if x is not None]
        return sum(x.nbytes for x in (*self.queries.parts, *self.queries.positions, *tensors))

    @property
    def num_padding(self) -> list[int]:
        """Number of left-padding tokens of each row."""
        return [row.num_padding for row in self.rows]

    @property
    def num_droppable(self) -> int:
        """Number of newest tokens that `drop_last` can remove: every head still has their entries."""
        if not self.has_evicted:
            return self.num_seen
        return self.num_appended + min((row.window for row in self.rows), default=0)

    def drop_last(self, count: int) -> LayerState:
        """Return the state without the newest tokens. The storage is changed in place.

        Args:
            count: number of tokens, at most `num_droppable`.

        """
        if self.storage is None or count <= 0:
            return self
        num_masked = [0] * len(self.rows)
        if any(self.num_padding):
            appended = min(count, self.num_appended if self.has_evicted else self.num_seen)
            num_masked = self.storage.num_masked(appended)
        self.storage.drop_last(count)
        num_appended = max(0, self.num_appended - count)
        # Tokens beyond the appended ones were among the entries that the last eviction kept.
        missing = count - (self.num_appended - num_appended)
        rows = tuple(
            replace(
                row.mask_tokens(-masked),
                num_kept=max(0, row.num_kept - missing),
                window=max(0, row.window - missing),
                num_appended=max(0, row.num_appended - missing),
            )
            for row, masked in zip(self.rows, num_masked, strict=True)
        )
        num_seen, queries = self.num_seen - count, self.queries.drop_last(count)
        return replace(self, num_seen=num_seen, num_appended=num_appended, rows=rows, queries=queries)

    def append_tokens(self, num_new: int, padding: Padding | None, batch_size: int) -> LayerState:
        """Return the state after new tokens, without their keys and values.

        Args:
            num_new: number of new tokens.
            padding: masked tokens among them; None if there are none.
            batch_size: number of rows.

        """
        rows, has_holes = self.rows or (RowState(),) * batch_size, self.has_holes
        if padding is not None:
            has_tokens = [row.num_padding < self.num_seen for row in rows]
            has_holes = has_holes or padding.leaves_holes(has_tokens)
            added = zip(rows, padding.num_padded, strict=True)
            rows = tuple(row.mask_tokens(count) for row, count in added)
        num_seen, num_appended = self.num_seen + num_new, self.num_appended + num_new
        return replace(self, rows=rows, num_seen=num_seen, num_appended=num_appended, has_holes=has_holes)

    def mask_earlier(self, mask: EarlierMask) -> LayerState:
        """Return the state after tokens at the end of rows have been masked.

        In a batched chat, such tokens are the padding that `generate` appends to finished rows. The storage is changed
        in place.

        Raises:
            ValueError: other earlier tokens are masked, or tokens that were masked before are no longer masked.

        """
        held = [self.num_seen - row.num_padding for row in self.rows]
        if held == mask.num_valid or self.storage is None:
            return self
        counts = [have - now for have, now in zip(held, mask.num_valid, strict=True)]
        if min(counts) < 0:
            row = counts.index(min(counts))
            raise ValueError(
                f"attention_mask must mask all tokens that it masked before, got {mask.num_valid[row]} earlier tokens "
                f"of row {row} that are not masked instead of {held[row]}"
            )
        at_end = all(count <= trailing for count, trailing in zip(counts, mask.num_trailing, strict=True))
        if not at_end or max(mask.num_trailing) > self.num_appended:
            raise ValueError(
                "attention_mask must mask earlier tokens only at the end of a row, and only those since the last "
                f"eviction, got a row in which {max(counts)} earlier tokens are newly masked"
            )
        limits = async_tensor(mask.num_valid, self.storage.positions.device)
        self.storage.mask_positions(limits)
        rows = tuple(row.mask_tokens(count) for row, count in zip(self.rows, counts, strict=True))
        return replace(self, rows=rows, queries=self.queries.mask_positions(limits), has_holes=True)

    def new_positions(self, num_new: int, padding: Padding | None, device: torch.device) -> Tensor:
        """Return the positions of the newest tokens, which `append_tokens` has counted.

        Args:
            num_new: number of newest tokens.
            padding: masked tokens among them; None if there are none.
            device: device of the result.

        Returns:
            Index of each token among the tokens of its row that are not masked, long [batch, new]; negative for masked
            tokens.

        """
        indices = torch.arange(self.num_seen - num_new, self.num_seen, device=device)
        num_padding = self.num_padding
        if not any(num_padding):
            return indices.expand(len(num_padding), -1)
        if padding is not None and any(padding.has_holes):
            counts = zip(num_padding, padding.num_padded, strict=True)
            before = [self.num_seen - num_new - total + new for total, new in counts]
            positions = async_tensor(before, device)[:, None] + padding.valid.cumsum(-1) - 1
            return positions.masked_fill(~padding.valid, -1)
        positions = indices - async_tensor(num_padding, device)[:, None]
        return positions if padding is None else positions.masked_fill(~padding.valid, -1)

    def select_rows(self, index: Tensor) -> LayerState:
        """Return the state of some rows of the batch. The storage is changed in place.

        Args:
            index: index of each selected row, long [new batch].

        """
        if self.storage is None:
            return self
        self.storage.select_rows(index)
        return replace(
            self,
            rows=tuple(self.rows[row] for row in index.tolist()),
            capacity=_select(self.capacity, index),
            repair_errors=_select(self.repair_errors, index),
            queries=self.queries.select_rows(index),
            weight_state=self.weight_state.select_rows(index),
        )


def _select(x: Tensor | None, index: Tensor) -> Tensor | None:
    return None if x is None else x.index_select(0, index.to(x.device))
