"""Storage for heads of unequal length, without padding."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from suffice.gpu import async_tensor
from suffice.kv.storage.growth import Room, room_for, writable
from suffice.kv.storage.uniform import FILL, Entries, UniformStorage, pick_vectors, vector_numbers

if TYPE_CHECKING:
    from suffice.kv.kernels.decoding import Plan


class RaggedStorage:
    """Keys and values of heads of unequal length, one head after the other.

    Each head has its packed entries, those of the tail, which are of all new tokens since the last eviction, and
    room for more. Copies share tensors: what one of them holds is never written to, new entries go into the room.

    Args:
        keys: packed ones, [packed, dim].
        values: packed ones, [packed, value_dim].
        positions: int32 [packed].
        lengths: packed entries of each row and head.
        tail: keys, values [batch, kv_heads, new, …] and positions int32 [batch, new] of new tokens; None for none.
        places: int32 [packed], where the rotary embedding puts the keys; None for `positions`.
        columns: further numbers of the packed entries by name, float32 [packed].

    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        lengths: list[list[int]],
        tail: tuple[Tensor, Tensor, Tensor] | None = None,
        places: Tensor | None = None,
        columns: dict[str, Tensor] | None = None,
    ) -> None:
        self.lengths = lengths
        self.packed_positions = positions
        self.packed_places = places
        self.columns = columns or {}
        self.tail_positions = positions.new_empty((len(lengths), 0))
        self.tail_full = True  # no new token is padding
        self._keys, self._values = keys, values
        self._room = Room()
        self._first_free: Tensor | None = None
        self.plan: Plan | None = None  # of a kernel, for where the heads stand now
        if tail is not None and tail[2].shape[1]:
            self.append(*tail, padded=bool((tail[2] < 0).any()))

    @classmethod
    def gather(cls, entries: Entries, kept: Tensor, counts: Tensor | None = None) -> RaggedStorage:
        """Copy the kept entries out of all of them, so that those can be freed.

        Args:
            entries: all of them.
            kept: long [batch, kv_heads, width], ascending, −1 for none.
            counts: how many each row and head keeps, long [batch, kv_heads] on the CPU; None to count them.

        """
        if counts is None:
            counts = (kept >= 0).sum(-1).cpu()
            there = (kept >= 0).flatten().nonzero().squeeze(-1)
        else:
            there = _last_of_each(counts.flatten(), kept.shape[2], kept.device)
        index = kept.clamp_min(0)

        def packed(x: Tensor) -> Tensor:
            return x.flatten().index_select(0, there)

        def beside(x: Tensor) -> Tensor:
            return packed(x.expand(-1, kept.shape[1], -1).gather(2, index))

        keys, values = (pick_vectors(x, packed(vector_numbers(x, index))) for x in (entries.keys, entries.values))
        return cls(
            keys,
            values,
            beside(entries.positions).to(torch.int32),
            counts.tolist(),
            places=None if entries.places is None else beside(entries.places).to(torch.int32),
            columns={name: beside(x) for name, x in entries.columns.items()},
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys and values, with the room behind each head."""
        return self._keys, self._values

    @property
    def tail(self) -> int:
        """New tokens since the last eviction."""
        return self.tail_positions.shape[1]

    @property
    def packed_keys(self) -> Tensor:
        """Packed keys [packed, dim]."""
        return self._packed_of(self._keys)

    @property
    def packed_values(self) -> Tensor:
        """Packed values [packed, value_dim]."""
        return self._packed_of(self._values)

    @property
    def tail_keys(self) -> Tensor:
        """Keys of new tokens, [batch, kv_heads, new, dim]."""
        return self._tail_of(self._keys)

    @property
    def tail_values(self) -> Tensor:
        """Values of new tokens, [batch, kv_heads, new, value_dim]."""
        return self._tail_of(self._values)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First entry of each head, row by row, in `tensors`, and how many it has."""
        found, start = [], 0
        for length in itertools.chain(*self.lengths):
            found.append((start, length + self.tail))
            start += length + self._room.end
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return sum(self.nbytes_by_head)

    @property
    def nbytes_entry(self) -> int:
        """Bytes of one key and value."""
        return sum(x.shape[-1] * x.element_size() for x in self.tensors)

    @property
    def nbytes_by_head(self) -> list[int]:
        """Bytes of the keys and values of each head, over all rows."""
        new = len(self.lengths) * self.tail
        return [(sum(own) + new) * self.nbytes_entry for own in zip(*self.lengths, strict=True)]

    @property
    def nbytes_index(self) -> int:
        """Bytes of what is stored beside them, and of the room for new ones."""
        beside = (self.packed_positions, self.tail_positions, self.packed_places, *self.columns.values())
        room = sum(x.nbytes for x in self.tensors) - self.nbytes
        return room + sum(x.nbytes for x in beside if x is not None)

    @property
    def kept(self) -> Tensor:
        """Entries kept by each row and head, long [batch, kv_heads]."""
        packed = torch.tensor(self.lengths, device=self.tail_positions.device)
        return packed + (self.tail_positions >= 0).sum(-1)[:, None]

    @property
    def positions(self) -> Tensor:
        """Index of each entry within its row's own text, int32 [batch, kv_heads, width], −1 where there is none."""
        return self._aligner()(self.packed_positions, self._tail_beside(self.tail_positions), -1)

    @property
    def entries(self) -> Entries:
        """All entries, right-aligned; padding in this view only."""
        aligned, places = self._aligner(), self.packed_places
        beside = self._tail_beside(self.tail_positions)
        return Entries(
            aligned(self.packed_keys, self.tail_keys, 0),
            aligned(self.packed_values, self.tail_values, 0),
            aligned(self.packed_positions, beside, -1).long(),
            None if places is None else aligned(places, beside, -1),
            {name: aligned(x, x.new_full(beside.shape, FILL[name]), 0) for name, x in self.columns.items()},
        )

    def _tail_beside(self, x: Tensor) -> Tensor:
        return x[:, None].expand(-1, len(self.lengths[0]), -1)

    def _aligner(self) -> Callable[[Tensor, Tensor, float], Tensor]:
        """Return what puts packed entries [packed, …] right-aligned before a tail [batch, kv_heads, new, …]."""
        counts = torch.tensor(self.lengths)
        width = int(counts.max())
        there = _last_of_each(counts.flatten(), width, self.tail_positions.device)

        def aligned(packed: Tensor, tail: Tensor, fill: float) -> Tensor:
            every = packed.new_full((counts.numel() * width, *packed.shape[1:]), fill).index_copy_(0, there, packed)
            return torch.cat((every.unflatten(0, (*counts.shape, width)), tail.to(packed.dtype)), dim=2)

        return aligned

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, *, padded: bool = False) -> None:
        """Add the entries of new tokens; `positions` is [batch, new]; `padded` if some are padding."""
        self.tail_full = self.tail_full and not padded
        at, new = self.tail, keys.shape[2]
        free = writable(self._keys, keys) and writable(self._values, values)
        if free and self._room.take(at, new):
            index = self._free_places(at, new)
            self._keys.index_copy_(0, index, keys.flatten(0, 2))
            self._values.index_copy_(0, index, values.flatten(0, 2))
        else:
            mean = sum(map(sum, self.lengths)) // (len(self.lengths) * len(self.lengths[0]))
            room = room_for(mean + at, new)
            self._keys = self._with_new(self._keys, keys, room)
            self._values = self._with_new(self._values, values, room)
            self._room = Room(at + new, at + new + room)
            self._first_free = self.plan = None
        self.tail_positions = torch.cat((self.tail_positions, positions.clamp_min(-1).to(torch.int32)), dim=1)

    def _free_places(self, at: int, new: int) -> Tensor:
        """Where the tail goes on, long [batch * kv_heads * new], in `tensors`."""
        if self._first_free is None:
            ends = [start + count - at for start, count in self.spans]
            self._first_free = async_tensor(ends, self._keys.device)
        if new == 1:
            return self._first_free + at
        return (self._first_free[:, None] + torch.arange(at, at + new, device=self._keys.device)).flatten()

    def _with_new(self, x: Tensor, new: Tensor, room: int) -> Tensor:
        """Copy a tensor, new entries [batch, kv_heads, new, …] behind those of each head, and room behind them."""
        space = x.new_zeros(room, x.shape[-1])
        heads = zip(self.spans, new.flatten(0, 1), strict=True)
        return torch.cat([part for (start, n), own in heads for part in (x[start : start + n], own, space)])

    def row_span(self, row: int) -> slice:
        """Return where the packed entries of a row stand."""
        first = sum(sum(own) for own in self.lengths[:row])
        return slice(first, first + sum(self.lengths[row]))

    def keep(self, mask: Tensor) -> None:
        """Drop packed entries; bool [packed], True for those that stay."""
        sizes = list(itertools.chain(*self.lengths))
        counts = [int(part.sum()) for part in mask.split(sizes)]
        heads = len(self.lengths[0])
        lengths = [counts[row : row + heads] for row in range(0, len(counts), heads)]
        self._change(lengths, lambda x: x[mask], lambda x: x)

    def rows(self, index: Tensor) -> None:
        """Keep, reorder or repeat rows of the batch: row j becomes what row index[j] was."""
        chosen = index.tolist()
        sizes = [sum(own) for own in self.lengths]
        own = index.to(self.tail_positions.device)
        self._change(
            [list(self.lengths[row]) for row in chosen],
            lambda x: torch.cat([x.split(sizes)[row] for row in chosen]),
            lambda x: x.index_select(0, own),
        )

    def drop_last(self, tokens: int) -> None:
        """Forget the newest entries, which must be in the tail or packed in every head."""
        entries = self.entries
        width = torch.arange(entries.keys.shape[2], device=entries.keys.device)
        there = (entries.positions >= 0) & (width < len(width) - tokens)
        self._become(RaggedStorage.gather(entries, width.where(there, -1)))

    def copy(self) -> RaggedStorage:
        """Return a storage that shares the tensors."""
        other = copy.copy(self)
        other.columns = dict(self.columns)
        return other

    def _become(self, other: RaggedStorage) -> None:
        # Others know this storage: it stays the same object.
        self.__dict__.update(other.__dict__)

    def _change(
        self, lengths: list[list[int]], packed: Callable[[Tensor], Tensor], tail: Callable[[Tensor], Tensor]
    ) -> None:
        """Change what is packed and the tail, each in all its tensors."""
        places = self.packed_places
        self._become(
            RaggedStorage(
                packed(self.packed_keys),
                packed(self.packed_values),
                packed(self.packed_positions),
                lengths,
                (tail(self.tail_keys), tail(self.tail_values), tail(self.tail_positions)),
                None if places is None else packed(places),
                {name: packed(x) for name, x in self.columns.items()},
            )
        )

    def _packed_of(self, x: Tensor) -> Tensor:
        if not self._room.end:
            return x
        return torch.cat([x[start : start + n - self.tail] for start, n in self.spans])

    def _tail_of(self, x: Tensor) -> Tensor:
        own = torch.stack([x[start + n - self.tail : start + n] for start, n in self.spans])
        return own.unflatten(0, (len(self.lengths), -1))


def store(
    entries: Entries,
    kept: Tensor,
    counts: Tensor | None,
    *,
    ragged: bool,
    earlier: UniformStorage | RaggedStorage | None = None,
) -> UniformStorage | RaggedStorage:
    """Store the kept entries alone.

    Args:
        entries: all of them.
        kept: long [batch, kv_heads, width], ascending, −1 for none.
        counts: how many each row and head keeps, long [batch, kv_heads] on the CPU; None to count them.
        ragged: whether heads may keep different numbers.
        earlier: the storage that the entries are in, which is used again if they can stay in its buffers.

    """
    if ragged:
        return RaggedStorage.gather(entries, kept, counts)
    if type(earlier) is UniformStorage and earlier.keep(entries, kept, counts):
        return earlier
    return UniformStorage.gather(entries, kept, counts)


def _last_of_each(counts: Tensor, width: int, device: torch.device) -> Tensor:
    """Where the last places of each of several lists of one width are, so many as counted: long [sum of counts].

    Args:
        counts: long [lists], on the CPU.
        width: of every list.
        device: of the result, which is not waited for.

    """
    total = int(counts.sum())
    shift = torch.arange(1, len(counts) + 1) * width - counts.cumsum(0)
    shift, counts = (x.to(device, non_blocking=True) for x in (shift, counts))
    return torch.arange(total, device=device) + shift.repeat_interleave(counts, output_size=total)
