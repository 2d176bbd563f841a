"""Storage of kept keys and values: one small interface, and its form for heads of equal length."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Storage(Protocol):
    """What a cache layer needs of the place where kept entries live."""

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        ...

    @property
    def kept(self) -> Tensor:
        """Entries kept by each row and head, long [batch, kv_heads]."""
        ...

    @property
    def positions(self) -> Tensor:
        """Index of each entry within its row's own text, int32, −1 where there is none."""
        ...

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Add the entries of new tokens."""
        ...

    def rows(self, index: Tensor) -> None:
        """Keep, reorder or repeat rows of the batch."""
        ...


class UniformStorage:
    """Keys and values of heads of equal length: [batch, kv_heads, width, dim], right-aligned in each row.

    A row that keeps fewer entries than the widest has zeros in its first places.
    """

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.keys, self.values = keys, values
        self.positions = positions  # int32 [batch, kv_heads, width]

    @classmethod
    def gather(cls, keys: Tensor, values: Tensor, kept: Tensor, positions: Tensor) -> UniformStorage:
        """Copy the kept entries out of full keys and values, so that the full ones can be freed.

        Args:
            keys: [batch, kv_heads, tokens, dim].
            values: [batch, kv_heads, tokens, value_dim].
            kept: long [batch, kv_heads, width], −1 for none.
            positions: long [batch, tokens], index of each token within its row's text.

        """
        empty = kept < 0
        uneven = bool(empty.any())
        index = kept.clamp_min(0) if uneven else kept
        # A row's first token lies at minus its position at the first column.
        own = (index + positions[:, :1, None]).to(torch.int32)
        stored = [_pick(x, index) for x in (keys, values)]
        if uneven:
            stored = [x.masked_fill_(empty[..., None], 0) for x in stored]
            own = own.masked_fill(empty, -1)
        return cls(stored[0], stored[1], own)

    @property
    def width(self) -> int:
        """Entries stored for every row and head."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def kept(self) -> Tensor:
        """Entries kept by each row and head, long [batch, kv_heads]."""
        return (self.positions >= 0).sum(-1)

    @property
    def valid(self) -> Tensor:
        """Bool [batch, width]: False in the empty places of short rows; the same for every head."""
        return self.positions[:, 0] >= 0

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Add the entries of new tokens; `positions` is [batch, new]."""
        self.keys = torch.cat((self.keys, keys), dim=2)
        self.values = torch.cat((self.values, values), dim=2)
        new = positions.to(torch.int32)[:, None].expand(-1, keys.shape[1], -1)
        self.positions = torch.cat((self.positions, new), dim=2)

    def rows(self, index: Tensor) -> None:
        """Keep, reorder or repeat rows of the batch: row j becomes what row index[j] was."""
        index = index.to(self.keys.device)
        self.keys = self.keys.index_select(0, index)
        self.values = self.values.index_select(0, index)
        self.positions = self.positions.index_select(0, index)

    def drop_last(self, tokens: int) -> None:
        """Forget the newest entries."""
        self.keys, self.values = self.keys[:, :, :-tokens], self.values[:, :, :-tokens]
        self.positions = self.positions[:, :, :-tokens]


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Gather whole vectors: x [batch, heads, tokens, dim], index [batch, heads, width]; a new tensor."""
    # By their number among all vectors, in whichever order memory holds them: several times faster than
    # `gather`, and without a copy of values, which most models store tokens before heads.
    batch, heads, tokens, _ = x.shape
    tokens_first = not x.is_contiguous() and x.transpose(1, 2).is_contiguous()
    first = torch.arange(batch * heads, device=x.device).view(batch, heads, 1)
    if tokens_first:
        row, head = first // heads, first % heads
        return _vectors(x.transpose(1, 2), index * heads + (row * tokens * heads + head))
    return _vectors(x, index + first * tokens)


def _vectors(x: Tensor, number: Tensor) -> Tensor:
    """Return vectors of a contiguous tensor [..., dim] by their number, [*number.shape, dim]."""
    return x.flatten(0, 2).index_select(0, number.flatten()).unflatten(0, number.shape)
