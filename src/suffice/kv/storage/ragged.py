"""Storage for heads of unequal length, without padding."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from suffice.gpu import async_tensor
from suffice.kv.attention.call import AttentionCall
from suffice.kv.backend.torch_backend import TorchBackend
from suffice.kv.storage.attention_weights import weights_over_entries
from suffice.kv.storage.base import (
    LOGIT_BIAS,
    NEW_COLUMN_VALUES,
    Entries,
    SpareSlots,
    can_write_in_place,
    flat_index,
    index_vectors,
    last_slots,
    num_spare_slots,
    pack_columns,
    unpack_columns,
)
from suffice.kv.storage.per_head import PerHeadStorage


@dataclass
class PackedEntries:
    """Entries of all rows and heads, one head after the other.

    Args:
        keys: [packed, head_dim].
        values: [packed, value_dim].
        positions: index of each entry within the text of its row, int32 [packed].
        lengths: number of packed entries of each row and head.
        rope_positions: positions by which the keys were rotated, int32 [packed]; None if they equal `positions`.
        columns: additional numbers of each entry by name, float32 [packed].

    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    lengths: list[list[int]]
    rope_positions: Tensor | None = None
    columns: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def map(self, function: Callable[[Tensor], Tensor], lengths: list[list[int]]) -> PackedEntries:
        """Apply a function to every tensor. `lengths` are the lengths of the result."""
        rope_positions = self.rope_positions
        return PackedEntries(
            function(self.keys),
            function(self.values),
            function(self.positions),
            lengths,
            None if rope_positions is None else function(rope_positions),
            {name: function(x) for name, x in self.columns.items()},
        )


@dataclass
class Tail:
    """Entries of all new tokens since the last eviction.

    Args:
        keys: [batch, num_key_value_heads, new, head_dim].
        values: [batch, num_key_value_heads, new, value_dim].
        positions: index within the text of the row, int32 [batch, new]; −1 on padding.

    """

    keys: Tensor
    values: Tensor
    positions: Tensor


class RaggedStorage(PerHeadStorage):
    """Keys and values of heads of unequal length, one head after the other.

    Each head has its packed entries, then the entries of the tail (all new tokens since the last eviction), then spare
    slots.

    Args:
        packed: the packed entries.
        tail: entries of new tokens; None if there are none.

    """

    kind: ClassVar[str] = "ragged"

    def __init__(self, packed: PackedEntries, tail: Tail | None = None) -> None:
        self._replace_entries(packed, tail)

    def _replace_entries(self, packed: PackedEntries, tail: Tail | None) -> None:
        """Replace all stored entries."""
        self.lengths = packed.lengths  # number of packed entries of each row and head
        self.packed_positions, self.packed_rope_positions = packed.positions, packed.rope_positions
        self.tail_positions = packed.positions.new_empty((len(packed.lengths), 0))
        self.tail_is_full = True  # no token of the tail is padding
        self.decode_plan: Any = None  # plan of the decoding kernel for the current lengths
        self._columns = packed.columns
        self._keys, self._values = packed.keys, packed.values
        self._spare = SpareSlots()
        self._first_free: Tensor | None = None
        if tail is not None and tail.positions.shape[1]:
            self.append(tail.keys, tail.values, tail.positions, padded=bool((tail.positions < 0).any()))

    @classmethod
    def gather(cls, entries: Entries, kept: Tensor, counts: Tensor | None = None) -> RaggedStorage:
        """Copy the kept entries, so that the memory of all entries can be freed.

        Args:
            entries: all entries.
            kept: indices of the kept entries, long [batch, num_key_value_heads, width], ascending; −1 in empty slots.
            counts: number of kept entries of each row and head, long [batch, num_key_value_heads] on the CPU; None to
                count them.

        """
        if counts is None:
            counts = (kept >= 0).sum(-1).cpu()
            slots = (kept >= 0).flatten().nonzero().squeeze(-1)
        else:
            slots = last_slots(counts.flatten(), kept.shape[2], kept.device)
        index = kept.clamp_min(0)

        def pack(x: Tensor) -> Tensor:
            return x.flatten().index_select(0, slots)

        def pack_column(x: Tensor) -> Tensor:
            return pack(x.expand(-1, kept.shape[1], -1).gather(2, index))

        keys, values = (index_vectors(x, pack(flat_index(x, index))) for x in (entries.keys, entries.values))
        rope_positions = entries.rope_positions
        return cls(
            PackedEntries(
                keys,
                values,
                pack_column(entries.positions).to(torch.int32),
                counts.tolist(),
                None if rope_positions is None else pack_column(rope_positions).to(torch.int32),
                {name: pack_column(x) for name, x in entries.columns.items()},
            )
        )

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [slots, dim] each, with spare slots after the entries of each head."""
        return self._keys, self._values

    @property
    def columns(self) -> dict[str, Tensor]:
        """Additional numbers of the packed entries by name, float32 [packed]."""
        return self._columns

    @property
    def logit_bias(self) -> Tensor | None:
        """Numbers that are added to the logits of the packed entries, float32 [packed]; None if there are none."""
        return self._columns.get(LOGIT_BIAS)

    @property
    def tail_length(self) -> int:
        """Number of new tokens since the last eviction."""
        return self.tail_positions.shape[1]

    @property
    def packed(self) -> PackedEntries:
        """The packed entries, without tail and spare slots."""
        keys, values = (self._without_tail(x) for x in self.buffers)
        return PackedEntries(
            keys, values, self.packed_positions, self.lengths, self.packed_rope_positions, self._columns
        )

    @property
    def tail(self) -> Tail:
        """The entries of new tokens."""
        keys, values = (self._only_tail(x) for x in self.buffers)
        return Tail(keys, values, self.tail_positions)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """For each row and head, the index of its first slot in `buffers` and its number of entries."""
        spans, start = [], 0
        for length in itertools.chain(*self.lengths):
            spans.append((start, length + self.tail_length))
            start += length + self._spare.end
        return spans

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return sum(self.nbytes_by_head)

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of one key and value."""
        return sum(x.shape[-1] * x.element_size() for x in self.buffers)

    @property
    def nbytes_by_head(self) -> list[int]:
        """Bytes of the keys and values of each head, over all rows."""
        in_tail = len(self.lengths) * self.tail_length
        return [(sum(rows) + in_tail) * self.bytes_per_entry for rows in zip(*self.lengths, strict=True)]

    @property
    def nbytes_index(self) -> int:
        """Bytes of positions, columns, spare slots and the index of the next free slot."""
        positions = (self.packed_positions, self.tail_positions, self.packed_rope_positions, self._first_free)
        index = (*positions, *self._columns.values())
        spare = sum(x.nbytes for x in self.buffers) - self.nbytes
        return spare + sum(x.nbytes for x in index if x is not None)

    @property
    def num_kept(self) -> Tensor:
        """Number of entries of each row and head, long [batch, num_key_value_heads]."""
        packed = torch.tensor(self.lengths, device=self.tail_positions.device)
        return packed + (self.tail_positions >= 0).sum(-1)[:, None]

    @property
    def max_length(self) -> int:
        """Number of slots of the row and head with the most entries, including padding."""
        return max(itertools.chain(*self.lengths)) + self.tail_length

    @property
    def positions(self) -> Tensor:
        """Index of each entry within its row's text, int32 [batch, num_key_value_heads, width]; −1 in empty slots."""
        return self._aligner()(self.packed_positions, self._tail_positions_by_head(), -1)

    @property
    def entries(self) -> Entries:
        """All entries, right-aligned in padded copies."""
        align, packed, tail = self._aligner(), self.packed, self.tail
        tail_positions = self._tail_positions_by_head()
        rope_positions = packed.rope_positions
        return Entries(
            align(packed.keys, tail.keys, 0),
            align(packed.values, tail.values, 0),
            align(packed.positions, tail_positions, -1).long(),
            None if rope_positions is None else align(rope_positions, tail_positions, -1),
            {
                name: align(x, x.new_full(tail_positions.shape, NEW_COLUMN_VALUES[name]), 0)
                for name, x in packed.columns.items()
            },
        )

    def _tail_positions_by_head(self) -> Tensor:
        return self.tail_positions[:, None].expand(-1, len(self.lengths[0]), -1)

    def _aligner(self) -> Callable[[Tensor, Tensor, float], Tensor]:
        """Return a function that right-aligns packed entries and appends a tail."""
        counts = torch.tensor(self.lengths)
        width = int(counts.max())
        slots = last_slots(counts.flatten(), width, self.tail_positions.device)

        def align(packed: Tensor, tail: Tensor, fill: float) -> Tensor:
            flat = packed.new_full((counts.numel() * width, *packed.shape[1:]), fill).index_copy_(0, slots, packed)
            return torch.cat((flat.unflatten(0, (*counts.shape, width)), tail.to(packed.dtype)), dim=2)

        return align

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, *, padded: bool = False) -> None:
        """Add the entries of new tokens; see `Storage.append`."""
        start, new = self.tail_length, keys.shape[2]
        tail_positions = torch.cat((self.tail_positions, positions.clamp_min(-1).to(torch.int32)), dim=1)
        in_place = can_write_in_place(self._keys, keys) and can_write_in_place(self._values, values)
        if in_place and self._spare.claim(start, new):
            index = self._free_slots(start, new)
            self._keys.index_copy_(0, index, keys.flatten(0, 2))
            self._values.index_copy_(0, index, values.flatten(0, 2))
        else:
            mean_length = sum(map(sum, self.lengths)) // (len(self.lengths) * len(self.lengths[0]))
            spare = num_spare_slots(mean_length + start, new)
            # Both are copied before either is replaced, so that a failure leaves the storage as it was.
            self._keys, self._values = (
                self._with_new(self._keys, keys, spare),
                self._with_new(self._values, values, spare),
            )
            self._spare = SpareSlots(start + new, start + new + spare)
            self._first_free = self.decode_plan = None
        self.tail_positions, self.tail_is_full = tail_positions, self.tail_is_full and not padded

    def _free_slots(self, start: int, new: int) -> Tensor:
        """Return the slots of the next `new` tokens in `buffers`, long [batch * num_key_value_heads * new]."""
        if self._first_free is None:
            ends = [first + count - start for first, count in self.spans]
            self._first_free = async_tensor(ends, self._keys.device)
        if new == 1:
            return self._first_free + start
        return (self._first_free[:, None] + torch.arange(start, start + new, device=self._keys.device)).flatten()

    def _with_new(self, x: Tensor, new: Tensor, spare: int) -> Tensor:
        """Copy a buffer, with new entries [batch, num_key_value_heads, new, …] and spare slots added to each head."""
        empty = x.new_zeros(spare, x.shape[-1])
        heads = zip(self.spans, new.flatten(0, 1), strict=True)
        return torch.cat([part for (start, n), added in heads for part in (x[start : start + n], added, empty)])

    def attend(self, call: AttentionCall, backend: TorchBackend) -> tuple[Tensor, Tensor | None]:
        """Compute the attention of new tokens over all entries of each head; see `Storage.attend`."""
        scaling = call.scaling or call.query.shape[-1] ** -0.5
        output = backend.ragged_attention(call.query, self, call.dense_mask, scaling, call.softcap, call.sink_logits)
        return output, weights_over_entries(call, self.entries, scaling) if call.needs_weights else None

    def end_attention(self, query_moments: Callable[[], Tensor | None] | None = None) -> None:
        """Do nothing: the attention needs no temporary tensors."""

    @property
    def num_heads(self) -> int:
        """Number of KV heads."""
        return len(self.lengths[0])

    def keep(self, kept: Tensor) -> RaggedStorage:
        """Return a storage of some entries; see `PerHeadStorage.keep`."""
        return RaggedStorage.gather(self.entries, kept)

    def row_priorities(self, row: int) -> Tensor:
        """Return the priorities of the packed entries of a row; see `PerHeadStorage.row_priorities`."""
        first = sum(sum(heads) for heads in self.lengths[:row])
        return self._columns["priority"][first : first + sum(self.lengths[row])]

    def keep_by_row(self, masks: list[Tensor]) -> None:
        """Keep the packed entries for which a mask is True; see `PerHeadStorage.keep_by_row`."""
        mask = torch.cat(masks)
        sizes = list(itertools.chain(*self.lengths))
        counts = [int(part.sum()) for part in mask.split(sizes)]
        lengths = [counts[start : start + self.num_heads] for start in range(0, len(counts), self.num_heads)]
        self._replace_entries(self.packed.map(lambda x: x[mask], lengths), self.tail)

    def select_rows(self, index: Tensor) -> None:
        """Select rows of the batch, as `torch.index_select` does: the new row j is the old row index[j]."""
        rows = index.tolist()
        sizes = [sum(heads) for heads in self.lengths]
        lengths = [list(self.lengths[row]) for row in rows]
        packed = self.packed.map(lambda x: torch.cat([x.split(sizes)[row] for row in rows]), lengths)
        tail, index = self.tail, index.to(self.tail_positions.device)
        self._replace_entries(
            packed, Tail(*(x.index_select(0, index) for x in (tail.keys, tail.values, tail.positions)))
        )

    def drop_last(self, count: int) -> None:
        """Remove the newest entries. Every head must still have them."""
        if count <= self.tail_length:
            self.tail_positions = self.tail_positions[:, : self.tail_length - count]
            self._spare.release(count)
            self.decode_plan = None
            return
        entries = self.entries
        slots = torch.arange(entries.keys.shape[2], device=entries.keys.device)
        kept = (entries.positions >= 0) & (slots < len(slots) - count)
        self._replace_entries(RaggedStorage.gather(entries, slots.where(kept, -1)).packed, None)

    def mask_positions(self, limits: Tensor) -> None:
        """Turn the tail's entries of each row whose position is at least a limit, long [batch], into empty slots."""
        self.tail_positions = self.tail_positions.masked_fill(self.tail_positions >= limits[:, None], -1)
        self.tail_is_full = False

    def copy(self) -> RaggedStorage:
        """Return a storage that shares the tensors."""
        self._spare.is_shared = True
        other = copy.copy(self)
        other._columns = dict(self._columns)
        return other

    def _without_tail(self, x: Tensor) -> Tensor:
        if not self._spare.end:
            return x
        return torch.cat([x[start : start + n - self.tail_length] for start, n in self.spans])

    def _only_tail(self, x: Tensor) -> Tensor:
        tails = torch.stack([x[start + n - self.tail_length : start + n] for start, n in self.spans])
        return tails.unflatten(0, (len(self.lengths), -1))

    def state_dict(self) -> dict[str, Tensor]:
        """Return packed entries, tail and columns."""
        packed, tail = self.packed, self.tail
        tensors = {
            "keys": packed.keys,
            "values": packed.values,
            "positions": packed.positions,
            "lengths": torch.tensor(packed.lengths),
            "tail_keys": tail.keys,
            "tail_values": tail.values,
            "tail_positions": tail.positions,
        }
        return {**tensors, **pack_columns(packed.columns, packed.rope_positions)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> RaggedStorage:
        """Build a storage from the result of `state_dict`."""
        packed = PackedEntries(
            state["keys"],
            state["values"],
            state["positions"],
            state["lengths"].tolist(),
            state.get("rope_positions"),
            unpack_columns(state),
        )
        return cls(packed, Tail(state["tail_keys"], state["tail_values"], state["tail_positions"]))
