"""Checks of arguments: what is wrong, what was given, what is accepted."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor


def check_floating(name: str, value: object) -> Tensor:
    """Return `value` if it is a tensor of real floating point numbers.

    Raises:
        TypeError: It is not.

    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor (got {type(value).__name__})")
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating point dtype (got {value.dtype})")
    return value


def check_vectors(vectors: object) -> Tensor:
    """Return `vectors` if it is floating, [..., n, d], and not empty.

    Raises:
        TypeError: It is not a floating point tensor.
        ValueError: It has fewer than two dimensions, or one of size 0.

    """
    vectors = check_floating("vectors", vectors)
    if vectors.ndim < 2 or vectors.numel() == 0:
        raise ValueError(f"vectors must have shape [..., n, d] with every size at least 1 (got {tuple(vectors.shape)})")
    return vectors


def check_square(name: str, matrix: object) -> Tensor:
    """Return `matrix` if it is floating and [..., d, d] with d ≥ 1.

    Raises:
        TypeError: It is not a floating point tensor.
        ValueError: It is not square.

    """
    matrix = check_floating(name, matrix)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., d, d] with d at least 1 (got {tuple(matrix.shape)})")
    return matrix


def check_weights(weights: object, like: Tensor) -> Tensor:
    """Return `weights` expanded to the items of `like` [..., n, d].

    Signs and NaN are left to `require_finite`, which sees them at no cost in the Gram matrix.

    Raises:
        TypeError: They are not a floating point tensor.
        ValueError: Their shape or device is not that of the items.

    """
    return _expand("weights", check_floating("weights", weights), like.shape[:-1], like.device)


def check_mask(name: str, mask: object, shape: torch.Size, device: torch.device) -> Tensor:
    """Return the boolean `mask` expanded to the items' `shape` [..., n].

    Raises:
        TypeError: It is not a boolean tensor.
        ValueError: Its shape or device is not that of the items.

    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor (got {type(mask).__name__})")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must have dtype torch.bool (got {mask.dtype})")
    return _expand(name, mask, shape, device)


def check_subset(subset: object, shape: torch.Size, device: torch.device) -> Tensor:
    """Return `subset`, a bool mask [..., n] or unique long indices [..., m], as a mask of `shape` [..., n].

    Raises:
        TypeError: It is neither a boolean nor a long tensor.
        ValueError: Its shape does not fit, or an index is out of range or repeated.

    """
    if not isinstance(subset, Tensor):
        raise TypeError(f"subset must be a torch.Tensor (got {type(subset).__name__})")
    if subset.dtype == torch.bool:
        return check_mask("subset", subset, shape, device)
    if subset.dtype != torch.long:
        raise TypeError(f"subset must have dtype torch.bool or torch.long (got {subset.dtype})")
    size = subset.shape[-1] if subset.ndim else 0
    index = _expand("subset", subset, torch.Size((*shape[:-1], size)), device)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < shape[-1]:
        raise ValueError(f"subset must index items 0 to {shape[-1] - 1} (got {int(index.min())} to {int(index.max())})")
    mask = torch.zeros(shape, dtype=torch.bool, device=device).scatter(-1, index, True)
    if int(mask.sum()) != index.numel():
        raise ValueError("subset must hold each index at most once (got repeated indices)")
    return mask


def check_ridge(ridge: object) -> float:
    """Return `ridge` if it is a finite number above 0.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not finite or not above 0.

    """
    if isinstance(ridge, bool) or not isinstance(ridge, int | float):
        raise TypeError(f"ridge must be a number (got {type(ridge).__name__})")
    if not (ridge > 0 and math.isfinite(ridge)):
        raise ValueError(f"ridge must be finite and above 0 (got {ridge})")
    return float(ridge)


def check_count(name: str, value: object, most: int | None = None) -> int:
    """Return `value` if it is an int from 1 to `most`.

    Raises:
        TypeError: It is not an int.
        ValueError: It is out of range.

    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int (got {type(value).__name__})")
    if value < 1 or (most is not None and value > most):
        accepted = "at least 1" if most is None else f"from 1 to {most}"
        raise ValueError(f"{name} must be {accepted} (got {value})")
    return value


def require_finite(gram: Tensor, vectors: Tensor, weights: Tensor | None) -> None:
    """Raise if the Gram matrix of the items is not finite, saying which of its inputs is to blame.

    A NaN, an infinite entry or a negative weight of any item reaches the diagonal of Σ w u uᵀ (through √w,
    and NaN · 0 is NaN), so that d numbers show what would take a pass over n · d.

    Raises:
        ValueError: An input is NaN, infinite or negative where it must not be, or the Gram matrix overflows.

    """
    if not gram.diagonal(dim1=-2, dim2=-1).isfinite().all():
        _blame(gram, vectors, weights)


def _blame(gram: Tensor, vectors: Tensor, weights: Tensor | None) -> NoReturn:
    for name, value in (("vectors", vectors), ("weights", weights)):
        if value is not None and (bad := int((~value.isfinite()).sum())):
            raise ValueError(f"{name} must be finite (got {bad} NaN or infinite entries)")
    if weights is not None and (low := float(weights.min())) < 0:
        raise ValueError(f"weights must be at least 0 (got {low})")
    raise ValueError(
        f"vectors and weights must have a Gram matrix within the range of {gram.dtype} "
        f"(got vectors up to {float(vectors.abs().max()):.3g}): scale them down"
    )


def _expand(name: str, value: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    fits = (
        0 < value.ndim <= len(shape)
        and value.shape[-1] == shape[-1]
        and all(size in (1, full) for size, full in zip(value.shape[::-1], shape[::-1], strict=False))
    )
    if not fits:
        raise ValueError(f"{name} must have shape {tuple(shape)} (got {tuple(value.shape)})")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like the other inputs (got {value.device})")
    return value.expand(shape)
