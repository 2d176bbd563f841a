"""Storage of kept keys and values: one small interface, and its form for heads of equal length."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from suffice.kv.kernels import usable
from suffice.kv.storage.growth import Room, room_for, writable

# What an entry that was just appended gets in a column beside keys and values; NaN: nothing was claimed yet.
FILL = {"received": 0.0, "claim": float("nan")}
_NAMES = ("keys", "values", "positions", "places")  # what a storage holds beside columns


@dataclass
class Entries:
    """Entries of all rows and heads side by side, right-aligned: what policies look at and storages are made from.

    Args:
        keys: [batch, kv_heads, width, dim].
        values: [batch, kv_heads, width, value_dim].
        positions: index of each entry within its row's own text, [batch, 1 or kv_heads, width], negative for none.
        places: where the rotary embedding of the keys puts them, [batch, kv_heads, width]; None for `positions`.
        columns: further numbers of each entry by name, float32 [batch, kv_heads, width].

    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    places: Tensor | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)


class Storage(Protocol):
    """What a cache layer needs of the place where kept entries live."""

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        ...

    @property
    def nbytes_by_head(self) -> list[int]:
        """Bytes of the keys and values of each head, over all rows."""
        ...

    @property
    def nbytes_entry(self) -> int:
        """Bytes of one key and value."""
        ...

    @property
    def nbytes_index(self) -> int:
        """Bytes of all else: positions, columns, room for new entries."""
        ...

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that hold keys and values."""
        ...

    @property
    def kept(self) -> Tensor:
        """Entries kept by each row and head, long [batch, kv_heads]."""
        ...

    @property
    def positions(self) -> Tensor:
        """Index of each entry within its row's own text, int32 [batch, kv_heads, width], −1 where there is none."""
        ...

    @property
    def entries(self) -> Entries:
        """All entries, right-aligned."""
        ...

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, *, padded: bool = False) -> None:
        """Add the entries of new tokens; `positions` is [batch, new]; `padded` if some are padding."""
        ...

    def rows(self, index: Tensor) -> None:
        """Keep, reorder or repeat rows of the batch: row j becomes what row index[j] was."""
        ...

    def drop_last(self, tokens: int) -> None:
        """Forget the newest entries of every row and head."""
        ...

    def copy(self) -> Storage:
        """Return a storage of the same entries; what is done to one does not show in the other."""
        ...


class UniformStorage:
    """Keys and values of heads of equal length: [batch, kv_heads, width, dim], right-aligned in each row.

    A row that keeps fewer entries than the widest has zeros in its first places. Copies share tensors: what one of
    them holds is never written to, new entries go into the room behind.

    Args:
        keys: [batch, kv_heads, width, dim].
        values: [batch, kv_heads, width, value_dim].
        positions: int32 [batch, kv_heads, width].
        places: int32, as positions.
        columns: float32, as positions.

    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        places: Tensor | None = None,
        columns: dict[str, Tensor] | None = None,
    ) -> None:
        self.width = positions.shape[2]  # entries stored for every row and head
        self._parts = {"keys": keys, "values": values, "positions": positions, **(columns or {})}
        if places is not None:
            self._parts["places"] = places
        self._room = Room(self.width)
        self._full: bool | None = None  # what `full` says; None until it is asked

    @classmethod
    def all(cls, entries: Entries, *, padded: bool = True) -> UniformStorage:
        """Store all entries as they are; `padded` if some may be empty places."""
        positions = entries.positions.clamp_min(-1).to(torch.int32).expand(entries.keys.shape[:3])
        stored = cls(entries.keys, entries.values, positions, entries.places, entries.columns)
        stored._full = None if padded else True
        return stored

    @classmethod
    def gather(cls, entries: Entries, kept: Tensor, counts: Tensor | None = None) -> UniformStorage:
        """Copy the kept entries out of all of them, so that those can be freed.

        Args:
            entries: all of them.
            kept: long [batch, kv_heads, width], ascending, −1 for none.
            counts: how many each row and head keeps, long [batch, kv_heads] on the CPU; None to count them.

        """
        empty = kept < 0
        uneven = bool(empty.any()) if counts is None else int(counts.min()) < kept.shape[2]
        index = kept.clamp_min(0) if uneven else kept
        keys, values = (_pick(x, index) for x in (entries.keys, entries.values))
        if uneven:
            keys, values = (x.masked_fill_(empty[..., None], 0) for x in (keys, values))
        beside = _pick_beside(entries, index, empty if uneven else None)
        stored = cls(keys, values, beside.pop("positions"), beside.pop("places", None), beside)
        if counts is not None:
            stored._full = not uneven
        return stored

    def _stored(self, name: str) -> Tensor:
        part = self._parts[name]
        return part if part.shape[2] == self.width else part[:, :, : self.width]

    @property
    def keys(self) -> Tensor:
        """Keys [batch, kv_heads, width, dim]."""
        return self._stored("keys")

    @property
    def values(self) -> Tensor:
        """Values [batch, kv_heads, width, value_dim]."""
        return self._stored("values")

    @property
    def positions(self) -> Tensor:
        """Index of each entry within its row's own text, int32 [batch, kv_heads, width], −1 where there is none."""
        return self._stored("positions")

    @property
    def places(self) -> Tensor | None:
        """Where the rotary embedding puts the keys, int32 [batch, kv_heads, width]; None for `positions`."""
        return self._stored("places") if "places" in self._parts else None

    @property
    def columns(self) -> dict[str, Tensor]:
        """Further numbers of each entry, float32 [batch, kv_heads, width]."""
        return {name: self._stored(name) for name in self._parts if name not in _NAMES}

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def nbytes_by_head(self) -> list[int]:
        """Bytes of the keys and values of each head, over all rows."""
        heads = self.keys.shape[1]
        return [self.nbytes // heads] * heads

    @property
    def nbytes_entry(self) -> int:
        """Bytes of one key and value."""
        return sum(x.shape[-1] * x.element_size() for x in self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Keys and values."""
        return self.keys, self.values

    @property
    def nbytes_index(self) -> int:
        """Bytes of what is stored beside them, and of the room for new ones."""
        entries = sum(self._stored(name).nbytes for name in ("keys", "values") if name in self._parts)
        return sum(part.nbytes for part in self._parts.values()) - entries

    @property
    def kept(self) -> Tensor:
        """Entries kept by each row and head, long [batch, kv_heads]."""
        return (self.positions >= 0).sum(-1)

    @property
    def valid(self) -> Tensor:
        """Bool [batch, width]: False in the empty places of short rows; the same for every head."""
        return self.positions[:, 0] >= 0

    @property
    def full(self) -> bool:
        """Whether no row has an empty place; remembered, since a GPU waits to be read."""
        if self._full is None:
            self._full = bool(self.valid.all())
        return self._full

    @property
    def entries(self) -> Entries:
        """All entries, as they are stored."""
        return Entries(self.keys, self.values, self.positions.long(), self.places, self.columns)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, *, padded: bool = False) -> None:
        """Add the entries of new tokens; `positions` is [batch, new]; `padded` if some are padding."""
        self._add({"keys": keys, "values": values}, positions, padded)

    def _add(self, entries: dict[str, Tensor], positions: Tensor, padded: bool) -> None:
        """Add new tokens: what belongs into the parts that hold entries, and positions [batch, new]."""
        new = positions.shape[1]
        if padded:
            self._full = False
        beside = positions.clamp_min(-1).to(torch.int32)[:, None].expand(-1, self.positions.shape[1], -1)
        added = {**entries, "positions": beside, "places": beside}
        for name in self.columns:
            added[name] = beside.new_full(beside.shape, FILL[name], dtype=torch.float32)
        free = all(writable(part, added[name]) for name, part in self._parts.items())
        if free and self._room.take(self.width, new):
            for name, part in self._parts.items():
                part[:, :, self.width : self.width + new] = added[name]
        else:
            room = room_for(self.width, new)
            # One after the other, so that only one of them is there twice.
            for name in self._parts:
                old = self._stored(name)
                space = old.new_zeros(*old.shape[:2], room, *old.shape[3:])
                self._parts[name] = torch.cat((old, added[name], space), dim=2)
            self._room = Room(self.width + new, self.width + new + room)
        self.width += new

    def keep(self, entries: Entries, kept: Tensor, counts: Tensor | None) -> bool:
        """Forget all but the kept entries, which move to the front of the buffers that they are in.

        The buffers stay, so that what comes next finds room and nothing is copied or allocated for it again.

        Args:
            entries: those of `entries`, columns as they are to be.
            kept: long [batch, kv_heads, width], ascending.
            counts: how many each row and head keeps, long [batch, kv_heads] on the CPU; None if they were not counted.

        Returns:
            Whether it was done: by a kernel alone, only where all keep as many, and not if somebody else has the
            buffers too.

        """
        keys, values = self._parts["keys"], self._parts["values"]
        width, end = kept.shape[2], keys.shape[2]
        even = counts is not None and int(counts.min()) == width
        if self._room.shared or not (even and usable(keys, values) and writable(keys, values)):
            return False
        from suffice.kv.kernels.compaction import move_to_front

        for x in (keys, values):
            move_to_front(x, kept)
        for name, x in _pick_beside(entries, kept).items():
            self._parts[name] = torch.nn.functional.pad(x, (0, end - width))
        self.width, self._room, self._full = width, Room(width, end), True
        return True

    def rows(self, index: Tensor) -> None:
        """Keep, reorder or repeat rows of the batch: row j becomes what row index[j] was."""
        index = index.to(self.positions.device)
        for name in self._parts:
            self._parts[name] = self._stored(name).index_select(0, index)
        self._room = Room(self.width)
        self._full = None

    def drop_last(self, tokens: int) -> None:
        """Forget the newest entries."""
        self.width -= tokens
        self._full = None

    def copy(self) -> UniformStorage:
        """Return a storage that shares the tensors."""
        self._room.shared = True
        other = copy.copy(self)
        other._parts = dict(self._parts)
        return other


def _pick_beside(entries: Entries, index: Tensor, empty: Tensor | None = None) -> dict[str, Tensor]:
    """Gather what stands beside keys and values: positions, places if there are any, columns.

    Args:
        entries: all of them.
        index: long [batch, kv_heads, width].
        empty: bool, as index, where no entry is to be; None for nowhere.

    """
    beside = {"positions": entries.positions, "places": entries.places, **entries.columns}
    found: dict[str, Tensor] = {}
    for name, x in beside.items():
        if x is None:
            continue
        own = x.expand(-1, index.shape[1], -1).gather(2, index)
        whole = name in _NAMES
        own = own if empty is None else own.masked_fill(empty, -1 if whole else 0)
        found[name] = own.to(torch.int32) if whole else own
    return found


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Gather whole vectors: x [batch, heads, tokens, dim], index [batch, heads, width]; a new tensor."""
    return pick_vectors(x, vector_numbers(x, index).flatten()).unflatten(0, index.shape)


def vector_numbers(x: Tensor, index: Tensor) -> Tensor:
    """Return the number of each indexed vector among all of x, in the order in which memory holds them.

    Args:
        x: [batch, heads, tokens, dim].
        index: long [batch, heads, width], of tokens.

    """
    batch, heads, tokens, _ = x.shape
    first = torch.arange(batch * heads, device=x.device).view(batch, heads, 1)
    if _tokens_first(x):
        row, head = first // heads, first % heads
        return index * heads + (row * tokens * heads + head)
    return index + first * tokens


def pick_vectors(x: Tensor, numbers: Tensor) -> Tensor:
    """Copy vectors of x by their number, [m, dim]: several times faster than `gather`.

    Most models store the values tokens before heads; they are not copied into another order first.
    """
    return (x.transpose(1, 2) if _tokens_first(x) else x).flatten(0, 2).index_select(0, numbers)


def _tokens_first(x: Tensor) -> bool:
    return not x.is_contiguous() and x.transpose(1, 2).is_contiguous()


def all_finite(storage: Storage) -> Tensor:
    """Whether no key or value is NaN or Inf, a bool of no dimensions.

    What is evicted has reached every later layer, where this finds it.
    """
    return torch.stack([x.sum(dtype=torch.float32) for x in storage.tensors]).sum().isfinite()
