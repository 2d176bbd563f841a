"""Information capacity of a set of weighted vectors, and what each of them contributes to it.

Under the linear-Gaussian surrogate Y = Σ √w_i u_i z_i + ε, with z_i ~ N(0, 1) and ε ~ N(0, σ²I), a set S
carries C(S) = ½ log det(I + σ⁻² Σ_{i∈S} w_i u_i u_iᵀ) nats (the closed-form objective of arXiv 2604.25975).
With A = σ²I + G and G = Σ w_i u_i u_iᵀ over all items, item i has leverage s_i = w_i u_iᵀ A⁻¹ u_i, and its
deletion alone costs exactly −½ log(1 − s_i).

The paper fixes σ² = 1 (`ridge=1.0, relative=False`). Then the ranking of items changes with the scale of
weights and vectors, which is arbitrary; the default takes σ² relative to the trace of G instead, so that
every result is invariant to both.

Everywhere: `vectors` are u, [..., n, d]; `weights` w ≥ 0, [..., n], all 1 if not given; `valid` is a bool
mask [..., n] of the items that exist, all if not given, and what invalid items hold is never looked at;
`ridge` and `relative` set σ² as in `noise_variance`. Results are float64 if an input is, else float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.information.arguments import (
    check_floating,
    check_ridge,
    check_square,
    check_subset,
    check_vectors,
    check_weights,
)
from suffice.information.items import CHUNK, collect_items, scale_rows
from suffice.information.linalg import matmul, psd_cholesky, triangular_inverse, working_dtype


def noise_variance(gram: Tensor, ridge: float = 0.1, relative: bool = True) -> Tensor:
    """Variance σ² of the noise: `ridge` · tr(G) / d if relative, else `ridge` itself.

    Args:
        gram: G, [..., d, d].
        ridge: λ > 0, without unit if relative, else in units of G.
        relative: Whether σ² follows the trace. It is 1 where the trace is 0.

    Returns:
        [...], at least the smallest normal number of its dtype.

    Raises:
        TypeError: `gram` is not a floating point tensor, `ridge` not a number.
        ValueError: `gram` is not square or its trace not finite; `ridge` is not finite and above 0.

    Example:
        >>> noise_variance(torch.diag(torch.tensor([1.0, 3.0])), ridge=0.5)
        tensor(1.)

    """
    gram = check_square("gram", gram)
    ridge = check_ridge(ridge)
    dtype = working_dtype(gram.dtype)
    trace = gram.diagonal(dim1=-2, dim2=-1).to(dtype).sum(-1)  # [...]
    noise = trace * (ridge / gram.shape[-1]) if relative else torch.ones_like(trace) * ridge
    if not (trace.isfinite() & noise.isfinite()).all():
        raise ValueError(
            f"gram must have a finite trace, and σ² at ridge {ridge} be finite in {dtype} (got NaN or Inf)"
        )
    noise = noise.clamp(min=torch.finfo(dtype).tiny)
    return torch.where(trace > 0, noise, 1.0) if relative else noise


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """Cholesky factor of A = σ²I + G for a set of weighted vectors.

    The matrices are those of u / vector_scale and w / weight_scale, so that they neither overflow nor
    underflow; the scales are 1 where original units are safe, and always with fixed noise. Every result is
    in original units.
    """

    cholesky: Tensor  # [..., d, d], lower, float64: σ² is small beside G, and float32 would lose it
    noise: Tensor  # [...], σ², in the dtype of results
    vector_scale: Tensor  # [...]
    weight_scale: Tensor  # [...]

    @property
    def capacity(self) -> Tensor:
        """½ log det(I + σ⁻²G) in nats, [...]."""
        pivots = self.cholesky.diagonal(dim1=-2, dim2=-1)  # [..., d]
        total = (pivots / self.noise.double().sqrt().unsqueeze(-1)).log().sum(-1)
        return total.clamp(min=0).to(self.noise.dtype)

    @property
    def effective_dimension(self) -> Tensor:
        """Number of directions that stand out of the noise, d − σ² tr A⁻¹, [...], from 0 to d."""
        inverse = triangular_inverse(self.cholesky) * self.noise.double().sqrt()[..., None, None]
        size = self.cholesky.shape[-1]
        return (size - inverse.square().sum((-2, -1))).clamp(min=0).to(self.noise.dtype)

    def leverage(self, vectors: Tensor, weights: Tensor | None = None) -> Tensor:
        """Leverage w uᵀA⁻¹u of any items, those of the set or others, [..., n].

        Args:
            vectors: [..., n, d] in original units.
            weights: [..., n] in original units; all 1 if not given.

        Returns:
            [..., n]: below 1, up to rounding, for items of the set; without bound for others.

        Raises:
            TypeError: An input is not a floating point tensor.
            ValueError: Shapes do not fit, an input is NaN, infinite or negative, or the result overflows.

        """
        vectors = check_vectors(vectors)
        expected = (*self.noise.shape, vectors.shape[-2], self.cholesky.shape[-1])
        if vectors.shape != expected:
            raise ValueError(f"vectors must have shape {expected} (got {tuple(vectors.shape)})")
        dtype = self.noise.dtype
        if weights is None and bool(((self.vector_scale == 1) & (self.weight_scale == 1)).all()):
            rows = vectors.to(dtype)
        else:
            weights = vectors.new_ones(vectors.shape[:-1]) if weights is None else check_weights(weights, vectors)
            rows = scale_rows(vectors.to(dtype), weights.to(dtype), self.vector_scale, self.weight_scale)
        scores = _quadratic_form(self.cholesky, rows)
        if not scores.isfinite().all():
            raise ValueError(
                "vectors and weights must be finite, the weights at least 0, and both within reach of the "
                f"set's own (got leverages that are NaN or infinite in {dtype})"
            )
        return scores


def factorize(
    vectors: Tensor,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    ridge: float = 0.1,
    relative: bool = True,
) -> Factor:
    """Factorise A = σ²I + Σ w u uᵀ over the valid items, once for every quantity that needs it.

    Raises:
        TypeError: An input has the wrong type or dtype.
        ValueError: Shapes do not fit, an input is NaN, infinite or negative, or the Gram matrix overflows.

    Example:
        >>> factor = factorize(torch.eye(2), ridge=1.0, relative=False)
        >>> factor.effective_dimension, factor.leverage(torch.eye(2))
        (tensor(1.), tensor([0.5000, 0.5000]))

    """
    check_ridge(ridge)
    items = collect_items(vectors, weights, valid, relative)
    noise = noise_variance(items.gram, ridge, relative)
    return Factor(factor_gram(items.gram, noise), noise, items.vector_scale, items.weight_scale)


def capacity(
    vectors: Tensor,
    weights: Tensor | None = None,
    *,
    subset: Tensor | None = None,
    valid: Tensor | None = None,
    ridge: float = 0.1,
    relative: bool = True,
) -> Tensor:
    """Capacity C(S) = ½ log det(I + σ⁻² Σ_{i∈S} w u uᵀ) of a subset, in nats (arXiv 2604.25975, objective).

    σ² always comes from all valid items, so that capacities of subsets of one set compare.

    Args:
        vectors: [..., n, d].
        weights: [..., n].
        subset: S, a bool mask [..., n] or unique long indices [..., m]; all items if not given. Invalid
            items count for nothing in it.
        valid: [..., n].
        ridge: λ > 0.
        relative: Whether σ² is relative to the trace.

    Returns:
        [...], from 0 (nothing kept) to the capacity of all items.

    Raises:
        TypeError: An input has the wrong type or dtype.
        ValueError: Shapes do not fit, an input is NaN, infinite or negative, an index is repeated or out of
            range, or the Gram matrix overflows.

    Example:
        Of three items two are the same, so that half of what they carry is in one of them already:

        >>> vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> capacity(vectors, subset=torch.tensor([0, 2]))
        tensor(2.0369)
        >>> capacity(vectors, subset=torch.tensor([0, 1]))
        tensor(1.3313)

    """
    check_ridge(ridge)
    items = collect_items(vectors, weights, valid, relative)
    noise = noise_variance(items.gram, ridge, relative)
    gram = items.gram
    if subset is not None:
        shape = items.weights.shape
        rows = items.rows * check_subset(subset, shape, items.weights.device).unsqueeze(-1)
        gram = matmul(rows.mT, rows)
    return Factor(factor_gram(gram, noise), noise, items.vector_scale, items.weight_scale).capacity


def leverage_scores(
    vectors: Tensor,
    weights: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    ridge: float = 0.1,
    relative: bool = True,
) -> Tensor:
    """Leverage s_i = w_i u_iᵀ A⁻¹ u_i of each item, without unit (arXiv 2604.25975, Algorithm 1).

    Returns:
        [..., n] in [0, 1), 0 for invalid items; their sum is the effective dimension.

    Raises:
        TypeError: An input has the wrong type or dtype.
        ValueError: Shapes do not fit, an input is NaN, infinite or negative, or the Gram matrix overflows.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> leverage_scores(vectors)
        tensor([0.4651, 0.4651, 0.8696])

    """
    check_ridge(ridge)
    items = collect_items(vectors, weights, valid, relative)
    return row_leverage(items.rows, items.gram, noise_variance(items.gram, ridge, relative))


def effective_dimension(
    vectors: Tensor,
    weights: Tensor | None = None,
    *,
    valid: Tensor | None = None,
    ridge: float = 0.1,
    relative: bool = True,
) -> Tensor:
    """Effective dimension d − σ² tr A⁻¹ = Σ s_i of a set: how many directions stand out of the noise.

    Arguments and errors are those of `leverage_scores`.

    Returns:
        [...], from 0 to min(n, d).

    Example:
        >>> effective_dimension(torch.ones(5, 3), ridge=0.001)
        tensor(0.9997)

    """
    return factorize(vectors, weights, valid, ridge, relative).effective_dimension


def deletion_cost(leverage: Tensor) -> Tensor:
    """Capacity that the deletion of one item alone costs, −½ log(1 − s), in nats.

    Args:
        leverage: s, any shape. Values within eps of 1, or above it by rounding, count as 1 − eps.

    Returns:
        Of the same shape, finite; float64 if the input is, else float32.

    Raises:
        TypeError: The input is not a floating point tensor.
        ValueError: It holds NaN or negative values.

    Example:
        >>> deletion_cost(torch.tensor([0.0, 0.75]))
        tensor([0.0000, 0.6931])

    """
    leverage = check_floating("leverage", leverage)
    scores = leverage.to(working_dtype(leverage.dtype))
    if not (scores >= 0).all():
        raise ValueError(f"leverage must be at least 0 (got NaN or {float(scores.min())})")
    return -0.5 * torch.log1p(-scores.clamp(max=_below_one(scores.dtype)))


def factor_gram(gram: Tensor, noise: Tensor) -> Tensor:
    """Lower Cholesky factor of A = σ²I + G, [..., d, d], float64."""
    eye = torch.eye(gram.shape[-1], dtype=torch.float64, device=gram.device)
    return psd_cholesky(gram.double() + noise.double()[..., None, None] * eye, torch.finfo(gram.dtype).eps)


def row_leverage(rows: Tensor, gram: Tensor, noise: Tensor) -> Tensor:
    """Leverage in [0, 1), [..., n], of the scaled rows [..., n, d] that `gram` [..., d, d] is made of."""
    return _quadratic_form(factor_gram(gram, noise), rows).clamp(max=_below_one(rows.dtype))


def _quadratic_form(cholesky: Tensor, rows: Tensor) -> Tensor:
    """xᵀA⁻¹x = ‖L⁻¹x‖² of each row x, [..., n]."""
    # Inverting the d × d factor and one matmul is faster than solving for n right-hand sides, and as exact.
    inverse = triangular_inverse(cholesky).mT.to(rows.dtype).contiguous()
    # In chunks, so that no second n × d buffer is needed: on a CPU its page faults cost as much as the matmul.
    lengths = [torch.linalg.vector_norm(matmul(chunk, inverse), dim=-1) for chunk in rows.split(CHUNK, dim=-2)]
    return torch.cat(lengths, dim=-1).square()


def _below_one(dtype: torch.dtype) -> float:
    return 1 - torch.finfo(dtype).eps
