"""Numbers of NumPy and of other libraries as Python numbers."""

from __future__ import annotations

from numbers import Integral, Real


def plain_number(value: object) -> object:
    """Return an integral number as an int, another real number as a float, and any other value unchanged.

    Users may pass NumPy numbers as arguments. Most of them are not an `int` or a `float`, and JSON cannot represent
    them. A bool is returned unchanged.

    Example:
        >>> import numpy as np
        >>> plain_number(np.int64(3)), plain_number(np.float32(0.5)), plain_number("3")
        (3, 0.5, '3')

    """
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value
