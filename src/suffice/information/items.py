"""The items of a set: weighted vectors, checked and brought to the scale in which the algebra is safe."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.information.arguments import check_mask, check_vectors, check_weights, require_finite
from suffice.information.linalg import matmul, working_dtype

CHUNK = 1024
"""Rows of a set that are worked on at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """Weighted vectors as rows √(w / weight_scale) · u / vector_scale, zero where invalid, and their Gram."""

    vectors: Tensor  # [..., n, d], 0 where invalid
    weights: Tensor  # [..., n], 0 where invalid
    gram: Tensor  # [..., d, d], Σ of the rows' outer products
    vector_scale: Tensor  # [...]
    weight_scale: Tensor  # [...]

    @property
    def rows(self) -> Tensor:
        """The scaled rows, [..., n, d]; made at each call, since the Gram matrix alone needs none of them."""
        return scale_rows(self.vectors, self.weights, self.vector_scale, self.weight_scale)


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
    gram = _scaled_gram(vectors, weights, unit, unit)
    if relative and not _in_safe_range(gram):
        tiny = torch.finfo(dtype).tiny
        largest = torch.maximum(vectors.amax((-2, -1)), -vectors.amin((-2, -1)))
        vector_scale = largest.clamp(min=tiny, max=1 / tiny)  # so that the reciprocal is a normal number
        heaviest = weights.amax(-1)
        # Items without any weight keep their own scale: there is nothing to bring into range.
        weight_scale = torch.where(heaviest == 0, 1.0, heaviest.clamp(min=tiny))
        gram = _scaled_gram(vectors, weights, vector_scale, weight_scale)
    else:
        vector_scale = weight_scale = unit
    require_finite(gram, vectors, weights)
    return Items(vectors, weights, gram, vector_scale, weight_scale)


def _scaled_gram(vectors: Tensor, weights: Tensor, vector_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Σ of the outer products of the scaled rows, [..., d, d]."""
    # In chunks, so that no second n × d buffer is needed: on a CPU its page faults cost as much as the matmul.
    size = vectors.shape[-1]
    total = vectors.new_zeros((*vectors.shape[:-2], size, size))
    for part, own in zip(vectors.split(CHUNK, dim=-2), weights.split(CHUNK, dim=-1), strict=True):
        rows = scale_rows(part, own, vector_scale, weight_scale)
        total += matmul(rows.mT, rows)
    return total


def _in_safe_range(gram: Tensor) -> bool:
    """Whether squares of what is in the Gram matrices stay far from the ends of their dtype's range."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return bool(((trace > 1e-12) & (trace < 1e12)).all())


def scale_rows(vectors: Tensor, weights: Tensor, vector_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """√(w / weight_scale) · u / vector_scale, [..., n, d]; NaN where a weight is negative."""
    # The root first: it halves the exponents, so that the quotient of any two weights stays in range.
    root = weights.sqrt() / weight_scale.sqrt().unsqueeze(-1) / vector_scale.unsqueeze(-1)
    return vectors * root.unsqueeze(-1)
