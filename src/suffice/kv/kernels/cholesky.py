"""Inverse Cholesky factors of small matrices I + G/σ², one program for each matrix."""

# Triton's stubs describe the compiler's internal calls, so pyright cannot check the code of kernels.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from suffice.gpu import launch
from suffice.kv.kernels.dot import precise_dot

_BLOCK = 32


class InverseFactor(NamedTuple):
    """Inverse of the Cholesky factor L of I + G/σ² for each head.

    Args:
        inverse: L⁻¹, float32 [batch, kv_heads, D, D], lower triangular, with entries in [−1, 1].
        noise: σ², float32 [batch, kv_heads].
        failed: int32 [batch, kv_heads], not 0 where the trace of G is NaN or out of range, or a pivot is not positive.

    """

    inverse: Tensor
    noise: Tensor
    failed: Tensor

    @property
    def capacity(self) -> Tensor:
        """½ log det(I + G/σ²) in nats, [batch, kv_heads]."""
        return -self.inverse.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def inverse_factor(
    gram: Tensor, dim: int, ridge: float, min_trace: float = 1e-12, noise: Tensor | None = None
) -> InverseFactor:
    """Compute the inverse of the lower Cholesky factor L of I + G/σ², with σ² = ridge · tr(G)/dim.

    The eigenvalues of I + G/σ² are between 1 and 1 + dim/ridge, so float32 needs no jitter.

    Args:
        gram: float32 [batch, kv_heads, D, D], where D is a power of two, at least 16. Only its symmetric part is used.
        dim: number of rows and columns that are not padding.
        ridge: λ > 0; ignored if `noise` is given.
        min_trace: smallest trace of G for which squares of its entries do not underflow.
        noise: σ² [batch, kv_heads] of a larger set that contains this set. If given, it replaces the set's own σ².

    """
    gram = gram.contiguous()
    inverse, scratch = torch.empty_like(gram), torch.empty_like(gram)
    noise_given = noise is not None
    noise = gram.new_empty(gram.shape[:2]) if noise is None else noise.contiguous()
    failed = torch.empty(gram.shape[:2], dtype=torch.int32, device=gram.device)
    size = gram.shape[-1]
    launch(
        cholesky_kernel,
        (gram.shape[0] * gram.shape[1],),
        gram,
        scratch,
        inverse,
        noise,
        failed,
        ridge,
        min_trace,
        DIM=dim,
        NOISE_GIVEN=noise_given,
        SIZE=size,
        BLOCK=min(_BLOCK, size),
        num_warps=4,
        num_stages=1,
    )
    return InverseFactor(inverse, noise, failed)


@triton.jit
def cholesky_kernel(
    gram: "Any",
    scratch: "Any",
    inverse: "Any",
    noise: "Any",
    failed: "Any",
    ridge: "Any",
    min_trace: "Any",
    DIM: tl.constexpr,
    NOISE_GIVEN: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Factorize one matrix by block columns, and invert the factor by block rows."""
    head = tl.program_id(0).to(tl.int64)
    gram += head * SIZE * SIZE
    scratch += head * SIZE * SIZE
    inverse += head * SIZE * SIZE
    rows = tl.arange(0, SIZE)
    offsets = tl.arange(0, BLOCK)
    trace = tl.sum(tl.load(gram + rows * (SIZE + 1)))
    if NOISE_GIVEN:
        # A subset may be empty, so the trace has no lower bound. The comparison is false for NaN.
        status = tl.where(trace <= 1e12, 0, 1)
        variance = tl.load(noise + head)
    else:
        status = tl.where((trace >= min_trace) & (trace <= 1e12), 0, 1)
        variance = ridge * trace / DIM
        tl.store(noise + head, variance)
    tl.store(inverse + rows[:, None] * SIZE + rows[None, :], tl.zeros((SIZE, SIZE), tl.float32))
    # Left-looking block Cholesky: subtract the contributions of the previous panels from panel j, then multiply it by
    # the transposed inverse of the factor of its diagonal block.
    for j in range(SIZE // BLOCK):
        block_j = j * BLOCK + offsets
        panel = tl.load(gram + rows[:, None] * SIZE + block_j[None, :])
        panel += tl.load(gram + block_j[None, :] * SIZE + rows[:, None])
        panel = panel * (0.5 / variance) + tl.where(rows[:, None] == block_j[None, :], 1.0, 0.0)
        for k in range(j):
            block_k = k * BLOCK + offsets
            left = tl.load(scratch + rows[:, None] * SIZE + block_k[None, :])
            right = tl.load(scratch + block_j[None, :] * SIZE + block_k[:, None])
            panel -= precise_dot(left, right, tl.zeros((SIZE, BLOCK), tl.float32))
        # The diagonal block is read back from memory, because a part of a tensor in registers cannot be addressed.
        tl.store(scratch + rows[:, None] * SIZE + block_j[None, :], panel)
        tl.debug_barrier()
        diagonal = tl.load(scratch + block_j[:, None] * SIZE + block_j[None, :])
        diagonal_inverse, block_failed = _invert_block_factor(diagonal, BLOCK)
        status += block_failed
        column = precise_dot(panel, tl.trans(diagonal_inverse), tl.zeros((SIZE, BLOCK), tl.float32))
        tl.debug_barrier()
        tl.store(scratch + rows[:, None] * SIZE + block_j[None, :], column)
        tl.store(inverse + block_j[:, None] * SIZE + block_j[None, :], diagonal_inverse)
        tl.debug_barrier()
    # With X = L⁻¹: X_ij = −X_ii Σ_k L_ik X_kj over j ≤ k < i, one row of blocks after the other.
    for i in range(1, SIZE // BLOCK):
        block_i = i * BLOCK + offsets
        diagonal = tl.load(inverse + block_i[:, None] * SIZE + block_i[None, :])
        for j in range(i):
            block_j = j * BLOCK + offsets
            total = tl.zeros((BLOCK, BLOCK), tl.float32)
            for k in range(j, i):
                block_k = k * BLOCK + offsets
                left = tl.load(scratch + block_i[:, None] * SIZE + block_k[None, :])
                right = tl.load(inverse + block_k[:, None] * SIZE + block_j[None, :])
                total = precise_dot(left, right, total)
            result = -precise_dot(diagonal, total, tl.zeros((BLOCK, BLOCK), tl.float32))
            tl.store(inverse + block_i[:, None] * SIZE + block_j[None, :], result)
        tl.debug_barrier()
    tl.store(failed + head, status)


@triton.jit
def _invert_block_factor(matrix: "Any", SIZE: tl.constexpr):
    """Return the inverse Cholesky factor of a small block, and the number of pivots that are not positive."""
    rows = tl.arange(0, SIZE)[:, None]
    columns = tl.arange(0, SIZE)[None, :]
    inverse = tl.where(rows == columns, 1.0, 0.0)
    num_failed = 0
    for c in range(SIZE):
        pivot_row = tl.sum(tl.where(rows == c, matrix, 0.0), 0)[None, :]
        pivot_column = tl.sum(tl.where(columns == c, matrix, 0.0), 1)[:, None]
        pivot = tl.sum(tl.where((rows == c) & (columns == c), matrix, 0.0))
        num_failed += tl.where(pivot > 0.0, 0, 1)
        inverse_root = 1.0 / tl.sqrt(pivot)
        inverse_row = tl.sum(tl.where(rows == c, inverse, 0.0), 0)[None, :] * inverse_root
        below = tl.where(rows > c, pivot_column * inverse_root, 0.0)
        inverse = tl.where(rows == c, inverse_row, inverse - below * inverse_row)
        matrix -= below * tl.where(columns > c, pivot_row * inverse_root, 0.0)
    return inverse, num_failed
