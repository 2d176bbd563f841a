"""Numbers of NumPy and of other libraries as Python numbers."""

from __future__ import annotations

from numbers import Integral, Real


def plain_number(value: object) -> object:
    """Return an integral number as an int, another real number as a float, and any other value unchanged.

    Arguments may be numbers of NumPy, which are neither an `int` nor JSON. A bool is not a number here.

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
