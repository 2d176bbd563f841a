"""A set of weighted vectors, validated and scaled so that its Gram matrix neither overflows nor underflows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.information.linalg import matmul, working_dtype
from suffice.information.validation import check_gram_finite, check_mask, check_vectors, check_weights

CHUNK_SIZE = 1024
"""Number of vectors that are processed at a time.

Chunks avoid a second buffer of n × d numbers, whose page faults cost as much as the matrix product on a CPU.
"""


@dataclass(frozen=True, slots=True, eq=False)
class WeightedSet:
    """Weighted vectors with their scales and the Gram matrix of the scaled rows.

    The scaled row of a vector u with weight w is √(w / weight_scale) · u / vector_scale.
    """

    vectors: Tensor  # [..., n, d], 0 where invalid
    weights: Tensor  # [..., n], 0 where invalid
    gram: Tensor  # [..., d, d], sum of the outer products of the scaled rows
    vector_scale: Tensor  # [...]
    weight_scale: Tensor  # [...]

    @classmethod
    def from_vectors(
        cls,
        vectors: Tensor,
        weights: Tensor | None,
        valid: Tensor | None,
        relative: bool,
        dtype: torch.dtype | None = None,
    ) -> WeightedSet:
        """Validate weighted vectors, and scale them where their Gram matrix is close to the limits of its dtype.

        With `relative`, scaling makes the largest weight and the largest entry of a vector 1 in each batch element.
        Results that are relative to the trace of the Gram matrix do not depend on these scales.

        Args:
            vectors: [..., n, d].
            weights: [..., n]; all 1 if None.
            valid: boolean [..., n]; all valid if None. The contents of invalid vectors are ignored.
            relative: whether vectors and weights may be scaled. If not, both scales are 1.
            dtype: precision of the result; `working_dtype` of the inputs if None.

        Raises:
            TypeError: an input has the wrong type or dtype.
            ValueError: shapes do not match, an input is NaN, infinite or negative, or the Gram matrix overflows.

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

        one = vectors.new_ones(shape[:-1])
        gram = _scaled_gram(vectors, weights, one, one)
        if relative and not _is_in_safe_range(gram):
            tiny = torch.finfo(dtype).tiny
            largest_entry = torch.maximum(vectors.amax((-2, -1)), -vectors.amin((-2, -1)))
            vector_scale = largest_entry.clamp(min=tiny, max=1 / tiny)  # so that the reciprocal is a normal number
            largest_weight = weights.amax(-1)
            # A scale of 1 where all weights are 0.
            weight_scale = torch.where(largest_weight == 0, 1.0, largest_weight.clamp(min=tiny))
            gram = _scaled_gram(vectors, weights, vector_scale, weight_scale)
        else:
            vector_scale = weight_scale = one
        check_gram_finite(gram, vectors, weights)
        return cls(vectors, weights, gram, vector_scale, weight_scale)

    @property
    def rows(self) -> Tensor:
        """The scaled rows [..., n, d]. They are computed at each access, because many results need only `gram`."""
        return scale_rows(self.vectors, self.weights, self.vector_scale, self.weight_scale)


def scale_rows(vectors: Tensor, weights: Tensor, vector_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Return √(w / weight_scale) · u / vector_scale, [..., n, d]; NaN where a weight is negative."""
    return vectors * _row_scale(weights, vector_scale, weight_scale)


def _row_scale(weights: Tensor, vector_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Return √(w / weight_scale) / vector_scale, [..., n, 1]."""
    # The square root comes first: it halves the exponents, so that the quotient of any two weights is in range.
    return (weights.sqrt() / weight_scale.sqrt().unsqueeze(-1) / vector_scale.unsqueeze(-1)).unsqueeze(-1)


def _scaled_gram(vectors: Tensor, weights: Tensor, vector_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Return the sum of the outer products of the scaled rows, [..., d, d]."""
    size = vectors.shape[-1]
    total = vectors.new_zeros((*vectors.shape[:-2], size, size))
    scale = _row_scale(weights, vector_scale, weight_scale)
    for part, part_scale in zip(vectors.split(CHUNK_SIZE, dim=-2), scale.split(CHUNK_SIZE, dim=-2), strict=True):
        rows = part * part_scale
        total += matmul(rows.mT, rows)
    return total


def _is_in_safe_range(gram: Tensor) -> bool:
    """Return whether squares of the entries of the Gram matrices are far from overflow and underflow."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return bool(((trace > 1e-12) & (trace < 1e12)).all())
