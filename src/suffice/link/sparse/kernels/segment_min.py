"""Minimum of each column over segments of rows. Every row is read once, and every result is written once."""

# Triton's stubs describe the compiler's internal calls, so pyright cannot check the code of kernels.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from suffice.gpu import block_size, launch

_BLOCK_N = 8
"""Number of rows that a program reads at a time."""

_MAX_BLOCK_C = 256
"""Maximum number of columns that one program processes."""


def segment_min(index: Tensor, offsets: Tensor, table: Tensor) -> Tensor:
    """Return the minimum of each column over the rows of each segment, infinite for empty segments.

    Args:
        index: rows of the table, segment after segment, long [total].
        offsets: start of each segment in `index`, followed by the end of the last one, long [segments + 1].
        table: [rows, columns], floating point.

    Returns:
        [segments, columns], in the dtype of the table.

    """
    table = table.contiguous()
    num_segments, num_columns = offsets.numel() - 1, table.shape[1]
    result = table.new_empty(num_segments, num_columns)
    if num_segments:
        block_c = min(block_size(num_columns), _MAX_BLOCK_C)
        launch(
            segment_min_kernel,
            (num_segments, triton.cdiv(num_columns, block_c)),
            index,
            offsets,
            table,
            result,
            num_columns,
            BLOCK_N=_BLOCK_N,
            BLOCK_C=block_c,
            num_warps=4,
        )
    return result


@triton.jit
def segment_min_kernel(
    index: "Any",
    offsets: "Any",
    table: "Any",
    result: "Any",
    num_columns: "Any",
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute BLOCK_C columns of one segment."""
    segment = tl.program_id(0).to(tl.int64)
    end = tl.load(offsets + segment + 1)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    minimum = tl.full((BLOCK_C,), float("inf"), tl.float32)
    for block_start in range(tl.load(offsets + segment), end, BLOCK_N):
        offs_n = block_start + tl.arange(0, BLOCK_N)
        row = tl.load(index + offs_n, mask=offs_n < end, other=0)
        mask = (offs_n < end)[:, None] & (offs_c < num_columns)[None, :]
        values = tl.load(table + row[:, None] * num_columns + offs_c[None, :], mask=mask, other=float("inf"))
        minimum = tl.minimum(minimum, tl.min(values.to(tl.float32), 0))
    tl.store(result + segment * num_columns + offs_c, minimum.to(result.dtype.element_ty), mask=offs_c < num_columns)
