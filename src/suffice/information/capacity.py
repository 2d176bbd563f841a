"""Information capacity of a set of weighted vectors, and the contribution of each vector to it.

The model is the linear-Gaussian surrogate of attention of arXiv 2604.25975. A set S of vectors u_i with weights w_i ≥ 0
determines an output Y with noise of variance σ²:

    (1)  Y = Σ_{i∈S} √w_i u_i z_i + ε,  z_i ~ N(0, 1),  ε ~ N(0, σ²I)

With G = Σ w_i u_i u_iᵀ over all items and A = σ²I + G, the quantities of this module are

    (2)  C(S) = ½ log det(I + σ⁻² Σ_{i∈S} w_i u_i u_iᵀ)   capacity in nats; the objective of the paper
    (3)  s_i = w_i u_iᵀ A⁻¹ u_i                           leverage score of item i; Algorithm 1 of the paper
    (4)  −½ log(1 − s_i)                                  deletion cost: capacity lost if only item i is deleted
    (5)  Σ s_i = d − σ² tr A⁻¹                            effective dimension
    (6)  σ² = λ tr(G) / d  or  σ² = λ                     noise variance for a relative or an absolute ridge λ

The paper uses σ² = 1 (`ridge=1.0, relative=False`). The ranking of the items then depends on the scale of the vectors
and weights, which is arbitrary. With the default `relative=True`, all results are invariant to both scales.

All functions share these arguments:

* `vectors`: u, [..., n, d].
* `weights`: w ≥ 0, [..., n]; all 1 if None.
* `valid`: boolean mask [..., n] of the items that exist; all if None. The contents of invalid items are ignored.
* `ridge`, `relative`: λ, and whether it is relative to the trace of G, as in Eq. (6).

Results are float64 if an input is, otherwise float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.information.linalg import matmul, psd_cholesky, triangular_inverse, working_dtype
from suffice.information.validation import (
    all_finite,
    check_floating,
    check_ridge,
    check_square,
    check_subset,
    check_vectors,
    check_weights,
)
from suffice.information.weighted_set import CHUNK_SIZE, WeightedSet, scale_rows

MIN_FLOAT32_RIDGE = 1e-4
"""Smallest ratio of σ² to the mean eigenvalue of G for which a Gram matrix in float32 is precise enough.

For sets of low rank, its rounding errors change results by about 1e-3 at this ratio, and by 1e-5 at a ratio of 1e-2.
"""


def noise_variance(gram: Tensor, ridge: float = 0.1, relative: bool = True) -> Tensor:
    """Return the noise variance σ² of Eq. (6).

    Args:
        gram: G, [..., d, d].
        ridge: λ > 0, without unit if relative, otherwise in units of G.
        relative: whether σ² is proportional to the trace of G. σ² is then 1 where the trace is 0.

    Returns:
        [...], at least the smallest normal number of its dtype.

    Raises:
        TypeError: `gram` is not a floating point tensor, or `ridge` is not a number.
        ValueError: `gram` is not square, its trace is not finite, or `ridge` is not finite and above 0.

    Example:
        >>> noise_variance(torch.diag(torch.tensor([1.0, 3.0])), ridge=0.5)
        tensor(1.)

    """
    gram = check_square("gram", gram)
    ridge = check_ridge(ridge)
    dtype = working_dtype(gram.dtype)
    trace = gram.diagonal(dim1=-2, dim2=-1).to(dtype).sum(-1)  # [...]
    noise = trace * (ridge / gram.shape[-1]) if relative else torch.ones_like(trace) * ridge
    # A relative noise variance is not finite where the trace is not.
    if not (all_finite(noise) and (relative or all_finite(trace))):
        if not all_finite(trace):
            raise ValueError("gram must have a finite trace, got NaN or Inf")
        raise ValueError(f"ridge must give a noise variance within the range of {dtype}, got {ridge}")
    noise = noise.clamp(min=torch.finfo(dtype).tiny)
    return torch.where(trace > 0, noise, 1.0) if relative else noise


@dataclass(frozen=True, slots=True, eq=False)
class CholeskyFactor:
    """Cholesky factor of A = σ²I + G for a set of weighted vectors.

    A and σ² are those of the scaled vectors u / vector_scale and weights w / weight_scale, which neither overflow nor
    underflow. The scales are 1 where no scaling is needed, and always if σ² is absolute. Results of the methods are in
    the original units.
    """

    cholesky: Tensor  # [..., d, d], lower triangular, float64: in float32, adding a small σ² to G would not change it
    noise: Tensor  # [...], σ²
    vector_scale: Tensor  # [...]
    weight_scale: Tensor  # [...]
    dtype: torch.dtype  # of the results

    @property
    def capacity(self) -> Tensor:
        """Capacity of the whole set in nats, [...]; Eq. (2)."""
        pivots = self.cholesky.diagonal(dim1=-2, dim2=-1)  # [..., d]
        total = (pivots / self.noise.double().sqrt().unsqueeze(-1)).log().sum(-1)
        return total.clamp(min=0).to(self.dtype)

    @property
    def effective_dimension(self) -> Tensor:
        """Effective dimension of the set, [...], from 0 to d; Eq. (5)."""
        inverse = triangular_inverse(self.cholesky) * self.noise.double().sqrt()[..., None, None]
        size = self.cholesky.shape[-1]
        return (size - inverse.square().sum((-2, -1))).clamp(min=0).to(self.dtype)

    def leverage(self, vectors: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the leverage scores w uᵀA⁻¹u of items inside or outside the set; Eq. (3).

        Args:
            vectors: [..., n, d] in the original units.
            weights: [..., n] in the original units; all 1 if None.

        Returns:
            [..., n]. Up to rounding, scores of items in the set are below 1; scores of other items are not bounded.

        Raises:
            TypeError: an input is not a floating point tensor.
            ValueError: shapes do not match, an input is NaN, infinite or negative, or the result overflows.

        """
        vectors = check_vectors(vectors)
        expected = (*self.noise.shape, vectors.shape[-2], self.cholesky.shape[-1])
        if vectors.shape != expected:
            raise ValueError(f"vectors must have shape {expected}, got {tuple(vectors.shape)}")
        dtype = self.dtype
        if weights is None and bool(((self.vector_scale == 1) & (self.weight_scale == 1)).all()):
            rows = vectors.to(dtype)
        else:
            weights = vectors.new_ones(vectors.shape[:-1]) if weights is None else check_weights(weights, vectors)
            rows = scale_rows(vectors.to(dtype), weights.to(dtype), self.vector_scale, self.weight_scale)
        scores = _quadratic_form(self.cholesky, rows)
        if not all_finite(scores):
            raise ValueError(
                "vectors and weights must be finite, weights at least 0, and both in the range of the set's own, "
                f"got leverage scores that are NaN or infinite in {dtype}"
            )
        return scores


def prepare_set(
    vectors: Tensor, weights: Tensor | None, valid: Tensor | None, ridge: float, relative: bool
) -> tuple[WeightedSet, Tensor, torch.dtype]:
    """Return a weighted set, its noise variance σ² [...], and the dtype of results for these inputs.

    The set and σ² are float64 where σ² is so small that the rounding errors of a Gram matrix in float32 would change
    the results: they would count as signal in directions in which the set has none.

    Raises:
        TypeError: an input has the wrong type or dtype.
        ValueError: shapes do not match, an input is NaN, infinite or negative, or the Gram matrix overflows.

    """
    check_ridge(ridge)
    items = WeightedSet.from_vectors(vectors, weights, valid, relative)
    noise = noise_variance(items.gram, ridge, relative)
    dtype = items.gram.dtype
    if dtype != torch.float64:
        if relative:
            is_small = ridge < MIN_FLOAT32_RIDGE
        else:
            trace = items.gram.diagonal(dim1=-2, dim2=-1).sum(-1)
            is_small = bool((noise < MIN_FLOAT32_RIDGE * trace / items.gram.shape[-1]).any())
        if is_small:
            items = WeightedSet.from_vectors(vectors, weights, valid, relative, torch.float64)
            noise = noise_variance(items.gram, ridge, relative)
    return items, noise, dtype


def _make_factor(items: WeightedSet, gram: Tensor, noise: Tensor, dtype: torch.dtype) -> CholeskyFactor:
    """Return the factor of a Gram matrix of scaled rows, whose methods return results in `dtype`."""
    scales = items.vector_scale.to(dtype), items.weight_scale.to(dtype)
    return CholeskyFactor(factorize_gram(gram, noise), noise, *scales, dtype)


def factorize(
    vectors: Tensor,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    ridge: float = 0.1,
    relative: bool = True,
) -> CholeskyFactor:
    """Factorize A = σ²I + G of the valid items. All quantities of this module can be computed from the factor.

    Raises:
        TypeError: an input has the wrong type or dtype.
        ValueError: shapes do not match, an input is NaN, infinite or negative, or the Gram matrix overflows.

    Example:
        >>> factor = factorize(torch.eye(2), ridge=1.0, relative=False)
        >>> factor.effective_dimension, factor.leverage(torch.eye(2))
        (tensor(1.), tensor([0.5000, 0.5000]))

    """
    items, noise, dtype = prepare_set(vectors, weights, valid, ridge, relative)
    return _make_factor(items, items.gram, noise, dtype)


def capacity(
    vectors: Tensor,
    weights: Tensor | None = None,
    *,
    subset: Tensor | None = None,
    valid: Tensor | None = None,
    ridge: float = 0.1,
    relative: bool = True,
) -> Tensor:
    """Return the capacity C(S) of a subset in nats; Eq. (2), the objective of arXiv 2604.25975.

    σ² is computed from all valid items, so that capacities of different subsets of one set are comparable.

    Args:
        vectors: u, [..., n, d].
        weights: w ≥ 0, [..., n]; all 1 if None.
        subset: S, a boolean mask [..., n] or distinct long indices [..., m]; all items if None. Invalid items in it
            are ignored.
        valid: boolean mask [..., n] of the items that exist; all if None.
        ridge: λ > 0.
        relative: whether σ² is relative to the trace of G.

    Returns:
        [...], from 0 for an empty subset to the capacity of all items.

    Raises:
        TypeError: an input has the wrong type or dtype.
        ValueError: shapes do not match, an input is NaN, infinite or negative, an index is repeated or out of
            range, or the Gram matrix overflows.

    Example:
        The first two of three items are equal, so keeping both of them carries less information:

        >>> vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> capacity(vectors, subset=torch.tensor([0, 2]))
        tensor(2.0369)
        >>> capacity(vectors, subset=torch.tensor([0, 1]))
        tensor(1.3313)

    """
    items, noise, dtype = prepare_set(vectors, weights, valid, ridge, relative)
    gram = items.gram
    if subset is not None:
        shape = items.weights.shape
        rows = items.rows * check_subset(subset, shape, items.weights.device).unsqueeze(-1)
        gram = matmul(rows.mT, rows)
    return _make_factor(items, gram, noise, dtype).capacity


def leverage_scores(
    vectors: Tensor,
    weights: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    ridge: float = 0.1,
    relative: bool = True,
) -> Tensor:
    """Return the leverage score of each item; Eq. (3), Algorithm 1 of arXiv 2604.25975.

    Args:
        vectors: u, [..., n, d].
        weights: w ≥ 0, [..., n]; all 1 if None.
        valid: boolean mask [..., n] of the items that exist; all if None.
        ridge: λ > 0.
        relative: whether σ² is relative to the trace of G.

    Returns:
        [..., n] in [0, 1), 0 for invalid items. The scores sum to the effective dimension.

    Raises:
        TypeError: an input has the wrong type or dtype.
        ValueError: shapes do not match, an input is NaN, infinite or negative, or the Gram matrix overflows.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> leverage_scores(vectors)
        tensor([0.4651, 0.4651, 0.8696])

    """
    items, noise, dtype = prepare_set(vectors, weights, valid, ridge, relative)
    return row_leverage(items.rows, items.gram, noise).to(dtype).clamp(max=_below_one(dtype))


def effective_dimension(
    vectors: Tensor,
    weights: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    ridge: float = 0.1,
    relative: bool = True,
) -> Tensor:
    """Return the effective dimension of a set, the number of directions with more signal than noise; Eq. (5).

    Arguments and errors are the same as for `leverage_scores`.

    Returns:
        [...], from 0 to min(n, d).

    Example:
        >>> effective_dimension(torch.ones(5, 3), ridge=0.001)
        tensor(0.9997)

    """
    return factorize(vectors, weights, valid, ridge, relative).effective_dimension


def deletion_cost(leverage: Tensor) -> Tensor:
    """Return the capacity in nats that is lost if only one item is deleted; Eq. (4).

    Args:
        leverage: leverage scores s, of any shape. Scores above 1 − eps are set to 1 − eps.

    Returns:
        Tensor of the same shape, finite; float64 if the input is, otherwise float32.

    Raises:
        TypeError: `leverage` is not a floating point tensor.
        ValueError: `leverage` contains NaN or negative values.

    Example:
        >>> deletion_cost(torch.tensor([0.0, 0.75]))
        tensor([0.0000, 0.6931])

    """
    leverage = check_floating("leverage", leverage)
    scores = leverage.to(working_dtype(leverage.dtype))
    if not (scores >= 0).all():
        raise ValueError(f"leverage must be at least 0, got NaN or {float(scores.min())}")
    return -0.5 * torch.log1p(-scores.clamp(max=_below_one(scores.dtype)))


def factorize_gram(gram: Tensor, noise: Tensor) -> Tensor:
    """Return the lower Cholesky factor of A = σ²I + G, [..., d, d], float64."""
    matrix = gram.to(torch.float64, copy=True)
    matrix.diagonal(dim1=-2, dim2=-1).add_(noise.double().unsqueeze(-1))
    return psd_cholesky(matrix, torch.finfo(gram.dtype).eps)


def row_leverage(rows: Tensor, gram: Tensor, noise: Tensor) -> Tensor:
    """Return the leverage scores in [0, 1) of scaled rows.

    Args:
        rows: scaled rows, [..., n, d].
        gram: their Gram matrix, [..., d, d].
        noise: σ², [...].

    Returns:
        [..., n].

    """
    return _quadratic_form(factorize_gram(gram, noise), rows).clamp(max=_below_one(rows.dtype))


def _quadratic_form(cholesky: Tensor, rows: Tensor) -> Tensor:
    """Return xᵀA⁻¹x = ‖L⁻¹x‖² of each row x, [..., n]."""
    # Inverting the d × d factor is as accurate as solving for n right-hand sides, and faster.
    inverse = triangular_inverse(cholesky).mT.to(rows.dtype).contiguous()
    norms = [torch.linalg.vector_norm(matmul(chunk, inverse), dim=-1) for chunk in rows.split(CHUNK_SIZE, dim=-2)]
    return torch.cat(norms, dim=-1).square()


def _below_one(dtype: torch.dtype) -> float:
    return 1 - torch.finfo(dtype).eps
