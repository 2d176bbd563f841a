"""Rounding of rotated vectors with feedback of the errors. A program rounds one dimension after the other in registers.

The results are those of `suffice.kv.storage.error_feedback.ErrorFeedback.round`, apart from rounding.
"""

# Triton's stubs describe the compiler's internal calls, so pyright cannot check the code of kernels.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from suffice.gpu import block_size, launch
from suffice.kv.kernels.packing import nearest_integers

_BLOCK = 16
"""Number of vectors that a program rounds."""


def round_with_feedback(
    vectors: Tensor, scales: Tensor, factors: Tensor, counts: list[int], largest: int
) -> tuple[Tensor, Tensor]:
    """Round vectors with feedback; see `ErrorFeedback.round`.

    Args:
        vectors: float32 [vectors, padded_dim], sorted by head.
        scales: scale of each group of dimensions, float32 [vectors, groups].
        factors: matrix L of each head (see `ErrorFeedback`), float32 [heads, padded_dim, padded_dim].
        counts: number of vectors of each head.
        largest: the largest integer. The smallest one is 0.

    Returns:
        The integers, uint8 [vectors, padded_dim], and the squared error of each vector, float32 [vectors].

    """
    vectors, scales, factors = vectors.contiguous(), scales.contiguous(), factors.contiguous()
    codes = torch.empty_like(vectors, dtype=torch.uint8)
    errors = vectors.new_empty(len(vectors))
    programs = _programs(counts)
    launch(
        feedback_kernel,
        (len(programs),),
        vectors,
        scales,
        factors,
        programs.to(vectors.device, non_blocking=True),
        codes,
        errors,
        DIM=vectors.shape[1],
        GROUP_SIZE=vectors.shape[1] // scales.shape[1],
        LARGEST=largest,
        BLOCK_N=_BLOCK,
        BLOCK_D=block_size(vectors.shape[1], 1),
        num_warps=4,
    )
    return codes, errors


def _programs(counts: list[int]) -> Tensor:
    """Return what each program rounds: its head, its first vector, and the end of the head, long [programs, 3]."""
    sizes = torch.tensor(counts)
    ends, num_programs = sizes.cumsum(0), (sizes + _BLOCK - 1) // _BLOCK
    head = torch.arange(len(counts)).repeat_interleave(num_programs)
    number = torch.arange(len(head)) - (num_programs.cumsum(0) - num_programs)[head]  # within the head
    return torch.stack((head, (ends - sizes)[head] + _BLOCK * number, ends[head]), dim=1)


@triton.jit
def feedback_kernel(
    vectors: "Any",
    scales: "Any",
    factors: "Any",
    programs: "Any",
    codes: "Any",
    errors: "Any",
    DIM: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Round BLOCK_N vectors of one head. The errors of each dimension are added to those before it."""
    program = programs + tl.program_id(0).to(tl.int64) * 3
    head = tl.load(program).to(tl.int64)
    offs_n = tl.load(program + 1).to(tl.int64) + tl.arange(0, BLOCK_N)
    mask_n = offs_n < tl.load(program + 2)
    offs_d = tl.arange(0, BLOCK_D)
    x = tl.load(
        vectors + offs_n[:, None] * DIM + offs_d[None, :], mask=mask_n[:, None] & (offs_d < DIM)[None, :], other=0.0
    )
    corrected = x
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for step in range(DIM):
        dim = DIM - 1 - step
        scale = tl.load(scales + offs_n * (DIM // GROUP_SIZE) + dim // GROUP_SIZE, mask=mask_n, other=1.0)
        is_dim = (offs_d == dim)[None, :]
        wanted = tl.sum(tl.where(is_dim, corrected, 0.0), 1) / scale + LARGEST / 2
        code = nearest_integers(wanted, LARGEST)
        tl.store(codes + offs_n * DIM + dim, code.to(tl.uint8), mask=mask_n)
        error = tl.sum(tl.where(is_dim, x, 0.0), 1) - (code - LARGEST / 2) * scale
        squares += error * error
        row = tl.load(factors + (head * DIM + dim) * DIM + offs_d, mask=offs_d < dim, other=0.0)
        corrected += error[:, None] * row[None, :]
    tl.store(errors + offs_n, squares, mask=mask_n)
