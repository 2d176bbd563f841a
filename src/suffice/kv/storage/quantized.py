"""Storage of kept keys and values in transformers' own quantised cache layers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils

from suffice.kv.storage.uniform import UniformStorage

# Each with transformers' class for it and the package that it needs.
_BACKENDS = {
    "quanto": ("QuantoQuantizedLayer", "optimum-quanto"),
    "hqq": ("HQQQuantizedLayer", "hqq"),
    "fp8": ("Fp8QuantizedLayer", "a newer transformers"),
}


@dataclass(frozen=True)
class Quantization:
    """How kept entries are quantised.

    Args:
        backend: `"quanto"` and `"hqq"` store whole numbers of few bits with a scale and a shift for each group of
            dimensions of an entry, `"fp8"` floating-point numbers of 8 bits with one scale for a layer.
        bits: of a number, as the backend allows; `"fp8"` has 8.
        group: dimensions that share a scale; None takes as many as divide the head dimension, at most 64.
        residual: new tokens that stay as they are before they are quantised too; not of `"fp8"`.

    """

    backend: str = "quanto"
    bits: int = 4
    group: int | None = None
    residual: int = 128

    def __post_init__(self) -> None:
        if self.backend not in _BACKENDS:
            raise ValueError(f"quantized is {self.backend!r}; accepted: {', '.join(map(repr, _BACKENDS))}, or None")
        if self.residual < 1:
            raise ValueError(f"residual is {self.residual}; accepted: at least 1 token")

    def check(self) -> None:
        """Raise unless the backend is here and takes these numbers.

        Raises:
            ImportError: it needs a package that is not installed.
            ValueError: it does not take them.

        """
        self.layer(64)

    def layer(self, dim: int) -> Any:
        """Return a new, empty layer of transformers' for heads of so many dimensions."""
        name, package = _BACKENDS[self.backend]
        kind = getattr(cache_utils, name, None)
        missing = f"quantized is {self.backend!r}, which needs {package}; install it, or choose another backend"
        if kind is None:
            raise ImportError(missing)
        if self.backend == "fp8":
            return kind()
        try:
            return kind(nbits=self.bits, q_group_size=self.group or min(64, dim & -dim), residual_length=self.residual)
        except ImportError:
            raise ImportError(missing) from None


class QuantizedStorage(UniformStorage):
    """Entries of heads of equal length, quantised; positions and what stands beside them stay as they are.

    All entries exist in full between `append` and `settle` only, while one layer's attention reads them.

    Args:
        entries: what to store.
        quantization: how.

    """

    def __init__(self, entries: UniformStorage, quantization: Quantization) -> None:
        self.quantization = quantization
        self._entry = entries.nbytes_entry
        self._whole: tuple[Tensor, Tensor] | None = None
        super().__init__(entries.keys, entries.values, entries.positions, entries.places, entries.columns)
        del self._parts["keys"], self._parts["values"]
        self._become(entries.keys, entries.values)

    def _become(self, keys: Tensor, values: Tensor) -> None:
        self._none = keys[:, :, :0].clone(), values[:, :, :0].clone()
        self._layer = self.quantization.layer(keys.shape[-1])
        self._layer.update(keys, values)
        self._most = keys.abs().amax(), values.abs().amax()
        self._whole = None

    def _read(self) -> tuple[Tensor, Tensor]:
        """Keys and values in the model's dtype, to the precision that is left of them."""
        if self._whole is not None:
            return self._whole
        # To add nothing is transformers' way to ask for all.
        return self._layer.update(*self._none)

    @property
    def keys(self) -> Tensor:
        """Stored keys [batch, kv_heads, width, dim], put together when they are asked for."""
        return self._read()[0]

    @property
    def values(self) -> Tensor:
        """Stored values [batch, kv_heads, width, value_dim], put together when they are asked for."""
        return self._read()[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors in which transformers' layer holds keys and values, scales and shifts among them."""
        return tuple(_tensors(vars(self._layer)))

    @property
    def nbytes(self) -> int:
        """Bytes of these tensors."""
        return sum(x.nbytes for x in self.tensors)

    @property
    def nbytes_entry(self) -> int:
        """Bytes of one key and value before they are quantised."""
        return self._entry

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, *, padded: bool = False) -> None:
        """Add the entries of new tokens; `positions` is [batch, new]; `padded` if some are padding."""
        if self.quantization.backend == "fp8":
            # Its scale is that of the first entries; what is beyond would become NaN.
            keys, values = (x.clamp(-most, most) for x, most in zip((keys, values), self._most, strict=True))
        self._whole = self._layer.update(keys, values)
        self._add({}, positions, padded)

    def settle(self) -> None:
        """Let go of what was put together."""
        self._whole = None

    def rows(self, index: Tensor) -> None:
        """Keep, reorder or repeat rows of the batch: row j becomes what row index[j] was."""
        own = index.to(self.positions.device)
        keys, values = (x.index_select(0, own) for x in self._read())
        super().rows(index)
        self._become(keys, values)

    def drop_last(self, tokens: int) -> None:
        """Forget the newest entries."""
        keys, values = (x[:, :, :-tokens] for x in self._read())
        super().drop_last(tokens)
        self._become(keys, values)

    def copy(self) -> QuantizedStorage:
        """Return a storage that shares the tensors, which neither writes to."""
        other = copy.copy(self)
        other._parts = dict(self._parts)
        other._layer = copy.copy(self._layer)
        return other


def _tensors(held: Any) -> list[Tensor]:
    """Return the plain tensors in nested containers and tensor subclasses."""
    if isinstance(held, dict):
        return [x for part in held.values() for x in _tensors(part)]
    if isinstance(held, (tuple, list)):
        return [x for part in held for x in _tensors(part)]
    if not isinstance(held, Tensor):
        return []
    if hasattr(held, "__tensor_flatten__") and type(held) is not torch.nn.Parameter:
        parted: Any = held  # subclasses alone have the method
        names: list[str] = parted.__tensor_flatten__()[0]
        return [x for name in names for x in _tensors(getattr(held, name))]
    return [held]
