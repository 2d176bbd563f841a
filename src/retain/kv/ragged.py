"""Storage for heads of unequal length, without padding, and the attention over it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retain.kv.kernels import usable
from retain.kv.storage import FILL, Entries, pick_vectors, vector_numbers

if TYPE_CHECKING:
    from retain.kv.kernels.decoding import Plan

_TAIL = 256  # new tokens that are kept beside the packed entries before they are packed too


class RaggedStorage:
    """Keys and values of heads of unequal length, packed one head after the other; new tokens stand beside them.

    Head h of row b holds `lengths[b][h]` packed entries and all entries of the tail. Tensors are replaced, never
    written to, so that copies may share them.

    Args:
        keys: [packed, dim].
        values: [packed, value_dim].
        positions: int32 [packed].
        lengths: packed entries of each row and head.
        tail: keys, values [batch, kv_heads, new, …] and positions int32 [batch, new] of new tokens.
        places: int32 [packed], where the rotary embedding puts the keys; None for `positions`.
        columns: further numbers of the packed entries by name, float32 [packed].

    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        lengths: list[list[int]],
        tail: tuple[Tensor, Tensor, Tensor],
        places: Tensor | None = None,
        columns: dict[str, Tensor] | None = None,
    ) -> None:
        self.packed_keys, self.packed_values, self.packed_positions = keys, values, positions
        self.lengths = lengths
        self.tail_keys, self.tail_values, self.tail_positions = tail
        self.packed_places = places
        self.columns = columns or {}
        self.plan: tuple[list[list[int]], Plan] | None = None  # of a kernel, and the lengths that it is for

    @classmethod
    def gather(cls, entries: Entries, kept: Tensor) -> RaggedStorage:
        """Copy the kept entries out of all of them, so that those can be freed.

        Args:
            entries: all of them.
            kept: long [batch, kv_heads, width], ascending, −1 for none.

        """
        there = kept >= 0
        index = kept.clamp_min(0)

        def beside(x: Tensor) -> Tensor:
            return x.expand(-1, kept.shape[1], -1).gather(2, index)[there]

        keys, values = (pick_vectors(x, vector_numbers(x, index)[there]) for x in (entries.keys, entries.values))
        no_keys, no_values = (x[:, :, :0].clone() for x in (entries.keys, entries.values))
        return cls(
            keys,
            values,
            beside(entries.positions).to(torch.int32),
            there.sum(-1).tolist(),
            (no_keys, no_values, entries.positions.new_empty((kept.shape[0], 0), dtype=torch.int32)),
            None if entries.places is None else beside(entries.places).to(torch.int32),
            {name: beside(x) for name, x in entries.columns.items()},
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Packed keys and values, and those of the tail."""
        return self.packed_keys, self.packed_values, self.tail_keys, self.tail_values

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return sum(x.nbytes for x in self.tensors)

    @property
    def nbytes_entry(self) -> int:
        """Bytes of one key and value."""
        return sum(x.shape[-1] * x.element_size() for x in self.tensors[:2])

    @property
    def nbytes_by_head(self) -> list[int]:
        """Bytes of the keys and values of each head, over all rows."""
        new = len(self.lengths) * self.tail_keys.shape[2]
        return [(sum(own) + new) * self.nbytes_entry for own in zip(*self.lengths, strict=True)]

    @property
    def nbytes_index(self) -> int:
        """Bytes of what is stored beside them."""
        places = 0 if self.packed_places is None else self.packed_places.nbytes
        columns = sum(x.nbytes for x in self.columns.values())
        return self.packed_positions.nbytes + self.tail_positions.nbytes + places + columns

    @property
    def kept(self) -> Tensor:
        """Entries kept by each row and head, long [batch, kv_heads]."""
        packed = torch.tensor(self.lengths, device=self.tail_positions.device)
        return packed + (self.tail_positions >= 0).sum(-1)[:, None]

    @property
    def positions(self) -> Tensor:
        """Index of each entry within its row's own text, int32 [batch, kv_heads, width], −1 where there is none."""
        return self._aligned(self.packed_positions, self._tail_beside(self.tail_positions), -1)

    @property
    def entries(self) -> Entries:
        """All entries, right-aligned; padding in this view only."""
        places = self.packed_places
        beside = self._tail_beside(self.tail_positions)
        return Entries(
            self._aligned(self.packed_keys, self.tail_keys, 0),
            self._aligned(self.packed_values, self.tail_values, 0),
            self.positions.long(),
            None if places is None else self._aligned(places, beside, -1),
            {name: self._aligned(x, x.new_full(beside.shape, FILL[name]), 0) for name, x in self.columns.items()},
        )

    def _tail_beside(self, x: Tensor) -> Tensor:
        return x[:, None].expand(-1, self.tail_keys.shape[1], -1)

    def _aligned(self, packed: Tensor, tail: Tensor, fill: float) -> Tensor:
        """Packed entries [packed, …] right-aligned before the tail [batch, kv_heads, new, …]."""
        width = max(itertools.chain(*self.lengths))
        lengths = torch.tensor(self.lengths, device=packed.device)
        there = torch.arange(width, device=packed.device) >= width - lengths[..., None]
        aligned = packed.new_full((*there.shape, *packed.shape[1:]), fill)
        aligned[there] = packed
        return torch.cat((aligned, tail.to(packed.dtype)), dim=2)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Add the entries of new tokens; `positions` is [batch, new]."""
        self.tail_keys = torch.cat((self.tail_keys, keys), dim=2)
        self.tail_values = torch.cat((self.tail_values, values), dim=2)
        new = positions.clamp_min(-1).to(torch.int32)
        self.tail_positions = torch.cat((self.tail_positions, new), dim=1)

    def settle(self) -> None:
        """Pack the tail where it has grown long, so that the next tokens need not copy it again and again."""
        if self.tail_keys.shape[2] < _TAIL:
            return
        entries = self.entries
        width = torch.arange(entries.keys.shape[2], device=entries.keys.device)
        self._become(RaggedStorage.gather(entries, width.where(entries.positions >= 0, -1)))

    def row_span(self, row: int) -> slice:
        """Return where the packed entries of a row stand."""
        first = sum(sum(own) for own in self.lengths[:row])
        return slice(first, first + sum(self.lengths[row]))

    def keep(self, mask: Tensor) -> None:
        """Drop packed entries; bool [packed], True for those that stay."""
        sizes = list(itertools.chain(*self.lengths))
        counts = [int(part.sum()) for part in mask.split(sizes)]
        heads = len(self.lengths[0])
        self._packed(lambda x: x[mask])
        self.lengths = [counts[row : row + heads] for row in range(0, len(counts), heads)]

    def rows(self, index: Tensor) -> None:
        """Keep, reorder or repeat rows of the batch: row j becomes what row index[j] was."""
        chosen = index.tolist()
        sizes = [sum(own) for own in self.lengths]
        self._packed(lambda x: torch.cat([x.split(sizes)[row] for row in chosen]))
        self.lengths = [list(self.lengths[row]) for row in chosen]
        own = index.to(self.tail_keys.device)
        self.tail_keys, self.tail_values, self.tail_positions = (
            x.index_select(0, own) for x in (self.tail_keys, self.tail_values, self.tail_positions)
        )

    def drop_last(self, tokens: int) -> None:
        """Forget the newest entries, which must be in the tail or packed in every head."""
        entries = self.entries
        width = torch.arange(entries.keys.shape[2], device=entries.keys.device)
        there = (entries.positions >= 0) & (width < len(width) - tokens)
        self._become(RaggedStorage.gather(entries, width.where(there, -1)))

    def copy(self) -> RaggedStorage:
        """Return a storage that shares the tensors, which neither writes to."""
        tail = (self.tail_keys, self.tail_values, self.tail_positions)
        lengths = [list(row) for row in self.lengths]
        packed = (self.packed_keys, self.packed_values, self.packed_positions)
        return RaggedStorage(*packed, lengths, tail, self.packed_places, dict(self.columns))

    def _become(self, other: RaggedStorage) -> None:
        self.__dict__.update(other.__dict__)

    def _packed(self, change: Callable[[Tensor], Tensor]) -> None:
        self.packed_keys, self.packed_values = change(self.packed_keys), change(self.packed_values)
        self.packed_positions = change(self.packed_positions)
        self.packed_places = None if self.packed_places is None else change(self.packed_places)
        self.columns = {name: change(x) for name, x in self.columns.items()}


def attend(
    query: Tensor,
    storage: RaggedStorage,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Exact attention of new tokens over a ragged storage that already holds them in its tail.

    Args:
        query: [batch, heads, new, dim], of the newest tokens.
        storage: what they read.
        mask: bool [batch, 1, new, new], what each new token may read of the new ones; None for all before it.
        scaling: factor on the query-key product.

    Returns:
        [batch, new, heads, value_dim].

    """
    new, tail = query.shape[2], storage.tail_keys.shape[2]
    if new == 1 and usable(query, *storage.tensors):
        # What the mask says of one token, its position says too.
        return _decode(query, storage, scaling)
    if mask is None and new > 1:
        mask = torch.ones(new, new, dtype=torch.bool, device=query.device).tril_()[None, None]
    earlier = storage.tail_positions >= 0
    hidden: Tensor | None = None  # bool [batch, 1, new, tail], what may not be read
    if mask is not None or not bool(earlier.all()):
        before = earlier[:, None, None, : tail - new].expand(-1, 1, new, -1)
        latest = torch.ones_like(before[..., :1]).expand(-1, 1, new, new) if mask is None else mask
        hidden = ~torch.cat((before, latest.expand(before.shape[0], -1, -1, -1)), dim=-1)
    work = _one_by_one if new > 1 else _together
    return work(query, storage, hidden, scaling)


def _decode(query: Tensor, storage: RaggedStorage, scaling: float) -> Tensor:
    """One kernel for all heads, split along their keys. For one new token on a GPU."""
    from retain.kv.kernels.decoding import Plan, decode

    if storage.plan is None or storage.plan[0] is not storage.lengths:
        storage.plan = (storage.lengths, Plan.of(storage.lengths, query.device))
    tail = (storage.tail_keys, storage.tail_values, storage.tail_positions)
    packed = (storage.packed_keys, storage.packed_values)
    return decode(query[:, :, 0], packed, tail, storage.plan[1], scaling)[:, None]


def _together(query: Tensor, storage: RaggedStorage, hidden: Tensor | None, scaling: float) -> Tensor:
    """All heads in one softmax: two products for each head, everything else once. For one new token."""
    batch, heads, new, _ = query.shape
    kv_heads, tail = storage.tail_keys.shape[1:3]
    grouped = query.reshape(batch, kv_heads, -1, query.shape[-1])  # [batch, kv_heads, group * new, dim]
    width = max(itertools.chain(*storage.lengths))
    logits = query.new_full((*grouped.shape[:3], width + tail), float("-inf"), dtype=torch.float32)
    segments = _segments(storage)
    for row, head, keys, _ in segments:
        logits[row, head, :, : keys.shape[0]] = grouped[row, head] @ keys.mT
    own = (grouped @ storage.tail_keys.mT).float()
    if hidden is not None:
        own.unflatten(2, (-1, new)).masked_fill_(hidden[:, :, None], float("-inf"))
    logits[..., width:] = own
    weights = logits.mul_(scaling).softmax(-1).to(query.dtype)
    out = weights[..., width:] @ storage.tail_values
    for row, head, keys, values in segments:
        out[row, head] += weights[row, head, :, : keys.shape[0]] @ values
    return out.view(batch, heads, new, -1).transpose(1, 2)


def _one_by_one(query: Tensor, storage: RaggedStorage, hidden: Tensor | None, scaling: float) -> Tensor:
    """Torch's own attention, one KV head after the other. For a chunk of new tokens."""
    batch, heads, new, _ = query.shape
    group = heads // storage.tail_keys.shape[1]
    out = query.new_empty(batch, heads, new, storage.tail_values.shape[-1])
    for row, head, keys, values in _segments(storage):
        all_keys = torch.cat((keys, storage.tail_keys[row, head]))
        all_values = torch.cat((values, storage.tail_values[row, head]))
        own = slice(head * group, (head + 1) * group)
        bias: Any = None
        if hidden is not None:
            seen = torch.ones(new, keys.shape[0], dtype=torch.bool, device=query.device)
            bias = torch.cat((seen, ~hidden[row, 0]), dim=-1)
        out[row, own] = torch.nn.functional.scaled_dot_product_attention(
            query[row, own],
            all_keys.expand(group, -1, -1),
            all_values.expand(group, -1, -1),
            attn_mask=bias,
            scale=scaling,
        )
    return out.transpose(1, 2)


def _segments(storage: RaggedStorage) -> list[tuple[int, int, Tensor, Tensor]]:
    """Row, head, packed keys and values of each head."""
    sizes = list(itertools.chain(*storage.lengths))
    keys, values = storage.packed_keys.split(sizes), storage.packed_values.split(sizes)
    heads = len(storage.lengths[0])
    return [(n // heads, n % heads, k, v) for n, (k, v) in enumerate(zip(keys, values, strict=True))]
