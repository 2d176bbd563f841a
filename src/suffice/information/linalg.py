"""Linear algebra that everything here stands on: the working precision, Gram matrices, Cholesky factors."""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.information.arguments import check_square, check_vectors, check_weights, require_finite

_JITTER_TRIES = 4


class NotPositiveDefiniteError(ValueError):
    """A matrix that must be positive definite is not, even with jitter on its diagonal."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision in which inputs of `dtype` are worked on: float64 stays, every other float becomes float32.

    Raises:
        TypeError: `dtype` is not a real floating point type.

    Example:
        >>> working_dtype(torch.bfloat16)
        torch.float32

    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point type (got {dtype})")
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` in their own dtype, also where the caller has autocast on.

    Autocast would form Gram matrices in half precision, which are then often not positive definite.
    """
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def gram(vectors: Tensor, weights: Tensor | None = None) -> Tensor:
    """Gram matrix Σ w u uᵀ of a set of weighted vectors, symmetric and positive semi-definite.

    Args:
        vectors: u, [..., n, d].
        weights: w ≥ 0, [..., n]; all 1 if not given.

    Returns:
        [..., d, d], float64 if an input is, else float32.

    Raises:
        TypeError: An input is not a floating point tensor.
        ValueError: Shapes do not fit, an input is NaN, infinite or negative, or the result overflows.

    Example:
        >>> gram(torch.eye(2), torch.tensor([1.0, 3.0]))
        tensor([[1., 0.],
                [0., 3.]])

    """
    vectors = check_vectors(vectors)
    dtype = vectors.dtype
    if weights is not None:
        weights = check_weights(weights, vectors)
        dtype = torch.promote_types(dtype, weights.dtype)
    rows = vectors.to(working_dtype(dtype))
    if weights is not None:
        rows = rows * weights.to(rows.dtype).sqrt().unsqueeze(-1)
    result = matmul(rows.mT, rows)
    require_finite(result, vectors, weights)
    # Not every BLAS sums the two halves in the same order.
    return 0.5 * result + 0.5 * result.mT


def psd_cholesky(matrix: Tensor, eps: float | None = None) -> Tensor:
    """Lower Cholesky factor of each matrix of a batch, with jitter only on those where it fails without.

    Jitter starts at d · eps of a matrix's mean diagonal, the size of the rounding error of its
    factorisation, and grows by 10 for a few tries. Only the lower triangle is read.

    Args:
        matrix: Symmetric, [..., d, d].
        eps: Relative rounding error of the entries, if larger than that of the precision worked in.

    Returns:
        [..., d, d], lower triangular; float64 if the input is, else float32.

    Raises:
        NotPositiveDefiniteError: Matrices hold NaN or Inf, or stay indefinite with the largest jitter.
        TypeError: The input is not a floating point tensor.
        ValueError: It is not square.

    Example:
        >>> psd_cholesky(torch.tensor([[4.0, 2.0], [2.0, 2.0]]))
        tensor([[2., 0.],
                [1., 1.]])

    """
    matrix = check_square("matrix", matrix)
    matrix = matrix.to(working_dtype(matrix.dtype))
    factor, failed = _factorize(matrix)
    if not failed.any():
        return factor

    total = failed.numel()
    hard = matrix[failed]  # [k, d, d]
    if bad := int((~hard.isfinite()).any(-1).any(-1).sum()):
        raise NotPositiveDefiniteError(f"matrix must be finite (got NaN or Inf in {bad} of {total} matrices)")
    size = matrix.shape[-1]
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    rounding = size * max(torch.finfo(matrix.dtype).eps, eps or 0.0)
    jitter = hard.diagonal(dim1=-2, dim2=-1).mean(-1) * rounding  # [k]
    repaired, still = hard, torch.ones_like(jitter, dtype=torch.bool)
    for attempt in range(_JITTER_TRIES):
        tried, wrong = _factorize(hard + (10**attempt * jitter)[:, None, None] * eye)
        repaired = torch.where(still[:, None, None], tried, repaired)
        still = still & wrong
        if not still.any():
            return factor.masked_scatter(failed[..., None, None], repaired)
    raise NotPositiveDefiniteError(
        f"matrix must be positive definite (got {int(still.sum())} of {total} matrices that are not, "
        f"even with {10 ** (_JITTER_TRIES - 1) * rounding:.1e} of their mean diagonal added)"
    )


def triangular_inverse(factor: Tensor) -> Tensor:
    """Inverse of lower triangular matrices, [..., d, d]."""
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye, upper=False)


def _factorize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors [..., d, d] and which of them failed [...]."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    # An infinite pivot passes for a success, but stays visible on the diagonal, as does any NaN.
    finite = factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    return factor, (info != 0) | ~finite
