"""Storage for heads of equal length in the quantized cache layers of transformers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import cache_utils
from typing_extensions import Self

from suffice.kv.storage.base import Entries, Storage
from suffice.kv.storage.uniform import AlignedStorage

# By backend: the class in transformers, and the package that it requires.
_BACKENDS = {
    "quanto": ("QuantoQuantizedLayer", "optimum-quanto"),
    "hqq": ("HQQQuantizedLayer", "hqq"),
    "fp8": ("Fp8QuantizedLayer", "a newer transformers"),
}


@dataclass(frozen=True)
class Quantization:
    """How kept entries are quantized.

    Args:
        backend: `"quanto"` and `"hqq"` store low-bit integers with a scale and a shift for each group of
            dimensions of an entry; `"fp8"` stores 8-bit floating-point numbers with one scale for a layer.
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
        self.make_layer(64)

    def make_layer(self, head_dim: int) -> Any:
        """Return a new, empty quantized layer of transformers for heads of this dimension."""
        name, package = _BACKENDS[self.backend]
        layer_type = getattr(cache_utils, name, None)
        missing = f"quantized={self.backend!r} needs {package}. Install it, or choose another backend"
        if layer_type is None:
            raise ImportError(missing)
        if self.backend == "fp8":
            return layer_type()
        group_size = self.group_size or min(64, head_dim & -head_dim)
        try:
            return layer_type(nbits=self.bits, q_group_size=group_size, residual_length=self.residual_length)
        except ImportError:
            raise ImportError(missing) from None


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
        self._quantize(entries.keys, entries.values)

    def _quantize(self, keys: Tensor, values: Tensor) -> None:
        self._no_entries = keys[:, :, :0].clone(), values[:, :, :0].clone()
        self._layer = self.quantization.make_layer(keys.shape[-1])
        self._layer.update(keys, values)
        self._largest = keys.abs().amax(), values.abs().amax()
        self._dequantized: tuple[Tensor, Tensor] | None = None

    def _dequantize(self) -> tuple[Tensor, Tensor]:
        """Return keys and values in the model's dtype."""
        if self._dequantized is not None:
            return self._dequantized
        # An update without new tokens returns all entries.
        return self._layer.update(*self._no_entries)

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
        """All tensors in which the layer of transformers stores keys and values, including scales and shifts."""
        return tuple(_plain_tensors(vars(self._layer)))

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
        if self.quantization.backend == "fp8":
            # The scale was computed from the first entries. Numbers that are too large for it would become NaN.
            pairs = zip((keys, values), self._largest, strict=True)
            keys, values = (x.clamp(-largest, largest) for x, largest in pairs)
        self._dequantized = self._layer.update(keys, values)
        self._append_parts({}, positions, padded)

    def end_attention(self) -> None:
        """Free the dequantized entries."""
        self._dequantized = None

    def select_rows(self, index: Tensor) -> None:
        """Select rows of the batch, as `torch.index_select` does: the new row j is the old row index[j]."""
        index = index.to(self.positions.device)
        keys, values = (x.index_select(0, index) for x in self._dequantize())
        super().select_rows(index)
        self._quantize(keys, values)

    def drop_last(self, count: int) -> None:
        """Remove the newest entries of every row and head."""
        keys, values = (x[:, :, :-count] for x in self._dequantize())
        super().drop_last(count)
        self._quantize(keys, values)

    def copy(self) -> Self:
        """Return a storage that shares the tensors. Neither storage writes to them."""
        other = super().copy()
        other._layer = copy.copy(self._layer)
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


def _plain_tensors(value: object) -> list[Tensor]:
    """Return all plain tensors in a nested container or in a tensor subclass."""
    if isinstance(value, dict):
        return [x for part in cast(dict[Any, Any], value).values() for x in _plain_tensors(part)]
    if isinstance(value, (tuple, list)):
        return [x for part in cast(list[Any], value) for x in _plain_tensors(part)]
    if not isinstance(value, Tensor):
        return []
    if hasattr(value, "__tensor_flatten__") and type(value) is not torch.nn.Parameter:
        subclass: Any = value
        names: list[str] = subclass.__tensor_flatten__()[0]
        return [x for name in names for x in _plain_tensors(getattr(value, name))]
    return [value]
