"""Storage for heads of equal length."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from suffice.kv.attention.call import AttentionCall, run_attention
from suffice.kv.attention.masks import MaskFormat, additive_mask, mask_format, readable_entries
from suffice.kv.attention.softmax import attend_with_sinks
from suffice.kv.backend.torch_backend import TorchBackend
from suffice.kv.kernels import usable
from suffice.kv.storage.attention_weights import weights_over_entries
from suffice.kv.storage.base import (
    LOGIT_BIAS,
    NEW_COLUMN_VALUES,
    Entries,
    SpareSlots,
    Storage,
    can_write_in_place,
    gather_index_columns,
    gather_vectors,
    num_spare_slots,
    pack_columns,
    unpack_columns,
)

_POSITIONS = ("positions", "rope_positions")

_PACKED = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_INDEX_OPTIONS = frozenset(("sliding_window", *_PACKED))
"""Options that FlashAttention applies to the indices of entries: a window, and the ends of texts that are packed."""


class AlignedStorage(Storage):
    """Base class of storages whose heads all have the same length. Entries are right-aligned in each row.

    A row that keeps fewer entries than the longest one starts with empty slots. This class holds the index of
    the entries (positions and columns); a subclass holds keys and values.

    Args:
        index: tensors [batch, num_key_value_heads, width, ...] by name; int32 `positions` are required.
        is_full: whether no row has empty slots; None if it is not known.

    """

    def __init__(self, index: dict[str, Tensor], is_full: bool | None = None) -> None:
        self.width = index["positions"].shape[2]  # number of slots of every row and head that hold entries
        self._parts = index
        self._spare = SpareSlots(self.width)
        self._is_full = is_full

    def _stored(self, name: str) -> Tensor:
        part = self._parts[name]
        return part if part.shape[2] == self.width else part[:, :, : self.width]

    @property
    def positions(self) -> Tensor:
        """Index of each entry within its row's text, int32 [batch, num_key_value_heads, width]; −1 in empty slots."""
        return self._stored("positions")

    @property
    def rope_positions(self) -> Tensor | None:
        """Positions by which the keys were rotated, shaped like `positions`; None if they equal `positions`."""
        return self._stored("rope_positions") if "rope_positions" in self._parts else None

    @property
    def columns(self) -> dict[str, Tensor]:
        """Additional numbers of each entry by name, float32 [batch, num_key_value_heads, width]."""
        return {name: self._stored(name) for name in self._parts if name in NEW_COLUMN_VALUES}

    @property
    def entries(self) -> Entries:
        """All entries, as they are stored."""
        return Entries(self.keys, self.values, self.positions.long(), self.rope_positions, self.columns)

    @property
    def num_kept(self) -> Tensor:
        """Number of entries of each row and head, long [batch, num_key_value_heads]."""
        return (self.positions >= 0).sum(-1)

    @property
    def max_length(self) -> int:
        """Number of slots of every row and head."""
        return self.width

    @property
    def nbytes_by_head(self) -> list[int]:
        """Bytes of the keys and values of each head, over all rows."""
        heads = self.positions.shape[1]
        return [self.nbytes // heads] * heads

    @property
    def valid(self) -> Tensor:
        """Bool [batch, width], False in the empty slots of short rows; the same for every head."""
        return self.positions[:, 0] >= 0

    @property
    def is_full(self) -> bool:
        """Whether no row has empty slots. The result is stored, because reading it synchronizes with the GPU."""
        if self._is_full is None:
            self._is_full = bool(self.valid.all())
        return self._is_full

    def attend(self, call: AttentionCall, backend: TorchBackend) -> tuple[Tensor, Tensor | None]:
        """Compute the attention of new tokens over all entries, with the model's own implementation."""
        bias = self.columns.get(LOGIT_BIAS)
        if bias is None:
            return self.attend_to(call, self.keys, self.values)
        return self._attend_with_bias(call, bias)

    def _attend_with_bias(self, call: AttentionCall, bias: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the attention of new tokens in plain torch, as not every implementation has a bias for each head."""
        scaling = call.scaling or call.query.shape[-1] ** -0.5
        new, heads = call.query.shape[2], self.num_heads
        readable = readable_entries(self.positions, call.dense_mask, new)
        output = attend_with_sinks(
            call.query.unflatten(1, (heads, -1)),
            self.keys[:, :, None],
            self.values[:, :, None],
            readable[:, :, None],
            bias=bias[:, :, None, None],
            scaling=scaling,
            softcap=call.softcap,
            sink_logits=None if call.sink_logits is None else call.sink_logits.view(heads, -1, 1, 1),
        )
        weights = weights_over_entries(call, self.entries, scaling) if call.needs_weights else None
        return output.flatten(1, 2).transpose(1, 2).contiguous(), weights

    def attend_to(self, call: AttentionCall, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the attention of new tokens, with keys and values that a model makes of the entries.

        Args:
            call: the attention call.
            keys: [batch, any heads, width, head_dim].
            values: [batch, any heads, width, value_dim].

        """
        return attend_with_model(call, keys, values, None if self.is_full else self.valid)

    def _append_parts(self, new_parts: dict[str, Tensor], positions: Tensor, padded: bool) -> None:
        """Append new tokens: their positions [batch, new], and their keys and values if this class stores them."""
        new = positions.shape[1]
        if padded:
            self._is_full = False
        new_positions = positions.clamp_min(-1).to(torch.int32)[:, None].expand(-1, self.positions.shape[1], -1)
        added = {**new_parts, **dict.fromkeys(_POSITIONS, new_positions)}
        for name in self.columns:
            added[name] = new_positions.new_full(new_positions.shape, NEW_COLUMN_VALUES[name], dtype=torch.float32)
        in_place = all(can_write_in_place(part, added[name]) for name, part in self._parts.items())
        if in_place and self._spare.claim(self.width, new):
            for name, part in self._parts.items():
                part[:, :, self.width : self.width + new] = added[name]
        else:
            spare = num_spare_slots(self.width, new)
            # One part after the other, so that at most one part exists twice at a time.
            for name in self._parts:
                old = self._stored(name)
                empty = old.new_zeros(*old.shape[:2], spare, *old.shape[3:])
                self._parts[name] = torch.cat((old, added[name], empty), dim=2)
            self._spare = SpareSlots(self.width + new, self.width + new + spare)
        self.width += new

    def select_rows(self, index: Tensor) -> None:
        """Select rows of the batch, as `torch.index_select` does: the new row j is the old row index[j]."""
        index = index.to(self.positions.device)
        for name in self._parts:
            self._parts[name] = self._stored(name).index_select(0, index)
        self._spare = SpareSlots(self.width)
        self._is_full = None

    def drop_last(self, count: int) -> None:
        """Remove the newest entries of every row and head."""
        self.width -= count
        self._spare.release(count)
        self._is_full = None

    def mask_positions(self, limits: Tensor) -> None:
        """Turn the entries of each row whose position is at least a limit, long [batch], into empty slots."""
        masked = self._parts["positions"] >= limits[:, None, None]
        self._parts["positions"] = self._parts["positions"].masked_fill(masked, -1)
        self._is_full = None

    @property
    def num_heads(self) -> int:
        """Number of KV heads."""
        return self.positions.shape[1]

    def keep_last(self, count: int) -> None:
        """Keep the newest entries of every row and head, at most `count`, and remove all others."""
        if count < self.width:
            self._parts = {name: self._stored(name)[:, :, -count:] for name in self._parts}
            self.width, self._spare, self._is_full = count, SpareSlots(count), None

    def copy(self) -> Self:
        """Return a storage that shares the tensors."""
        self._spare.is_shared = True
        other = copy.copy(self)
        other._parts = dict(self._parts)
        return other


class UniformStorage(AlignedStorage):
    """Keys and values of heads of equal length in the model's dtype.

    Empty slots of short rows hold zeros.

    Args:
        entries: the entries to store. All positions are int32 [batch, num_key_value_heads, width].
        is_full: whether no row has empty slots; None if it is not known.

    """

    kind: ClassVar[str] = "uniform"

    def __init__(self, entries: Entries, *, is_full: bool | None = None) -> None:
        parts = {"keys": entries.keys, "values": entries.values, "positions": entries.positions, **entries.columns}
        if entries.rope_positions is not None:
            parts["rope_positions"] = entries.rope_positions
        super().__init__(parts, is_full)

    @classmethod
    def from_all(cls, entries: Entries, *, padded: bool = True) -> UniformStorage:
        """Store all entries without copying them. `padded` means that some slots may be empty."""
        positions = entries.positions.clamp_min(-1).to(torch.int32).expand(entries.keys.shape[:3])
        stored = cls(replace(entries, positions=positions), is_full=None if padded else True)
        stored._spare.is_shared = True  # other caches may store the tensors too, and positions of heads share memory
        return stored

    @classmethod
    def gather(cls, entries: Entries, kept: Tensor, counts: Tensor | None = None) -> UniformStorage:
        """Copy the kept entries, so that the memory of all entries can be freed.

        Args:
            entries: all entries.
            kept: indices of the kept entries, long [batch, num_key_value_heads, width], ascending; −1 in empty slots.
            counts: number of kept entries of each row and head, long [batch, num_key_value_heads] on the CPU; None to
                count them.

        """
        empty = kept < 0
        has_empty = bool(empty.any()) if counts is None else int(counts.min()) < kept.shape[2]
        index = kept.clamp_min(0) if has_empty else kept
        keys, values = (gather_vectors(x, index) for x in (entries.keys, entries.values))
        if has_empty:
            keys, values = (x.masked_fill_(empty[..., None], 0) for x in (keys, values))
        columns = gather_index_columns(entries, index, empty if has_empty else None)
        positions, rope_positions = columns.pop("positions"), columns.pop("rope_positions", None)
        is_full = None if counts is None else not has_empty
        return cls(Entries(keys, values, positions, rope_positions, columns), is_full=is_full)

    @property
    def keys(self) -> Tensor:
        """Keys [batch, num_key_value_heads, width, head_dim]."""
        return self._stored("keys")

    @property
    def values(self) -> Tensor:
        """Values [batch, num_key_value_heads, width, value_dim]."""
        return self._stored("values")

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Keys and values, without spare slots."""
        return self.keys, self.values

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def nbytes_index(self) -> int:
        """Bytes of positions, columns and spare slots."""
        return sum(part.nbytes for part in self._parts.values()) - self.nbytes

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of one key and value."""
        return sum(x.shape[-1] * x.element_size() for x in self.buffers)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, *, padded: bool = False) -> None:
        """Add the entries of new tokens; see `Storage.append`."""
        self._append_parts({"keys": keys, "values": values}, positions, padded)

    def can_compact_in_place(self, kept: Tensor, counts: Tensor | None) -> bool:
        """Return whether all heads keep the same number, no copy uses the buffers, and the kernel supports them."""
        keys, values = self._parts["keys"], self._parts["values"]
        same_counts = counts is not None and int(counts.min()) == kept.shape[2]
        if self._spare.is_shared or not same_counts:
            return False
        return usable(keys, values) and can_write_in_place(keys, values)

    def end_attention(self, query_moments: Callable[[], Tensor | None] | None = None) -> None:
        """Do nothing: the attention needs no temporary tensors."""

    def compact_in_place(self, entries: Entries, kept: Tensor) -> None:
        """Move the kept entries to the front of the buffers; see `Storage.compact_in_place`."""
        from suffice.kv.kernels.compaction import move_to_front

        keys, values = self._parts["keys"], self._parts["values"]
        width, end = kept.shape[2], keys.shape[2]
        for x in (keys, values):
            move_to_front(x, kept)
        for name, x in gather_index_columns(entries, kept).items():
            self._parts[name] = torch.nn.functional.pad(x, (0, end - width))
        self.width, self._spare, self._is_full = width, SpareSlots(width, end), True

    def state_dict(self) -> dict[str, Tensor]:
        """Return keys, values, positions and columns."""
        tensors = {"keys": self.keys, "values": self.values, "positions": self.positions}
        return {**tensors, **pack_columns(self.columns, self.rope_positions)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> UniformStorage:
        """Build a storage from the result of `state_dict`."""
        columns = unpack_columns(state)
        return cls(Entries(state["keys"], state["values"], state["positions"], state.get("rope_positions"), columns))


def attend_with_model(
    call: AttentionCall, keys: Tensor, values: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of new tokens over all entries, with the model's own implementation.

    Args:
        call: the attention call.
        keys: keys of all entries, of which those of the new tokens are the last ones, [batch, heads, width, head_dim].
        values: [batch, heads, width, value_dim].
        valid: bool [batch, width], False in empty slots, which are the same for every head; None if there are none.

    """
    options = call.options
    format_ = mask_format(call.implementation)
    if format_ is MaskFormat.PADDING:
        mask = valid
        options = {name: option for name, option in options.items() if name not in _INDEX_OPTIONS}
    elif format_ is MaskFormat.BLOCK:
        mask = _extend_mask(replace(call, mask=call.dense_mask), keys.shape[2], valid)
        mask = None if mask is None else additive_mask(mask, call.query.dtype)
    else:
        mask = _extend_mask(call, keys.shape[2], valid)
    return run_attention(replace(call, key=keys, value=values, mask=mask, options=options))


def _extend_mask(call: AttentionCall, width: int, valid: Tensor | None) -> Tensor | None:
    """Extend a dense mask over the new tokens to all entries, [batch, 1, new, width]; None if nothing is masked."""
    batch, _, new, _ = call.query.shape
    mask = call.mask
    if mask is None:
        if new == 1 and valid is None:
            return None
        mask = torch.ones(new, new, dtype=torch.bool, device=call.query.device).tril_()[None, None]
    if valid is None:
        earlier = torch.ones(batch, width - new, dtype=torch.bool, device=call.query.device)
    else:
        earlier = valid[:, : width - new]
    mask = mask[..., -new:].expand(batch, -1, -1, -1)
    earlier = earlier[:, None, None].expand(-1, mask.shape[1], new, -1)
    if mask.dtype != torch.bool:
        earlier = additive_mask(earlier, mask.dtype)
    return torch.cat((earlier, mask), dim=-1)
