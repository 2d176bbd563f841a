"""The base class of all storages of kept keys and values, and functions that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from suffice.kv.attention.call import AttentionCall
from suffice.kv.backend.torch_backend import TorchBackend

LOGIT_BIAS = "logit_bias"
"""Name of the column of numbers that are added to the logits of repaired entries."""
NEW_COLUMN_VALUES = {"attention_received": 0.0, "priority": float("nan"), LOGIT_BIAS: 0.0}
"""Value of a newly appended entry in each column; a NaN priority marks an entry that has not been scored yet."""
_COLUMN_PREFIX = "columns."


@dataclass
class Entries:
    """Entries of all rows and heads, right-aligned. Policies score them, and storages are made from them.

    Args:
        keys: [batch, num_key_value_heads, width, head_dim].
        values: [batch, num_key_value_heads, width, value_dim].
        positions: index of each entry within the text of its row, [batch, 1 or num_key_value_heads, width]; negative
            where there is no entry.
        rope_positions: positions by which the keys were rotated, [batch, num_key_value_heads, width]; None if they
            equal `positions`.
        columns: additional numbers of each entry by name, float32 [batch, num_key_value_heads, width].

    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    rope_positions: Tensor | None = None
    columns: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def logit_bias(self) -> Tensor | None:
        """Numbers that are added to the logits, [batch, num_key_value_heads, width]; None if there are none."""
        return self.columns.get(LOGIT_BIAS)

    def right_aligned(self) -> Entries:
        """Return copies in which the slots without an entry come first in every head."""
        shape = self.keys.shape[:3]
        index = right_aligned_order(self.positions).expand(shape)
        return Entries(
            gather_vectors(self.keys, index),
            gather_vectors(self.values, index),
            self.positions.expand(shape).gather(2, index),
            None if self.rope_positions is None else self.rope_positions.gather(2, index),
            {name: x.gather(2, index) for name, x in self.columns.items()},
        )


def right_aligned_order(positions: Tensor) -> Tensor:
    """Return the order of slots in which those without an entry come first, long, shaped like `positions`."""
    return (positions >= 0).long().sort(dim=-1, stable=True).indices


class Storage(ABC):
    """Keys and values of the kept entries of one layer, and the attention over them.

    Copies share tensors. While a copy exists, stored entries are never overwritten; new entries go into spare slots.
    """

    kind: ClassVar[str]
    """Name of the storage in saved caches."""

    @property
    @abstractmethod
    def entries(self) -> Entries:
        """All entries, right-aligned."""

    @property
    @abstractmethod
    def buffers(self) -> tuple[Tensor, ...]:
        """The tensors that hold keys and values."""

    @property
    @abstractmethod
    def columns(self) -> dict[str, Tensor]:
        """Additional numbers of each entry by name."""

    @property
    @abstractmethod
    def positions(self) -> Tensor:
        """Index of each entry within its row's text, int32 [batch, num_key_value_heads, width]; −1 in empty slots."""

    @property
    @abstractmethod
    def num_kept(self) -> Tensor:
        """Number of entries of each row and head, long [batch, num_key_value_heads]."""

    @property
    def num_heads(self) -> int:
        """Number of KV heads."""
        return self.num_kept.shape[1]

    @property
    def bits(self) -> tuple[int, int] | None:
        """Number of bits of each number of quantized keys and values; None if entries are not quantized."""
        return None

    @property
    def quantization_errors(self) -> list[tuple[float, float] | None]:
        """Relative error of the quantized keys and values of each head; None if none was quantized."""
        return [None] * self.num_heads

    @property
    def is_finite(self) -> Tensor:
        """Whether all stored keys and values are finite, bool without dimensions."""
        return all_finite(self.buffers)

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Number of slots of the row and head with the most entries, including padding."""

    @property
    def keys(self) -> Tensor:
        """Keys, right-aligned: [batch, num_key_value_heads, width, head_dim]."""
        return self.entries.keys

    @property
    def values(self) -> Tensor:
        """Values, right-aligned: [batch, num_key_value_heads, width, value_dim]."""
        return self.entries.values

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""

    @property
    @abstractmethod
    def nbytes_by_head(self) -> list[int]:
        """Bytes of the keys and values of each head, over all rows."""

    @property
    @abstractmethod
    def nbytes_index(self) -> int:
        """Bytes of positions, columns and spare slots."""

    @property
    @abstractmethod
    def bytes_per_entry(self) -> int:
        """Bytes of one key and value in the model's dtype."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, positions: Tensor, *, padded: bool = False) -> None:
        """Add the entries of new tokens.

        Args:
            keys: [batch, num_key_value_heads, new, head_dim].
            values: [batch, num_key_value_heads, new, value_dim].
            positions: index within the text of the row, long [batch, new]; negative on padding.
            padded: whether some of the new tokens are padding.

        """

    @abstractmethod
    def attend(self, call: AttentionCall, backend: TorchBackend) -> tuple[Tensor, Tensor | None]:
        """Compute the attention of new tokens, which are already appended, over all entries.

        Returns:
            The output [batch, new, heads, value_dim], and the attention weights if the model's implementation returns
            them.

        """

    @abstractmethod
    def end_attention(self, query_moments: Callable[[], Tensor | None] | None = None) -> None:
        """Quantize new entries, if the storage does, after the attention of a call has read them.

        Args:
            query_moments: computes the second moments of the queries; see `QuantizedStorage.end_attention`.

        """

    def can_compact_in_place(self, kept: Tensor, counts: Tensor | None) -> bool:
        """Return whether `compact_in_place` can keep these entries.

        Args:
            kept: indices of the kept entries, long [batch, num_key_value_heads, width], ascending.
            counts: number of kept entries of each row and head, long [batch, num_key_value_heads] on the CPU; None if
                they were not counted.

        """
        return False

    def compact_in_place(self, entries: Entries, kept: Tensor) -> None:
        """Move the kept entries to the front of the buffers, so that no new buffers are allocated.

        Args:
            entries: `self.entries`, with the columns to store.
            kept: indices of the kept entries, long [batch, num_key_value_heads, width], ascending.

        Raises:
            NotImplementedError: `can_compact_in_place` returns False.

        """
        raise NotImplementedError(f"{type(self).__name__} does not compact in place")

    def num_masked(self, count: int) -> list[int]:
        """Return how many of the newest tokens of each row are masked.

        Args:
            count: number of newest tokens; at least the first head must still have the entries of all of them.

        """
        return (self.positions[:, 0, self.max_length - count :] < 0).sum(-1).tolist()

    @abstractmethod
    def select_rows(self, index: Tensor) -> None:
        """Select rows of the batch, as `torch.index_select` does: the new row j is the old row index[j]."""

    @abstractmethod
    def drop_last(self, count: int) -> None:
        """Remove the newest entries of every row and head."""

    @abstractmethod
    def mask_positions(self, limits: Tensor) -> None:
        """Turn the entries of each row whose position is at least a limit, long [batch], into empty slots."""

    @abstractmethod
    def copy(self) -> Storage:
        """Return a storage of the same entries. Changes to one do not affect the other."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors that are needed to restore the storage.

        Raises:
            ValueError: this kind of storage cannot be saved.

        """

    @classmethod
    @abstractmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Storage:
        """Build a storage from the result of `state_dict`."""


def pack_columns(columns: Mapping[str, Tensor], rope_positions: Tensor | None) -> dict[str, Tensor]:
    """Return columns and rotary positions as items of a state dict."""
    packed = {f"{_COLUMN_PREFIX}{name}": x for name, x in columns.items()}
    return packed if rope_positions is None else {**packed, "rope_positions": rope_positions}


def unpack_columns(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the columns of a state dict by name."""
    return {name.removeprefix(_COLUMN_PREFIX): x for name, x in state.items() if name.startswith(_COLUMN_PREFIX)}


def all_finite(tensors: tuple[Tensor, ...]) -> Tensor:
    """Return whether no number in the tensors is NaN or infinite, as a bool tensor without dimensions."""
    return torch.stack([x.sum(dtype=torch.float32) for x in tensors]).sum().isfinite()


# A full buffer is copied to one with 1/16 more slots, so that it is not copied again for each new token.
_GROWTH = 16


class SpareSlots:
    """Free slots at the end of a storage's buffers. Copies share them; the first one to write there claims them.

    Args:
        first_free: index of the first free slot.
        end: index after the last slot.

    """

    def __init__(self, first_free: int = 0, end: int = 0) -> None:
        self.first_free, self.end = first_free, max(first_free, end)
        self.is_shared = False  # True if copies of the storage use the buffers, whose entries must then not be moved

    def claim(self, start: int, count: int) -> bool:
        """Claim slots for new entries. Return False if there are too few, or if a copy has already claimed them."""
        if start != self.first_free or start + count > self.end:
            return False
        self.first_free += count
        return True

    def release(self, count: int) -> None:
        """Free the last claimed slots again, unless a copy of the storage may use them."""
        if not self.is_shared:
            self.first_free -= min(count, self.first_free)


def num_spare_slots(width: int, num_new: int) -> int:
    """Return how many spare slots to add when new entries are appended: none after a chunk of several tokens."""
    return width // _GROWTH if num_new == 1 else 0


def can_write_in_place(stored: Tensor, new: Tensor) -> bool:
    """Return whether new entries may be written into a stored tensor.

    They may not if autograd records them, or if an inference tensor is used outside of inference mode.
    """
    if torch.is_grad_enabled() and (stored.requires_grad or new.requires_grad):
        return False
    return torch.is_inference_mode_enabled() or not stored.is_inference()


def gather_vectors(x: Tensor, index: Tensor) -> Tensor:
    """Gather whole vectors into a new tensor.

    Args:
        x: [batch, num_key_value_heads, entries, dim].
        index: indices of entries, long [batch, num_key_value_heads, width].

    Returns:
        [batch, num_key_value_heads, width, dim].

    """
    return index_vectors(x, flat_index(x, index).flatten()).unflatten(0, index.shape)


def flat_index(x: Tensor, index: Tensor) -> Tensor:
    """Return the flat index of each indexed vector among all vectors of x, in memory order.

    Args:
        x: [batch, num_key_value_heads, entries, dim].
        index: indices of entries, long [batch, num_key_value_heads, width].

    """
    batch, heads, num_entries, _ = x.shape
    first = torch.arange(batch * heads, device=x.device).view(batch, heads, 1)
    if _has_entries_before_heads(x):
        row, head = first // heads, first % heads
        return index * heads + (row * num_entries * heads + head)
    return index + first * num_entries


def index_vectors(x: Tensor, flat: Tensor) -> Tensor:
    """Copy vectors of x by their flat index, [m, dim]; several times faster than `gather`.

    Most models store values as [batch, entries, heads, dim] in memory. They are indexed in that order, without a copy.
    """
    return (x.transpose(1, 2) if _has_entries_before_heads(x) else x).flatten(0, 2).index_select(0, flat)


def last_slots(counts: Tensor, width: int, device: torch.device) -> Tensor:
    """Return the flat indices of the last `counts[i]` slots of each row i, long [sum of counts].

    Args:
        counts: long [rows], on the CPU.
        width: number of slots of every row.
        device: device of the result. There is no synchronization with it.

    """
    total = int(counts.sum())
    shift = torch.arange(1, len(counts) + 1) * width - counts.cumsum(0)
    shift, counts = (x.to(device, non_blocking=True) for x in (shift, counts))
    return torch.arange(total, device=device) + shift.repeat_interleave(counts, output_size=total)


def gather_index_columns(entries: Entries, index: Tensor, empty: Tensor | None = None) -> dict[str, Tensor]:
    """Gather positions, rotary positions (if there are any) and columns of entries.

    Args:
        entries: all entries.
        index: long [batch, num_key_value_heads, width].
        empty: bool, shaped like `index`, True for empty slots; None if there are none.

    Returns:
        Tensors [batch, num_key_value_heads, width] by name; positions are int32, −1 for no entry.

    """
    columns = {"positions": entries.positions, "rope_positions": entries.rope_positions, **entries.columns}
    gathered: dict[str, Tensor] = {}
    for name, x in columns.items():
        if x is None:
            continue
        own = x.expand(-1, index.shape[1], -1).gather(2, index)
        is_position = name in ("positions", "rope_positions")
        own = own if empty is None else own.masked_fill(empty, -1 if is_position else 0)
        gathered[name] = own.to(torch.int32) if is_position else own
    return gathered


def _has_entries_before_heads(x: Tensor) -> bool:
    return not x.is_contiguous() and x.transpose(1, 2).is_contiguous()
