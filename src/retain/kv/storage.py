"""Storage of kept keys and values: one small interface, and its form for heads of equal length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

# What an entry that was just appended gets in a column beside keys and values; NaN: nothing was claimed yet.
FILL = {"received": 0.0, "claim": float("nan")}


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
        """Bytes of positions and all else that is stored beside keys and values."""
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

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Add the entries of new tokens; `positions` is [batch, new]."""
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

    A row that keeps fewer entries than the widest has zeros in its first places. Tensors are replaced, never
    written to, so that copies may share them.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        places: Tensor | None = None,
        columns: dict[str, Tensor] | None = None,
    ) -> None:
        self.keys, self.values = keys, values
        self.positions = positions  # int32 [batch, kv_heads, width]
        self.places = places  # int32, as positions
        self.columns = columns or {}

    @classmethod
    def all(cls, entries: Entries) -> UniformStorage:
        """Store all entries as they are."""
        positions = entries.positions.clamp_min(-1).to(torch.int32).expand(entries.keys.shape[:3])
        return cls(entries.keys, entries.values, positions, entries.places, entries.columns)

    @classmethod
    def gather(cls, entries: Entries, kept: Tensor) -> UniformStorage:
        """Copy the kept entries out of all of them, so that those can be freed.

        Args:
            entries: all of them.
            kept: long [batch, kv_heads, width], ascending, −1 for none.

        """
        empty = kept < 0
        uneven = bool(empty.any())
        index = kept.clamp_min(0) if uneven else kept
        keys, values = (_pick(x, index) for x in (entries.keys, entries.values))
        if uneven:
            keys, values = (x.masked_fill_(empty[..., None], 0) for x in (keys, values))

        def beside(x: Tensor, fill: float) -> Tensor:
            own = x.expand(-1, kept.shape[1], -1).gather(2, index)
            return own.masked_fill(empty, fill) if uneven else own

        return cls(
            keys,
            values,
            beside(entries.positions, -1).to(torch.int32),
            None if entries.places is None else beside(entries.places, -1).to(torch.int32),
            {name: beside(x, 0) for name, x in entries.columns.items()},
        )

    @property
    def width(self) -> int:
        """Entries stored for every row and head."""
        return self.keys.shape[2]

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
        """Bytes of what is stored beside them."""
        places = 0 if self.places is None else self.places.nbytes
        return self.positions.nbytes + places + sum(x.nbytes for x in self.columns.values())

    @property
    def kept(self) -> Tensor:
        """Entries kept by each row and head, long [batch, kv_heads]."""
        return (self.positions >= 0).sum(-1)

    @property
    def valid(self) -> Tensor:
        """Bool [batch, width]: False in the empty places of short rows; the same for every head."""
        return self.positions[:, 0] >= 0

    @property
    def entries(self) -> Entries:
        """All entries, as they are stored."""
        return Entries(self.keys, self.values, self.positions.long(), self.places, dict(self.columns))

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Add the entries of new tokens; `positions` is [batch, new]."""
        self.keys = torch.cat((self.keys, keys), dim=2)
        self.values = torch.cat((self.values, values), dim=2)
        new = positions.clamp_min(-1).to(torch.int32)[:, None].expand(-1, keys.shape[1], -1)
        self.positions = torch.cat((self.positions, new), dim=2)
        if self.places is not None:
            self.places = torch.cat((self.places, new), dim=2)
        for name, x in self.columns.items():
            self.columns[name] = torch.cat((x, x.new_full(new.shape, FILL[name])), dim=2)

    def rows(self, index: Tensor) -> None:
        """Keep, reorder or repeat rows of the batch: row j becomes what row index[j] was."""
        index = index.to(self.keys.device)
        self._each(lambda x: x.index_select(0, index))

    def drop_last(self, tokens: int) -> None:
        """Forget the newest entries."""
        self._each(lambda x: x[:, :, :-tokens])

    def copy(self) -> UniformStorage:
        """Return a storage that shares the tensors, which neither writes to."""
        return UniformStorage(self.keys, self.values, self.positions, self.places, dict(self.columns))

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values, self.positions = change(self.keys), change(self.values), change(self.positions)
        self.places = None if self.places is None else change(self.places)
        self.columns = {name: change(x) for name, x in self.columns.items()}


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
