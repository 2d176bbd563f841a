"""How entries are quantized: the numbers of bits, and which entries stay in the model's dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from suffice.plain_numbers import plain_number

SUPPORTED_BITS = (2, 3, 4, 5, 8)

Bits: TypeAlias = int | tuple[int, int]
"""A number of bits of both keys and values, or a pair (bits of keys, bits of values)."""


@dataclass(frozen=True)
class Quantization:
    """How entries are quantized.

    Args:
        key_bits: number of bits of a number in a key: 2, 3, 4, 5 or 8.
        value_bits: number of bits of a number in a value: 2, 3, 4, 5 or 8.
        window: number of newest entries of each head that are not quantized.
        block: number of new tokens that are collected before the entries that have left the window are quantized.

    Raises:
        ValueError: a number of bits is not supported, `window` is negative, or `block` is below 1.

    """

    key_bits: int = 4
    value_bits: int = 4
    window: int = 32
    block: int = 32

    def __post_init__(self) -> None:
        for bits in self.bits:
            if bits not in SUPPORTED_BITS:
                raise ValueError(f"bits must be 2, 3, 4, 5 or 8, got {bits!r}")
        if self.window < 0:
            raise ValueError(f"window of a quantization must be at least 0, got {self.window}")
        if self.block < 1:
            raise ValueError(f"block of a quantization must be at least 1, got {self.block}")

    @property
    def bits(self) -> tuple[int, int]:
        """Number of bits of keys and of values."""
        return self.key_bits, self.value_bits


def parse_bits(bits: object) -> Quantization | None:
    """Check the argument `bits` of a cache: a number, a pair (bits of keys, bits of values), or None.

    Raises:
        TypeError: the argument has the wrong type.
        ValueError: a number of bits is not supported.

    """
    if bits is None:
        return None
    pair = [plain_number(x) for x in (bits if isinstance(bits, (tuple, list)) else (bits, bits))]
    numbers = [x for x in pair if isinstance(x, int) and not isinstance(x, bool)]
    if len(numbers) != 2 or len(pair) != 2:
        raise TypeError(f"bits must be a number of bits, a pair (bits of keys, bits of values) or None, got {bits!r}")
    return Quantization(*numbers)


def shortest_bits(bits: object) -> Bits | None:
    """Return the argument `bits` of a cache in its shortest form: one number if keys and values have the same.

    Raises:
        TypeError, ValueError: see `parse_bits`.

    Example:
        >>> shortest_bits([4, 4]), shortest_bits([4, 2]), shortest_bits(None)
        (4, (4, 2), None)

    """
    quantization = parse_bits(bits)
    if quantization is None:
        return None
    return quantization.key_bits if quantization.key_bits == quantization.value_bits else quantization.bits


def format_bits(bits: Bits | None) -> str:
    """Return a number of bits as text for tables: `4`, `4,2` (keys, values), or `none`."""
    return "none" if bits is None else str(bits) if isinstance(bits, int) else ",".join(map(str, bits))


def bits_suffix(bits: Bits | None) -> str:
    """Return text that follows a budget: `, 4 bits`, or nothing if entries are not quantized."""
    return "" if bits is None else f", {format_bits(bits)} bits"
