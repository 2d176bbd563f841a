"""Quantized keys and values. Each row of a batch is quantized independently of the other rows."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import Self

# Keys and values are scaled into [−256, 256]. 256 is the largest power of two that float8_e4m3fn represents.
_FP8 = torch.float8_e4m3fn
_FP8_EXPONENT = 8
_FP8_MAX = torch.finfo(_FP8).max
# Limits of the scales, within which neither the scales nor their inverses overflow in float32.
_MIN_EXPONENT, _MAX_EXPONENT = -100, 127


class QuantizedEntries(ABC):
    """Quantized keys and values of one layer. Copies share tensors, which are never overwritten."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new entries, and return all keys and values [batch, num_key_value_heads, width, dim], dequantized."""

    @abstractmethod
    def dequantize(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values [batch, num_key_value_heads, width, dim]."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that are stored, including scales and shifts."""

    @abstractmethod
    def select_rows(self, index: Tensor) -> None:
        """Select rows of the batch, as `torch.index_select` does, without quantizing them again."""

    @abstractmethod
    def drop_last(self, count: int) -> None:
        """Remove the newest entries of every row and head."""

    @abstractmethod
    def copy(self) -> Self:
        """Return independent entries that share the tensors."""


class Fp8Entries(QuantizedEntries):
    """8-bit floating-point numbers, with a power of two as scale for each key and for each value of a head.

    Entries are quantized independently of each other. Quantizing them a second time does not change them.

    Args:
        keys: [batch, num_key_value_heads, width, head_dim].
        values: [batch, num_key_value_heads, width, value_dim].

    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._dtypes = keys.dtype, values.dtype
        self._parts = (*_to_fp8(keys), *_to_fp8(values))

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new entries; see `QuantizedEntries.append`."""
        new = (*_to_fp8(keys), *_to_fp8(values))
        self._parts = tuple(torch.cat(pair, dim=2) for pair in zip(self._parts, new, strict=True))
        return self.dequantize()

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values."""
        keys, key_exponents, values, value_exponents = self._parts
        return _from_fp8(keys, key_exponents, self._dtypes[0]), _from_fp8(values, value_exponents, self._dtypes[1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The 8-bit numbers and the exponents."""
        return self._parts

    def select_rows(self, index: Tensor) -> None:
        """Select rows of the batch."""
        self._parts = tuple(part.index_select(0, index) for part in self._parts)

    def drop_last(self, count: int) -> None:
        """Remove the newest entries of every row and head."""
        self._parts = tuple(part[:, :, :-count].clone() for part in self._parts)

    def copy(self) -> Self:
        """Return independent entries that share the tensors."""
        return copy.copy(self)


class LayerEntries(QuantizedEntries):
    """Quantized cache layers of transformers, one for each row of the batch.

    Some backends share scales between rows, or iterate until the mean error over all rows is small enough. With one
    layer for each row, the result for a row does not depend on the other rows.

    Args:
        keys: [batch, num_key_value_heads, width, head_dim].
        values: [batch, num_key_value_heads, width, value_dim].
        make_layer: returns a new, empty quantized layer of transformers.

    """

    def __init__(self, keys: Tensor, values: Tensor, make_layer: Callable[[], Any]) -> None:
        self._make_layer = make_layer
        self._no_entries = keys[:1, :, :0].clone(), values[:1, :, :0].clone()
        self._layers = [self._new_layer(*row) for row in zip(keys.split(1), values.split(1), strict=True)]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new entries; see `QuantizedEntries.append`."""
        new = zip(self._layers, keys.split(1), values.split(1), strict=True)
        return _join([layer.update(*row) for layer, *row in new])

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values."""
        # An update without new tokens returns all entries.
        return _join([layer.update(*self._no_entries) for layer in self._layers])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the layers."""
        return tuple(x for layer in self._layers for x in _plain_tensors(vars(layer)))

    def select_rows(self, index: Tensor) -> None:
        """Select rows of the batch."""
        self._layers = [copy.copy(self._layers[row]) for row in index.tolist()]

    def drop_last(self, count: int) -> None:
        """Remove the newest entries. A layer is quantized again only if some of these entries are quantized."""
        self._layers = [self._shortened(layer, count) for layer in self._layers]

    def copy(self) -> Self:
        """Return independent entries that share the tensors."""
        other = copy.copy(self)
        other._layers = [copy.copy(layer) for layer in self._layers]
        return other

    def _new_layer(self, keys: Tensor, values: Tensor) -> Any:
        layer = self._make_layer()
        layer.update(keys, values)
        return layer

    def _shortened(self, layer: Any, count: int) -> Any:
        if layer.keys.dim() == 4 and layer.keys.shape[2] >= count:
            shorter = copy.copy(layer)
            shorter.keys, shorter.values = (x[:, :, :-count].clone() for x in (layer.keys, layer.values))
            shorter.cumulative_length -= count
            return shorter
        keys, values = layer.update(*self._no_entries)
        return self._new_layer(keys[:, :, :-count], values[:, :, :-count])


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bytes of 8-bit numbers [..., dim], and for each vector the exponent of its scale, int8 [..., 1]."""
    x = x.float()
    mantissas, exponents = torch.frexp(x.abs().amax(-1, keepdim=True))
    # The largest number is at most 2 to this power, and may be equal to it. A number that is rounded up to a power of
    # two therefore does not change the scale when the vector is quantized again.
    exponents = (exponents - (mantissas == 0.5).int()).clamp(_MIN_EXPONENT, _MAX_EXPONENT)
    scaled = torch.ldexp(x, _FP8_EXPONENT - exponents).clamp(-_FP8_MAX, _FP8_MAX)
    return scaled.to(_FP8).view(torch.uint8), exponents.to(torch.int8)


def _from_fp8(numbers: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ldexp(numbers.view(_FP8).float(), exponents.int() - _FP8_EXPONENT).to(dtype)


def _join(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(rows) == 1:
        return rows[0]
    keys, values = zip(*rows, strict=True)
    return torch.cat(keys), torch.cat(values)


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
