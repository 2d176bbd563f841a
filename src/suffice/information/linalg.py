"""Linear algebra in a safe precision: Gram matrices and Cholesky factors."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from suffice.information.validation import check_gram_finite, check_square, check_vectors, check_weights

_JITTER_ATTEMPTS = 4


class NotPositiveDefiniteError(ValueError):
    """A matrix that must be positive definite is not, even with jitter added to its diagonal."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision in which inputs of `dtype` are processed: float64 for float64, otherwise float32.

    Raises:
        TypeError: `dtype` is not a real floating point type.

    Example:
        >>> working_dtype(torch.bfloat16)
        torch.float32

    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point type, got {dtype}")
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right` in the dtype of the operands, also under autocast.

    Autocast would compute Gram matrices in half precision, where they are often not positive definite.
    """
    with without_autocast(left.device):
        return left @ right


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context in which operations on a device keep the dtype of their operands, also under autocast."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def gram_matrix(vectors: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the Gram matrix Σ w u uᵀ of a set of weighted vectors, symmetric and positive semi-definite.

    Args:
        vectors: u, [..., n, d].
        weights: w ≥ 0, [..., n]; all 1 if None.

    Returns:
        [..., d, d], float64 if an input is, otherwise float32.

    Raises:
        TypeError: an input is not a floating point tensor.
        ValueError: shapes do not match, an input is NaN, infinite or negative, or the result overflows.

    Example:
        >>> gram_matrix(torch.eye(2), torch.tensor([1.0, 3.0]))
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
    gram = matmul(rows.mT, rows)
    check_gram_finite(gram, vectors, weights)
    # Some BLAS libraries sum the two triangles in different orders.
    return 0.5 * gram + 0.5 * gram.mT


def psd_cholesky(matrix: Tensor, eps: float | None = None) -> Tensor:
    """Return the lower Cholesky factor of each matrix of a batch, with jitter only where it is needed.

    Jitter is added to the diagonal of the matrices whose factorization fails. It starts at d · eps times the mean
    diagonal, the size of the rounding error of the factorization, and grows by a factor of 10 in each attempt. Only
    the lower triangle of `matrix` is read.

    Args:
        matrix: symmetric, [..., d, d].
        eps: relative rounding error of the entries, if it is larger than that of the working precision.

    Returns:
        [..., d, d], lower triangular; float64 if the input is, otherwise float32.

    Raises:
        NotPositiveDefiniteError: a matrix contains NaN or Inf, or is indefinite even with the largest jitter.
        TypeError: `matrix` is not a floating point tensor.
        ValueError: `matrix` is not square.

    Example:
        >>> psd_cholesky(torch.tensor([[4.0, 2.0], [2.0, 2.0]]))
        tensor([[2., 0.],
                [1., 1.]])

    """
    matrix = check_square("matrix", matrix)
    matrix = matrix.to(working_dtype(matrix.dtype))
    factor, failed = _try_cholesky(matrix)
    if not failed.any():
        return factor

    total = failed.numel()
    failed_matrices = matrix[failed]  # [k, d, d]
    if count := int((~failed_matrices.isfinite()).any(-1).any(-1).sum()):
        raise NotPositiveDefiniteError(f"matrix must be finite, got NaN or Inf in {count} of {total} matrices")
    size = matrix.shape[-1]
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    rounding = size * max(torch.finfo(matrix.dtype).eps, eps or 0.0)
    jitter = failed_matrices.diagonal(dim1=-2, dim2=-1).mean(-1) * rounding  # [k]
    repaired, unrepaired = failed_matrices, torch.ones_like(jitter, dtype=torch.bool)
    for attempt in range(_JITTER_ATTEMPTS):
        candidate, candidate_failed = _try_cholesky(failed_matrices + (10**attempt * jitter)[:, None, None] * identity)
        repaired = torch.where(unrepaired[:, None, None], candidate, repaired)
        unrepaired = unrepaired & candidate_failed
        if not unrepaired.any():
            return factor.masked_scatter(failed[..., None, None], repaired)
    raise NotPositiveDefiniteError(
        f"matrix must be positive definite, got {int(unrepaired.sum())} of {total} matrices that are not, "
        f"even with {10 ** (_JITTER_ATTEMPTS - 1) * rounding:.1e} times their mean diagonal added"
    )


def triangular_inverse(factor: Tensor) -> Tensor:
    """Return the inverse of lower triangular matrices [..., d, d]."""
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, identity, upper=False)


def _try_cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return Cholesky factors [..., d, d], and whether the factorization failed [...]."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    # `info` does not report an infinite pivot. Like NaN, it is visible on the diagonal.
    finite = factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    return factor, (info != 0) | ~finite
