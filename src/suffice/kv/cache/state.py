"""State of one layer of the cache: what it stores, and what it remembers for the next eviction."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from suffice.kv.policy.weight_state import WeightState
from suffice.kv.storage.base import Storage


@dataclass(frozen=True)
class RowState:
    """State of one row of the batch in a layer.

    Args:
        num_padding: number of left-padding tokens.
        num_kept: number of entries kept by the last eviction, averaged over heads and layers; 0 before it.
        window: number of last tokens that every head kept in the last eviction; 0 before it.
        num_appended: number of tokens between the last eviction of this row and the last eviction of any row.

    """

    num_padding: int = 0
    num_kept: int = 0
    window: int = 0
    num_appended: int = 0


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
        queries: the newest queries that the weights of the policy need, each [batch, num_heads, any, head_dim]. If
            they need all since the last eviction, each row needs as many as it has tokens since its own.
        weight_state: state of stateful weights.

    """

    storage: Storage | None = None
    rows: tuple[RowState, ...] = ()
    num_seen: int = 0
    num_appended: int = 0
    has_evicted: bool = False
    capacity: Tensor | None = None
    queries: tuple[Tensor, ...] = ()
    weight_state: WeightState = field(default_factory=WeightState)

    @property
    def num_padding(self) -> list[int]:
        """Number of left-padding tokens of each row."""
        return [row.num_padding for row in self.rows]

    @property
    def num_droppable(self) -> int:
        """Number of newest tokens that `drop_last` can remove: those of which every head still has the entry."""
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
        self.storage.drop_last(count)
        num_appended = max(0, self.num_appended - count)
        # What was dropped beyond the appended tokens is missing in the entries that the last eviction kept.
        missing = count - (self.num_appended - num_appended)
        rows = tuple(
            replace(
                row,
                num_kept=max(0, row.num_kept - missing),
                window=max(0, row.window - missing),
                num_appended=max(0, row.num_appended - missing),
            )
            for row in self.rows
        )
        queries = (torch.cat(self.queries, dim=2)[:, :, :-count],) if self.queries else ()
        return replace(self, num_seen=self.num_seen - count, num_appended=num_appended, rows=rows, queries=queries)

    def append_tokens(self, num_new: int, rows: tuple[RowState, ...]) -> LayerState:
        """Return the state after new tokens, without their keys and values.

        Args:
            num_new: number of new tokens.
            rows: state of each row, including the padding of the new tokens.

        """
        return replace(self, rows=rows, num_seen=self.num_seen + num_new, num_appended=self.num_appended + num_new)

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
            capacity=None if self.capacity is None else self.capacity.index_select(0, index.to(self.capacity.device)),
            queries=tuple(query.index_select(0, index.to(query.device)) for query in self.queries),
            weight_state=self.weight_state.select_rows(index),
        )
