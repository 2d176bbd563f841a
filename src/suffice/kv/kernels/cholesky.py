"""Cholesky factors of small matrices I + G/σ², inverted, one program for each."""

# Triton's annotations speak of its compiler's own calls, not of what a kernel may be written as.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from suffice.gpu import launch
from suffice.kv.kernels.product import product

_BLOCK = 32


class Factor(NamedTuple):
    """The Cholesky factor L of I + G/σ² for each row and head.

    Args:
        inverse: L⁻¹, float32 [batch, kv_heads, D, D], lower triangular, entries in [−1, 1].
        noise: σ², float32 [batch, kv_heads].
        failed: int32 [batch, kv_heads], other than 0 where G is not finite or its trace out of range.

    """

    inverse: Tensor
    noise: Tensor
    failed: Tensor

    @property
    def capacity(self) -> Tensor:
        """½ log det(I + G/σ²) in nats, [batch, kv_heads]."""
        return -self.inverse.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def inverse_factor(gram: Tensor, dim: int, ridge: float, least: float = 1e-12, noise: Tensor | None = None) -> Factor:
    """Invert the lower Cholesky factor L of I + G/σ², with σ² = ridge · tr(G)/dim.

    All eigenvalues are at least 1 and at most 1 + dim/ridge, so float32 needs no jitter.

    Args:
        gram: float32 [batch, kv_heads, D, D], D a power of two, at least 16; its symmetric part counts.
        dim: rows and columns that are not padding.
        ridge: λ > 0.
        least: smallest trace of G in whose squares nothing is lost.
        noise: σ² of a larger set that this one is part of, [batch, kv_heads], in place of the set's own.

    """
    gram = gram.contiguous()
    inverse, scratch = torch.empty_like(gram), torch.empty_like(gram)
    given = noise is not None
    noise = gram.new_empty(gram.shape[:2]) if noise is None else noise.contiguous()
    failed = torch.empty(gram.shape[:2], dtype=torch.int32, device=gram.device)
    wide = gram.shape[-1]
    launch(
        _factor,
        (gram.shape[0] * gram.shape[1],),
        gram,
        scratch,
        inverse,
        noise,
        failed,
        ridge,
        least,
        DIM=dim,
        GIVEN=given,
        WIDE=wide,
        BLOCK=min(_BLOCK, wide),
        num_warps=4,
        num_stages=1,
    )
    return Factor(inverse, noise, failed)


@triton.jit
def _factor(
    gram: "Any",
    scratch: "Any",
    inverse: "Any",
    noise: "Any",
    failed: "Any",
    ridge: "Any",
    least: "Any",
    DIM: tl.constexpr,
    GIVEN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    gram += head * WIDE * WIDE
    scratch += head * WIDE * WIDE
    inverse += head * WIDE * WIDE
    every = tl.arange(0, WIDE)
    part = tl.arange(0, BLOCK)
    trace = tl.sum(tl.load(gram + every * (WIDE + 1)))
    if GIVEN:
        bad = tl.where(trace <= 1e12, 0, 1)  # also of NaN; a part of a set may be nothing
        variance = tl.load(noise + head)
    else:
        bad = tl.where((trace >= least) & (trace <= 1e12), 0, 1)
        variance = ridge * trace / DIM
        tl.store(noise + head, variance)
    tl.store(inverse + every[:, None] * WIDE + every[None, :], tl.zeros((WIDE, WIDE), tl.float32))
    for j in range(WIDE // BLOCK):
        own = j * BLOCK + part
        panel = tl.load(gram + every[:, None] * WIDE + own[None, :])
        panel += tl.load(gram + own[None, :] * WIDE + every[:, None])
        panel = panel * (0.5 / variance) + tl.where(every[:, None] == own[None, :], 1.0, 0.0)
        for k in range(j):
            before = k * BLOCK + part
            left = tl.load(scratch + every[:, None] * WIDE + before[None, :])
            right = tl.load(scratch + own[None, :] * WIDE + before[:, None])
            panel -= product(left, right, tl.zeros((WIDE, BLOCK), tl.float32))
        # Through memory, since a part of a block can't be taken out of registers.
        tl.store(scratch + every[:, None] * WIDE + own[None, :], panel)
        tl.debug_barrier()
        corner = tl.load(scratch + own[:, None] * WIDE + own[None, :])
        solved, wrong = _inverse_of_factor(corner, BLOCK)
        bad += wrong
        column = product(panel, tl.trans(solved), tl.zeros((WIDE, BLOCK), tl.float32))
        tl.debug_barrier()
        tl.store(scratch + every[:, None] * WIDE + own[None, :], column)
        tl.store(inverse + own[:, None] * WIDE + own[None, :], solved)
        tl.debug_barrier()
    # X_ij = −X_ii Σ_k L_ik X_kj, row after row of blocks.
    for i in range(1, WIDE // BLOCK):
        own = i * BLOCK + part
        corner = tl.load(inverse + own[:, None] * WIDE + own[None, :])
        for j in range(i):
            there = j * BLOCK + part
            total = tl.zeros((BLOCK, BLOCK), tl.float32)
            for k in range(j, i):
                middle = k * BLOCK + part
                left = tl.load(scratch + own[:, None] * WIDE + middle[None, :])
                right = tl.load(inverse + middle[:, None] * WIDE + there[None, :])
                total = product(left, right, total)
            block = -product(corner, total, tl.zeros((BLOCK, BLOCK), tl.float32))
            tl.store(inverse + own[:, None] * WIDE + there[None, :], block)
        tl.debug_barrier()
    tl.store(failed + head, bad)


@triton.jit
def _inverse_of_factor(matrix: "Any", SIZE: tl.constexpr):
    """Invert the Cholesky factor of a small block by elimination; second, whether a pivot was not positive."""
    rows = tl.arange(0, SIZE)[:, None]
    columns = tl.arange(0, SIZE)[None, :]
    solved = tl.where(rows == columns, 1.0, 0.0)
    bad = 0
    for c in range(SIZE):
        across = tl.sum(tl.where(rows == c, matrix, 0.0), 0)[None, :]
        down = tl.sum(tl.where(columns == c, matrix, 0.0), 1)[:, None]
        pivot = tl.sum(tl.where((rows == c) & (columns == c), matrix, 0.0))
        bad += tl.where(pivot > 0.0, 0, 1)
        root = 1.0 / tl.sqrt(pivot)
        line = tl.sum(tl.where(rows == c, solved, 0.0), 0)[None, :] * root
        below = tl.where(rows > c, down * root, 0.0)
        solved = tl.where(rows == c, line, solved - below * line)
        matrix -= below * tl.where(columns > c, across * root, 0.0)
    return solved, bad
