"""The items of a set: weighted vectors, checked and brought to the scale in which the algebra is safe."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retain.information.arguments import check_mask, check_vectors, check_weights, require_finite
from retain.information.linalg import matmul, working_dtype


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """Weighted vectors as rows √(w / weight_scale) · u / vector_scale, zero where invalid, and their Gram."""

    rows: Tensor  # [..., n, d]
    gram: Tensor  # [..., d, d], Σ of the rows' outer products
    vector_scale: Tensor  # [...]
    weight_scale: Tensor  # [...]


def collect_items(
    vectors: Tensor,
    weights: Tensor | None,
    valid: Tensor | None,
    relative: bool,
    dtype: torch.dtype | None = None,
) -> Items:
    """Check weighted vectors and scale them.

    With `relative`, where a Gram matrix nears the ends of its range, the largest weight and the largest entry
    of a vector become 1 in each batch element: what is relative to the trace does not change, and no square
    leaves the range of the dtype.

    Args:
        vectors: [..., n, d].
        weights: [..., n] or None for 1.
        valid: Bool [..., n] or None for all. What invalid items hold is never looked at.
        relative: Whether to scale; else both scales are 1.
        dtype: Precision to work in; `working_dtype` of the inputs if not given.

    Raises:
        TypeError: An input has the wrong type or dtype.
        ValueError: Shapes do not fit, an input is NaN, infinite or negative, or the Gram matrix overflows.

    """
    vectors = check_vectors(vectors)
    shape = vectors.shape[:-1]
    weights = vectors.new_ones(shape) if weights is None else check_weights(weights, vectors)
    dtype = dtype or working_dtype(torch.promote_types(vectors.dtype, weights.dtype))
    vectors, weights = vectors.to(dtype), weights.to(dtype)
    if valid is not None:
        valid = check_mask("valid", valid, shape, vectors.device)
        vectors = torch.where(valid.unsqueeze(-1), vectors, 0.0)
        weights = torch.where(valid, weights, 0.0)

    unit = vectors.new_ones(shape[:-1])
    rows = scale_rows(vectors, weights, unit, unit)
    gram = matmul(rows.mT, rows)
    if relative and not _in_safe_range(gram):
        tiny = torch.finfo(dtype).tiny
        largest = torch.maximum(vectors.amax((-2, -1)), -vectors.amin((-2, -1)))
        vector_scale = largest.clamp(min=tiny, max=1 / tiny)  # so that the reciprocal is a normal number
        weight_scale = weights.amax(-1).clamp(min=tiny)
        rows = scale_rows(vectors, weights, vector_scale, weight_scale)
        gram = matmul(rows.mT, rows)
    else:
        vector_scale = weight_scale = unit
    require_finite(gram, vectors, weights)
    return Items(rows, gram, vector_scale, weight_scale)


def _in_safe_range(gram: Tensor) -> bool:
    """Whether squares of what is in the Gram matrices stay far from the ends of their dtype's range."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return bool(((trace > 1e-12) & (trace < 1e12)).all())


def scale_rows(vectors: Tensor, weights: Tensor, vector_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """√(w / weight_scale) · u / vector_scale, [..., n, d]; NaN where a weight is negative."""
    # The root first: it halves the exponents, so that the quotient of any two weights stays in range.
    root = weights.sqrt() / weight_scale.sqrt().unsqueeze(-1) / vector_scale.unsqueeze(-1)
    return vectors * root.unsqueeze(-1)
