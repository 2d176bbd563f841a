"""Checks of arguments. Each check returns the argument, or raises an error that states what is accepted."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from suffice.plain_numbers import plain_number


def check_floating(name: str, value: object) -> Tensor:
    """Return `value` if it is a tensor of real floating point numbers.

    Raises:
        TypeError: `value` is not such a tensor.

    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating point dtype, got {value.dtype}")
    return value


def check_vectors(vectors: object) -> Tensor:
    """Return `vectors` if it is a floating point tensor [..., n, d] that is not empty.

    Raises:
        TypeError: `vectors` is not a floating point tensor.
        ValueError: `vectors` has fewer than two dimensions, or a dimension of size 0.

    """
    vectors = check_floating("vectors", vectors)
    if vectors.ndim < 2 or vectors.numel() == 0:
        raise ValueError(f"vectors must have shape [..., n, d] with every size at least 1, got {tuple(vectors.shape)}")
    return vectors


def check_square(name: str, matrix: object) -> Tensor:
    """Return `matrix` if it is a floating point tensor [..., d, d] with d ≥ 1.

    Raises:
        TypeError: `matrix` is not a floating point tensor.
        ValueError: `matrix` is not square.

    """
    matrix = check_floating(name, matrix)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., d, d] with d at least 1, got {tuple(matrix.shape)}")
    return matrix


def check_weights(weights: object, vectors: Tensor) -> Tensor:
    """Return `weights` expanded to one weight for each of the `vectors` [..., n, d].

    Negative and NaN weights are detected later, by `check_gram_finite`, without another pass over the weights.

    Raises:
        TypeError: `weights` is not a floating point tensor.
        ValueError: the shape or device of `weights` does not match `vectors`.

    """
    return _expand("weights", check_floating("weights", weights), vectors.shape[:-1], vectors.device)


def check_mask(name: str, mask: object, shape: torch.Size, device: torch.device) -> Tensor:
    """Return the boolean `mask` expanded to `shape` [..., n].

    Raises:
        TypeError: `mask` is not a boolean tensor.
        ValueError: the shape or device of `mask` does not match.

    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype torch.bool, got {mask.dtype}")
    return _expand(name, mask, shape, device)


def check_subset(subset: object, shape: torch.Size, device: torch.device) -> Tensor:
    """Return `subset`, a boolean mask [..., n] or distinct long indices [..., m], as a mask of `shape` [..., n].

    Raises:
        TypeError: `subset` is neither a boolean nor a long tensor.
        ValueError: the shape of `subset` does not match, or an index is out of range or repeated.

    """
    if not isinstance(subset, Tensor):
        raise TypeError(f"subset must be a torch.Tensor, got {type(subset).__name__}")
    if subset.dtype == torch.bool:
        return check_mask("subset", subset, shape, device)
    if subset.dtype != torch.long:
        raise TypeError(f"subset must have dtype torch.bool or torch.long, got {subset.dtype}")
    size = subset.shape[-1] if subset.ndim else 0
    index = _expand("subset", subset, torch.Size((*shape[:-1], size)), device)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < shape[-1]:
        raise ValueError(
            f"subset must contain indices from 0 to {shape[-1] - 1}, got {int(index.min())} to {int(index.max())}"
        )
    mask = torch.zeros(shape, dtype=torch.bool, device=device).scatter(-1, index, True)
    if (num_distinct := int(mask.sum())) != index.numel():
        raise ValueError(f"subset must contain each index at most once, got {index.numel() - num_distinct} repeated")
    return mask


def check_ridge(ridge: object) -> float:
    """Return `ridge` if it is a finite number above 0.

    Raises:
        TypeError: `ridge` is not a number.
        ValueError: `ridge` is not finite or not above 0.

    """
    number = plain_number(ridge)
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise TypeError(f"ridge must be a number, got {type(ridge).__name__}")
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"ridge must be finite and above 0, got {ridge}")
    return float(number)


def all_finite(x: Tensor) -> bool:
    """Return whether no number in a tensor is NaN or infinite."""
    return math.isfinite(torch.linalg.vector_norm(x, ord=math.inf).item())


def check_gram_finite(gram: Tensor, vectors: Tensor, weights: Tensor | None) -> None:
    """Raise if the Gram matrix [..., d, d] of weighted vectors is not finite, and name the input that caused it.

    Every NaN, infinite entry and negative weight makes an entry on the diagonal of Σ w u uᵀ non-finite, because the
    rows are multiplied by √w and NaN · 0 is NaN. Checking d numbers therefore replaces a pass over n · d numbers.

    Raises:
        ValueError: an input is NaN, infinite or negative where it must not be, or the Gram matrix overflows.

    """
    if not all_finite(gram.diagonal(dim1=-2, dim2=-1)):
        _raise_not_finite(gram, vectors, weights)


def _raise_not_finite(gram: Tensor, vectors: Tensor, weights: Tensor | None) -> NoReturn:
    for name, value in (("vectors", vectors), ("weights", weights)):
        if value is not None and (count := int((~value.isfinite()).sum())):
            raise ValueError(f"{name} must be finite, got {count} NaN or infinite entries")
    if weights is not None and (smallest := float(weights.min())) < 0:
        raise ValueError(f"weights must be at least 0, got {smallest}")
    raise ValueError(
        f"vectors and weights must have a Gram matrix within the range of {gram.dtype}, "
        f"got vectors up to {float(vectors.abs().max()):.3g}. Use smaller vectors or weights"
    )


def _expand(name: str, value: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """Return `value` expanded to `shape`. The last dimension must match; leading dimensions broadcast."""
    fits = (
        0 < value.ndim <= len(shape)
        and value.shape[-1] == shape[-1]
        and all(size in (1, full) for size, full in zip(value.shape[::-1], shape[::-1], strict=False))
    )
    if not fits:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like the other inputs, got {value.device}")
    return value.expand(shape)
