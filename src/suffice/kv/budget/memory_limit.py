"""The argument `memory` of a cache: a limit on its bytes."""

from __future__ import annotations

import re
import sys
from fractions import Fraction

from suffice.plain_numbers import plain_number

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


def parse_memory(memory: object) -> int | float:
    """Return the argument `memory` of a cache: a fraction (float), or a number of bytes (int).

    Raises:
        TypeError: the argument has the wrong type.
        ValueError: the argument is out of range, or a string that is not a number of bytes.

    """
    number = plain_number(memory)
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", memory)
        # "0.5" is neither a fraction, which is a float, nor a whole number of bytes.
        if match is None or match[2].lower() not in _UNITS or ("." in match[1] and not match[2]):
            raise ValueError(_not_accepted(memory))
        number = int(Fraction(match[1]) * _UNITS[match[2].lower()])
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(_not_accepted(memory))
    if not number > 0 or (isinstance(number, float) and number > 1):
        raise ValueError(_not_accepted(memory))
    return min(number, sys.maxsize)


def _not_accepted(memory: object) -> str:
    return (
        "memory must be a fraction of the full cache (0 < float <= 1.0), a number of bytes (int, at least 1), or a "
        f"number with a unit such as '2GiB' or '500MB', got {memory!r}"
    )


def parse_limit(memory: object, budget: object) -> int | float | None:
    """Return the limit on the bytes of a cache: a fraction (float), a number of bytes (int), or None without a limit.

    Raises:
        TypeError: `memory` has the wrong type.
        ValueError: `memory` is out of range or not a number of bytes, or both `memory` and `budget` are given.

    """
    if memory is None:
        return None
    limit = parse_memory(memory)
    if budget is not None:
        raise ValueError(f"budget must be None with memory={memory!r}, from which it follows, got {budget!r}")
    return limit


def format_memory(memory: float | str) -> str:
    """Return a limit as a string: a percentage, or a whole number of the largest possible unit of bytes.

    Example:
        >>> format_memory(0.125), format_memory("2GiB"), format_memory(1_500_000)
        ('12.5%', '2 GiB', '1500 kB')

    """
    limit = parse_memory(memory)
    if isinstance(limit, float):
        return f"{100 * limit:g}%"
    names = {size: f"{unit[0].upper()}{unit[1:-1]}B" for unit, size in _UNITS.items() if len(unit) > 1}
    size = max((size for size in names if limit % size == 0), default=1)
    return f"{limit // size} {names.get(size, 'B').replace('KB', 'kB')}"
