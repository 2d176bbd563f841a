"""Storage whose older entries are quantized, for heads of equal or unequal length."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import astuple, replace
from typing import ClassVar

import torch
from torch import Tensor

from suffice.kv.attention.call import AttentionCall
from suffice.kv.attention.quantized_attention import ExactEntries
from suffice.kv.backend.torch_backend import TorchBackend
from suffice.kv.storage.attention_weights import weights_over_entries
from suffice.kv.storage.base import LOGIT_BIAS, Entries, all_finite, pack_columns, unpack_columns
from suffice.kv.storage.per_head import PerHeadStorage
from suffice.kv.storage.quantization import Quantization
from suffice.kv.storage.quantized_entries import QuantizedEntries
from suffice.kv.storage.uniform import UniformStorage, attend_with_model
from suffice.kv.storage.vector_format import QuantizedVectors, VectorFormat

NUM_SINKS = 4
"""Number of first tokens of a text whose entries are never quantized, because many queries attend to them."""
_QUANTIZED_PREFIX = "quantized."


class QuantizedStorage(PerHeadStorage):
    """Keys and values of which the older ones are quantized.

    The first tokens of a text (`NUM_SINKS`) and the newest entries of each head stay in the model's dtype, as exact
    entries. New tokens are exact too, until enough entries of a head have left the window. A quantized entry is
    never quantized again: evictions drop it or move its integers.

    Args:
        quantized: the quantized entries.
        exact: the exact entries, in ascending order of positions, with empty slots anywhere. All positions are int32
            [batch, num_key_value_heads, width].
        quantization: how to quantize further entries. It may be replaced, but the numbers of bits stay the same.

    """

    kind: ClassVar[str] = "quantized"

    def __init__(self, quantized: QuantizedEntries, exact: Entries, quantization: Quantization) -> None:
        self.quantization = quantization
        self._replace_entries(quantized, exact)
        # Positions of the tokens since the last eviction, int32 [batch, tokens]; −1 on padding.
        self._new_positions = exact.positions.new_empty((len(exact.positions), 0))

    def _replace_entries(self, quantized: QuantizedEntries, exact: Entries) -> None:
        self.quantized = quantized
        self._exact = UniformStorage(exact)
        self._exact_is_full: bool | None = None  # whether no slot of the exact entries is empty; None if not known
        self._num_sorted = self._exact.width  # later slots hold new tokens, one after the other

    @classmethod
    def gather(
        cls, entries: Entries, kept: Tensor, quantization: Quantization, query_moments: Tensor | None = None
    ) -> QuantizedStorage:
        """Copy the kept entries, so that the memory of all entries can be freed.

        Args:
            entries: all entries, in the model's dtype.
            kept: indices of the kept entries, long [batch, num_key_value_heads, width], ascending; −1 in empty slots.
            quantization: how to quantize.
            query_moments: second moment E[q qᵀ] of the queries of each head, float32 [batch, num_key_value_heads,
                head_dim, head_dim], for the scales and the rounding of keys; None if it is not known.

        """
        query_sizes = None if query_moments is None else query_moments.diagonal(dim1=-2, dim2=-1).sqrt()
        empty = QuantizedEntries.empty(entries, quantization.bits, query_sizes)
        exact, old = _split(entries, kept, quantization.window)
        return cls(empty.append(entries, old, query_moments), _gather_exact(entries, exact), quantization)

    @property
    def exact(self) -> UniformStorage:
        """The exact entries. Any slot may be empty."""
        return self._exact

    @property
    def bits(self) -> tuple[int, int]:
        """Number of bits of keys and of values."""
        return self.quantization.bits

    @property
    def quantization_errors(self) -> list[tuple[float, float] | None]:
        """Relative error of keys and of values of each head; None for a head without quantized entries."""
        return self.quantized.relative_errors

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """Exact keys and values, and the integers, scales and means of quantized ones."""
        return *self._exact.buffers, *self.quantized.tensors

    @property
    def columns(self) -> dict[str, Tensor]:
        """Additional numbers of each entry by name, float32 [batch, num_key_value_heads, width]."""
        return self._columns_in_order(self._order(self._joined_positions()))

    @property
    def is_finite(self) -> Tensor:
        """Whether all keys and values are finite, bool without dimensions. Integers stand for finite numbers only."""
        return all_finite(self._exact.buffers)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values, with scales and means."""
        return sum(x.nbytes for x in self.buffers)

    @property
    def nbytes_by_head(self) -> list[int]:
        """Bytes of the keys and values of each head, over all rows."""
        heads = self.num_heads
        shared = sum(x.nbytes for x in (*self._exact.buffers, self.quantized.means, self.quantized.scales)) // heads
        return [shared + count * self.quantized.bytes_per_entry for count in self.quantized.counts.sum(0).tolist()]

    @property
    def nbytes_index(self) -> int:
        """Bytes of positions, columns and spare slots."""
        return self._exact.nbytes_index + self.quantized.nbytes_index + self._new_positions.nbytes

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of one key and value in the model's dtype."""
        return self._exact.bytes_per_entry

    @property
    def num_heads(self) -> int:
        """Number of KV heads."""
        return self._exact.positions.shape[1]

    @property
    def num_kept(self) -> Tensor:
        """Number of entries of each row and head, long [batch, num_key_value_heads]."""
        return self._exact.num_kept + self.quantized.counts.to(self._exact.positions.device)

    @property
    def max_length(self) -> int:
        """Number of slots of the row and head with the most entries, including padding."""
        return self.quantized.width + self._exact.width

    @property
    def positions(self) -> Tensor:
        """Index of each entry within its row's text, int32 [batch, num_key_value_heads, width]; −1 in empty slots."""
        positions = self._joined_positions()
        return _in_order(positions, self._order(positions))

    @property
    def entries(self) -> Entries:
        """All entries in copies in the model's dtype. Those before the new tokens are right-aligned."""
        positions = self._joined_positions()
        order = self._order(positions)
        keys, values = self._vectors_in_order(order)
        return Entries(keys, values, _in_order(positions, order).long(), columns=self._columns_in_order(order))

    def _vectors_in_order(self, order: Tensor) -> list[Tensor]:
        """Return all keys and values in copies, each [batch, num_key_value_heads, width, any]; zeros in empty slots."""
        batch, heads, width = order.shape
        exact = self._exact
        # The slot of each entry, first of the quantized ones and then of the exact ones, long [batch, heads, slots].
        sorted_slots = torch.empty_like(order).scatter_(
            2, order, torch.arange(width, device=order.device).expand_as(order)
        )
        new_slots = torch.arange(width, self.max_length, device=order.device).expand(batch, heads, -1)
        first_slots = torch.arange(0, batch * heads * self.max_length, self.max_length, device=order.device)
        slots = torch.cat((sorted_slots, new_slots), dim=2) + first_slots.view(batch, heads, 1)
        of_quantized = self.quantized.pack(slots[:, :, : self.quantized.width])
        of_exact = slots[:, :, self.quantized.width :].flatten()
        joined: list[Tensor] = []
        for own, others in zip(self.quantized.dequantize(), (exact.keys, exact.values), strict=True):
            dtype = torch.promote_types(own.dtype, others.dtype)  # new tokens may have another one under autocast
            vectors = own.new_zeros(batch * heads * self.max_length, own.shape[1], dtype=dtype)
            vectors.index_copy_(0, of_quantized, own.to(dtype))
            vectors.index_copy_(0, of_exact, others.to(dtype).flatten(0, 2))
            joined.append(vectors.view(batch, heads, self.max_length, -1))
        return joined

    def _columns_in_order(self, order: Tensor) -> dict[str, Tensor]:
        exact = self._exact.columns
        return {
            name: _in_order(torch.cat((self.quantized.align(x, 0), exact[name]), dim=2), order)
            for name, x in self.quantized.columns.items()
        }

    def _joined_positions(self) -> Tensor:
        """Return the positions of the quantized entries, right-aligned, and of the exact ones."""
        return torch.cat((self.quantized.align(self.quantized.positions, -1), self._exact.positions), dim=2)

    def _order(self, positions: Tensor) -> Tensor:
        """Return the order of the entries before the new tokens: empty slots first, then by position.

        Args:
            positions: result of `_joined_positions`.

        """
        return positions[:, :, : self.quantized.width + self._num_sorted].sort(dim=-1, stable=True).indices

    def _split_entries(self, x: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Split items of `entries`, [batch, num_key_value_heads, width], into those of quantized and of exact entries.

        Returns:
            [quantized entries] and [batch, num_key_value_heads, exact slots].

        """
        width = order.shape[2]
        joined = torch.cat(
            (torch.empty_like(order, dtype=x.dtype).scatter_(2, order, x[:, :, :width]), x[:, :, width:]), 2
        )
        return self.quantized.pack(joined[:, :, : self.quantized.width]), joined[:, :, self.quantized.width :]

    # ---- New tokens -------------------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, *, padded: bool = False) -> None:
        """Add the entries of new tokens; see `Storage.append`."""
        self._exact.append(keys, values, positions, padded=padded)
        if padded:
            self._exact_is_full = False
        new = positions.clamp_min(-1).to(torch.int32)
        self._new_positions = torch.cat((self._new_positions, new), dim=1)

    def attend(self, call: AttentionCall, backend: TorchBackend) -> tuple[Tensor, Tensor | None]:
        """Compute the attention of new tokens over all entries of each head; see `Storage.attend`."""
        scaling = call.scaling or call.query.shape[-1] ** -0.5
        exact = self._exact
        if self._exact_is_full is None:
            self._exact_is_full = bool((exact.positions >= 0).all())
        output = backend.quantized_attention(
            call.query,
            self.quantized,
            ExactEntries(exact.keys, exact.values, exact.positions, self._exact_is_full, exact.columns.get(LOGIT_BIAS)),
            call.dense_mask,
            scaling,
            call.softcap,
            call.sink_logits,
        )
        return output, weights_over_entries(call, self.entries, scaling) if call.needs_weights else None

    def attend_to(self, call: AttentionCall, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the attention of new tokens, with keys and values that a model makes of the entries of one head."""
        return attend_with_model(call, keys, values, self.positions[:, 0] >= 0)

    def end_attention(self, query_moments: Callable[[], Tensor | None] | None = None) -> None:
        """Quantize the entries that have left the window, if they are enough for a block.

        Args:
            query_moments: computes the second moments of the queries (see `gather`); None to round keys to the nearest
                integers. It is called only if entries are quantized.

        Raises:
            ValueError: a key or value is NaN, infinite, or too large for the scales. Nothing is changed.

        """
        window = self.quantization.window
        if self._exact.width < NUM_SINKS + window + self.quantization.block:
            return
        entries = self._exact.entries
        slots = torch.arange(self._exact.width, device=entries.positions.device)
        exact, old = _split(entries, slots.where(entries.positions >= 0, -1), window)
        moments = None if query_moments is None else query_moments()
        self._replace_entries(self.quantized.append(entries, old, moments), _gather_exact(entries, exact))

    # ---- Changes ----------------------------------------------------------------------------------------------------

    def keep(self, kept: Tensor, columns: Mapping[str, Tensor] | None = None) -> QuantizedStorage:
        """Return a storage of some entries. Quantized entries stay as they are.

        Args:
            kept: indices of the kept entries in `entries`, long [batch, num_key_value_heads, width]; −1 in empty slots.
            columns: new columns of `entries`; None to keep those that are stored.

        """
        positions = self._joined_positions()
        order, width = self._order(positions), positions.shape[2]
        mask = torch.zeros(*positions.shape[:2], width + 1, dtype=torch.bool, device=kept.device)
        mask = mask.scatter_(2, kept.where(kept >= 0, width), True)[:, :, :-1]
        columns = self._columns_in_order(order) if columns is None else columns
        parts = {name: self._split_entries(x, order) for name, x in columns.items()}
        quantized = replace(self.quantized, columns={name: part[0] for name, part in parts.items()})
        exact = replace(self._exact.entries, columns={name: part[1] for name, part in parts.items()})
        keeps_quantized, keeps_exact = self._split_entries(mask, order)
        return QuantizedStorage(quantized.keep(keeps_quantized), _select_exact(exact, keeps_exact), self.quantization)

    def row_priorities(self, row: int) -> Tensor:
        """Return the priorities of all entries of a row, float32 [entries]; see `PerHeadStorage.row_priorities`."""
        exact = self._exact
        priorities = exact.columns["priority"][row].masked_fill(exact.positions[row] < 0, -torch.inf)
        return torch.cat((self.quantized.columns["priority"][self._rows[row]], priorities.flatten()))

    def keep_by_row(self, masks: list[Tensor]) -> None:
        """Keep the entries of `row_priorities` for which a mask is True, and drop the others."""
        sizes = [part.stop - part.start for part in self._rows]
        quantized = torch.cat([mask[:size] for mask, size in zip(masks, sizes, strict=True)])
        exact = torch.stack([mask[size:] for mask, size in zip(masks, sizes, strict=True)])
        exact = exact.view(self._exact.positions.shape) & (self._exact.positions >= 0)
        self._replace_entries(self.quantized.keep(quantized), _select_exact(self._exact.entries, exact))

    @property
    def _rows(self) -> list[slice]:
        """The range of the quantized entries of each row."""
        ends = [0, *self.quantized.counts.sum(1).cumsum(0).tolist()]
        return [slice(start, end) for start, end in itertools.pairwise(ends)]

    def select_rows(self, index: Tensor) -> None:
        """Select rows of the batch, as `torch.index_select` does: the new row j is the old row index[j]."""
        self.quantized = self.quantized.select_rows(index.tolist())
        self._exact.select_rows(index)
        self._new_positions = self._new_positions.index_select(0, index.to(self._new_positions.device))

    def num_masked(self, count: int) -> list[int]:
        """Return how many of the newest tokens of each row are masked; see `Storage.num_masked`."""
        new = self._new_positions[:, self._new_positions.shape[1] - min(count, self._new_positions.shape[1]) :]
        num_masked = (new < 0).sum(-1)
        if count > self._new_positions.shape[1]:
            num_earlier = self.num_kept[:, 0] - (self._new_positions >= 0).sum(-1)
            num_masked = num_masked + (count - self._new_positions.shape[1] - num_earlier).clamp_min(0)
        return num_masked.tolist()

    def drop_last(self, count: int) -> None:
        """Remove the newest entries. Every head must still have them."""
        if count <= self._exact.width - self._num_sorted:
            self._exact.drop_last(count)
        else:
            num_dropped = count - torch.tensor(self.num_masked(count), device=self._new_positions.device)
            limits = self.positions.amax((1, 2)) + 1 - num_dropped
            self._drop_from(limits)
        self._new_positions = self._new_positions[:, : max(0, self._new_positions.shape[1] - count)].clone()

    def _drop_from(self, limits: Tensor) -> None:
        """Drop the entries of each row whose position is at least a limit, long [batch]."""
        positions = self._exact.positions
        is_before = (positions >= 0) & (positions < limits[:, None, None])
        self._replace_entries(self._quantized_before(limits), _select_exact(self._exact.entries, is_before))

    def _quantized_before(self, limits: Tensor) -> QuantizedEntries:
        num_entries = self.quantized.counts.sum(1).to(limits.device)
        mask = self.quantized.positions < limits.repeat_interleave(num_entries)
        return self.quantized if bool(mask.all()) else self.quantized.keep(mask)

    def mask_positions(self, limits: Tensor) -> None:
        """Turn the entries of each row whose position is at least a limit, long [batch], into empty slots."""
        self.quantized = self._quantized_before(limits)
        self._exact.mask_positions(limits)
        self._exact_is_full = None
        self._new_positions = self._new_positions.masked_fill(self._new_positions >= limits[:, None], -1)

    def copy(self) -> QuantizedStorage:
        """Return a storage that shares the tensors."""
        other = copy.copy(self)
        other._exact = self._exact.copy()
        return other

    # ---- Files ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Return exact and quantized entries, and how to quantize further ones."""
        quantized, exact = self.quantized, self._exact
        tensors = {
            "key_codes": quantized.keys.codes,
            "key_scales": quantized.keys.scales,
            "value_codes": quantized.values.codes,
            "value_scales": quantized.values.scales,
            "means": quantized.means,
            "scales": quantized.scales,
            "error": quantized.error_sums,
            "positions": quantized.positions,
            "lengths": quantized.counts,
            "format": torch.tensor(astuple(self.quantization)),
            **pack_columns(quantized.columns, None),
        }
        return {
            "keys": exact.keys,
            "values": exact.values,
            "positions": exact.positions,
            "num_sorted": torch.tensor(self._num_sorted),
            "new_positions": self._new_positions,
            **pack_columns(exact.columns, None),
            **{f"{_QUANTIZED_PREFIX}{name}": x for name, x in tensors.items()},
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> QuantizedStorage:
        """Build a storage from the result of `state_dict`."""
        stored = {
            name.removeprefix(_QUANTIZED_PREFIX): x for name, x in state.items() if name.startswith(_QUANTIZED_PREFIX)
        }
        quantization = Quantization(*stored["format"].tolist())
        exact = Entries(state["keys"], state["values"], state["positions"], columns=unpack_columns(state))
        quantized = QuantizedEntries(
            VectorFormat(exact.keys.shape[-1], quantization.key_bits),
            VectorFormat(exact.values.shape[-1], quantization.value_bits),
            QuantizedVectors(stored["key_codes"], stored["key_scales"]),
            QuantizedVectors(stored["value_codes"], stored["value_scales"]),
            stored["positions"],
            stored["lengths"].tolist(),
            stored["means"],
            stored["scales"],
            stored["error"],
            unpack_columns(stored),
        )
        storage = cls(quantized, exact, quantization)
        storage._num_sorted = int(state["num_sorted"])
        storage._new_positions = state["new_positions"]
        return storage


def _split(entries: Entries, kept: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Divide kept entries into those that stay exact and those that are quantized.

    Args:
        entries: all entries.
        kept: indices of the kept entries, long [batch, num_key_value_heads, width], ascending; −1 in empty slots.
        window: number of newest entries of each head that stay exact.

    Returns:
        Indices of the entries that stay exact, [batch, num_key_value_heads, at most NUM_SINKS + window], and of those
        that are quantized, shaped like `kept`; both ascending, and −1 in empty slots.

    """
    positions = entries.positions.expand(-1, kept.shape[1], -1).gather(2, kept.clamp_min(0))
    is_kept = kept >= 0
    rank_from_end = is_kept.flip(-1).cumsum(-1).flip(-1)
    is_exact = is_kept & ((rank_from_end <= window) | (positions < NUM_SINKS))
    num_exact = min(kept.shape[2], NUM_SINKS + window)
    exact = kept.where(is_exact, -1).sort(dim=-1).values[..., kept.shape[2] - num_exact :]
    return exact, kept.where(is_kept & ~is_exact, -1)


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    """Sort the items of quantized and exact entries, [batch, num_key_value_heads, width, …]; new tokens stay behind."""
    width = order.shape[2]
    index = order.view(*order.shape, *(1,) * (x.dim() - 3)).expand(-1, -1, -1, *x.shape[3:])
    return torch.cat((x[:, :, :width].gather(2, index), x[:, :, width:]), dim=2)


def _gather_exact(entries: Entries, index: Tensor) -> Entries:
    """Copy entries by their index, long [batch, num_key_value_heads, width]; −1 makes an empty slot."""
    stored = UniformStorage.gather(entries, index)
    return replace(stored.entries, positions=stored.positions)


def _select_exact(entries: Entries, mask: Tensor) -> Entries:
    """Copy the entries for which a mask is True, bool [batch, num_key_value_heads, width], right-aligned."""
    width = int(mask.sum(-1).max()) if mask.numel() else 0
    slots = torch.arange(mask.shape[2], device=mask.device)
    index = slots.where(mask, -1).sort(dim=-1).values
    return _gather_exact(entries, index[..., mask.shape[2] - width :])
