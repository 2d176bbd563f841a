"""Kept entries moved to the front of their head, in the buffer where they are."""

# Triton's annotations speak of its compiler's own calls, not of what a kernel may be written as.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from suffice.gpu import launch

_ROWS, _WIDTH = 512, 32  # entries moved at a time, and numbers of each that one program moves


def move_to_front(x: Tensor, kept: Tensor) -> None:
    """Move the kept entries of every head to its front; what stands behind them afterwards is of no use.

    No entry moves backwards, so that a block of them can be read before anything is written over it.

    Args:
        x: [batch, kv_heads, tokens, dim], its last dimension contiguous; changed in place.
        kept: long [batch, kv_heads, width], ascending, right-aligned, −1 for none.

    """
    batch, heads, _, dim = x.shape
    kept = kept.contiguous()
    launch(
        _move,
        (batch * heads, triton.cdiv(dim, _WIDTH)),
        x,
        kept,
        kept.shape[-1],
        heads,
        dim,
        *x.stride()[:3],
        BLOCK_N=_ROWS,
        BLOCK_D=_WIDTH,
        num_warps=8,
        num_stages=1,
    )


@triton.jit(do_not_specialize=["width", "heads", "dim"])
def _move(
    x: "Any",
    kept: "Any",
    width: "Any",
    heads: "Any",
    dim: "Any",
    stride_batch: "Any",
    stride_head: "Any",
    stride_token: "Any",
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    x += head // heads * stride_batch + head % heads * stride_head
    kept += head * width
    dims = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    done = 0
    for start in range(0, width, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        source = tl.load(kept + n, mask=n < width, other=-1)
        there = source >= 0
        mask = there[:, None] & (dims < dim)[None, :]
        entries = tl.load(x + source[:, None] * stride_token + dims[None, :], mask=mask)
        # All that stand in this block's places have been read, by this block or the ones before.
        tl.debug_barrier()
        count = tl.sum(there.to(tl.int32), 0)
        # None are at the left, so that the last entry of a block goes to the last place.
        place = (done + n - start - tl.sum(((n < width) & (source < 0)).to(tl.int32), 0)).to(tl.int64)
        tl.store(x + place[:, None] * stride_token + dims[None, :], entries, mask=mask)
        done += count
