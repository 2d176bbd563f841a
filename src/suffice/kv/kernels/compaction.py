"""In-place compaction: the kept entries of each head move to the front of its buffer."""

# Triton's stubs describe the compiler's internal calls, so pyright cannot check the code of kernels.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from suffice.gpu import launch

_BLOCK_N = 512
"""Number of entries that a program moves at a time."""

_BLOCK_D = 32
"""Number of elements of each entry that one program moves."""


def move_to_front(x: Tensor, kept: Tensor) -> None:
    """Move the kept entries of each head to the front of its buffer, in place. The rest becomes undefined.

    No entry moves to a higher index, so no block of entries is overwritten before it has been read.

    Args:
        x: [batch, kv_heads, tokens, dim], with a contiguous last dimension. Modified in place.
        kept: indices of the kept entries, long [batch, kv_heads, width], ascending and right-aligned, −1 for unused
            slots.

    """
    batch, heads, _, dim = x.shape
    kept = kept.contiguous()
    launch(
        compaction_kernel,
        (batch * heads, triton.cdiv(dim, _BLOCK_D)),
        x,
        kept,
        kept.shape[-1],
        heads,
        dim,
        *x.stride()[:3],
        BLOCK_N=_BLOCK_N,
        BLOCK_D=_BLOCK_D,
        num_warps=8,
        num_stages=1,
    )


@triton.jit(do_not_specialize=["width", "kv_heads", "dim"])
def compaction_kernel(
    x: "Any",
    kept: "Any",
    width: "Any",
    kv_heads: "Any",
    dim: "Any",
    stride_batch: "Any",
    stride_head: "Any",
    stride_token: "Any",
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Move BLOCK_D elements of each kept entry of a head."""
    head = tl.program_id(0).to(tl.int64)
    x += head // kv_heads * stride_batch + head % kv_heads * stride_head
    kept += head * width
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    num_moved = 0
    for block_start in range(0, width, BLOCK_N):
        offs_n = block_start + tl.arange(0, BLOCK_N)
        source = tl.load(kept + offs_n, mask=offs_n < width, other=-1)
        is_used = source >= 0
        mask = is_used[:, None] & (offs_d < dim)[None, :]
        entries = tl.load(x + source[:, None] * stride_token + offs_d[None, :], mask=mask)
        # Wait until all threads have read their entries, because the stores below overwrite entries of this block.
        tl.debug_barrier()
        count = tl.sum(is_used.to(tl.int32), 0)
        # Unused slots are at the left. Subtract their number to get the target of each entry.
        num_unused = tl.sum(((offs_n < width) & (source < 0)).to(tl.int32), 0)
        target = (num_moved + offs_n - block_start - num_unused).to(tl.int64)
        tl.store(x + target[:, None] * stride_token + offs_d[None, :], entries, mask=mask)
        num_moved += count
