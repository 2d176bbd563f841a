"""Least of each column over lists of rows: every row is read once, every result written once."""

# Triton's annotations speak of its compiler's own calls, not of what a kernel may be written as.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from suffice.gpu import block_size, launch

_ROWS = 8  # rows that are read at a time
_COLUMNS = 256


def least(index: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """Return the least of each column over the rows of each list, infinite where it is empty: [lists, columns].

    Args:
        index: rows, list after list, long [total].
        starts: where each list begins, and the last ends, long [lists + 1].
        table: [rows, columns], floating point.

    """
    table = table.contiguous()
    lists, columns = starts.numel() - 1, table.shape[1]
    found = table.new_empty(lists, columns)
    if lists:
        block = min(block_size(columns), _COLUMNS)
        grid = (lists, triton.cdiv(columns, block))
        launch(_least, grid, index, starts, table, found, columns, BLOCK_N=_ROWS, BLOCK_C=block, num_warps=4)
    return found


@triton.jit
def _least(
    index: "Any",
    starts: "Any",
    table: "Any",
    found: "Any",
    columns: "Any",
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    one = tl.program_id(0).to(tl.int64)
    last = tl.load(starts + one + 1)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    smallest = tl.full((BLOCK_C,), float("inf"), tl.float32)
    for start in range(tl.load(starts + one), last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        row = tl.load(index + n, mask=n < last, other=0)
        inside = (n < last)[:, None] & (column < columns)[None, :]
        values = tl.load(table + row[:, None] * columns + column[None, :], mask=inside, other=float("inf"))
        smallest = tl.minimum(smallest, tl.min(values.to(tl.float32), 0))
    tl.store(found + one * columns + column, smallest.to(found.dtype.element_ty), mask=column < columns)
