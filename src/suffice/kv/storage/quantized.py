"""Storage for heads of equal length whose keys and values are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from transformers import cache_utils
from typing_extensions import Self

from suffice.kv.storage.base import Entries, Storage
from suffice.kv.storage.quantized_entries import Fp8Entries, LayerEntries, QuantizedEntries
from suffice.kv.storage.uniform import AlignedStorage

_FP8 = "fp8"
# For each backend: the class in transformers, the package that it requires, and the axis for which a group consists of
# dimensions of one entry. With another axis, entries and rows would share scales.
_LAYERS = {"quanto": ("QuantoQuantizedLayer", "optimum-quanto", 0), "hqq": ("HQQQuantizedLayer", "hqq", 1)}
_BACKENDS = (*_LAYERS, _FP8)


@dataclass(frozen=True)
class Quantization:
    """How kept entries are quantized.

    Args:
        backend: `"quanto"` and `"hqq"` store low-bit integers with a scale and a shift for each group of
            dimensions, in the quantized cache layers of transformers; `"fp8"` stores 8-bit floating-point numbers,
            with a power of two as scale for each key and for each value.
        bits: number of bits of an integer, as far as the backend supports it; not used by `"fp8"`.
        group_size: number of dimensions that share a scale. None means the largest power of two that divides the head
            dimension, at most 64.
        residual_length: number of new tokens that stay in full precision before they are quantized too; not used by
            `"fp8"`.

    Raises:
        ValueError: `backend` is unknown, or `residual_length` is below 1.

    """

    backend: str = "quanto"
    bits: int = 4
    group_size: int | None = None
    residual_length: int = 128

    def __post_init__(self) -> None:
        if self.backend not in _BACKENDS:
            names = ", ".join(map(repr, _BACKENDS))
            raise ValueError(f"quantized must be one of {names} or None, got {self.backend!r}")
        if self.residual_length < 1:
            raise ValueError(f"residual_length must be at least 1, got {self.residual_length}")

    def check(self) -> None:
        """Raise an error unless the backend is installed and accepts the arguments.

        Raises:
            ImportError: the backend needs a package that is not installed.
            ValueError: the backend does not accept the arguments.

        """
        if self.backend != _FP8:
            self._make_layer(64)

    def quantize(self, keys: Tensor, values: Tensor) -> QuantizedEntries:
        """Return quantized keys and values, [batch, num_key_value_heads, width, dim]."""
        if self.backend == _FP8:
            return Fp8Entries(keys, values)
        head_dim = keys.shape[-1]
        return LayerEntries(keys, values, lambda: self._make_layer(head_dim))

    def _make_layer(self, head_dim: int) -> Any:
        """Return a new, empty quantized layer of transformers for heads of this dimension."""
        name, package, axis = _LAYERS[self.backend]
        try:
            return getattr(cache_utils, name)(
                nbits=self.bits,
                axis_key=axis,
                axis_value=axis,
                q_group_size=self.group_size or min(64, head_dim & -head_dim),
                residual_length=self.residual_length,
            )
        except ImportError:
            raise ImportError(
                f"quantized={self.backend!r} needs {package}. Install it, or choose another backend"
            ) from None


class QuantizedStorage(AlignedStorage):
    """Quantized keys and values of heads of equal length; positions and columns are not quantized.

    All entries exist in full precision only between `append` and `end_attention`, while the attention of one layer
    reads them.

    Args:
        entries: the entries to store. All positions are int32 [batch, num_key_value_heads, width].
        quantization: how to quantize.
        is_full: whether no row has empty slots; None if it is not known.

    """

    kind: ClassVar[str] = "quantized"

    def __init__(self, entries: Entries, quantization: Quantization, *, is_full: bool | None = None) -> None:
        index = {"positions": entries.positions, **entries.columns}
        if entries.rope_positions is not None:
            index["rope_positions"] = entries.rope_positions
        super().__init__(index, is_full)
        self.quantization = quantization
        self._bytes_per_entry = sum(x.shape[-1] * x.element_size() for x in (entries.keys, entries.values))
        self._quantized = quantization.quantize(entries.keys, entries.values)
        self._dequantized: tuple[Tensor, Tensor] | None = None

    def _dequantize(self) -> tuple[Tensor, Tensor]:
        """Return keys and values in the model's dtype."""
        return self._quantized.dequantize() if self._dequantized is None else self._dequantized

    @property
    def keys(self) -> Tensor:
        """Keys [batch, num_key_value_heads, width, head_dim], dequantized."""
        return self._dequantize()[0]

    @property
    def values(self) -> Tensor:
        """Values [batch, num_key_value_heads, width, value_dim], dequantized."""
        return self._dequantize()[1]

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """All tensors in which keys and values are stored, including scales and shifts."""
        return self._quantized.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized keys and values, including scales and shifts."""
        return sum(x.nbytes for x in self.buffers)

    @property
    def nbytes_index(self) -> int:
        """Bytes of positions, columns and their spare slots."""
        return sum(part.nbytes for part in self._parts.values())

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of one key and value before quantization."""
        return self._bytes_per_entry

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, *, padded: bool = False) -> None:
        """Add the entries of new tokens; see `Storage.append`."""
        self._dequantized = self._quantized.append(keys, values)
        self._append_parts({}, positions, padded)

    def end_attention(self) -> None:
        """Free the dequantized entries."""
        self._dequantized = None

    def select_rows(self, index: Tensor) -> None:
        """Select rows of the batch, as `torch.index_select` does: the new row j is the old row index[j]."""
        index = index.to(self.positions.device)
        super().select_rows(index)
        self._quantized.select_rows(index)
        self._dequantized = None

    def drop_last(self, count: int) -> None:
        """Remove the newest entries of every row and head."""
        super().drop_last(count)
        self._quantized.drop_last(count)
        self._dequantized = None

    def copy(self) -> Self:
        """Return a storage that shares the tensors. Neither storage writes to them."""
        other = super().copy()
        other._quantized = self._quantized.copy()
        return other

    def state_dict(self) -> dict[str, Tensor]:
        """Raise: quantized entries are not saved.

        Raises:
            ValueError: always.

        """
        raise ValueError("quantized must be None for a cache that is saved, got a quantized cache")

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Storage:
        """Raise: quantized entries are not saved."""
        raise ValueError(f"storage of a saved cache must be 'uniform' or 'ragged', got {cls.kind!r}")
