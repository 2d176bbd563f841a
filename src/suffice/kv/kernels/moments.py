"""Mean and mean square of the newest queries, for the Gaussian of expected attention."""

# Triton's annotations speak of its compiler's own calls, not of what a kernel may be written as.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from suffice.gpu import block_size, launch
from suffice.kv.kernels.blocks import load_entries


def query_moments(queries: Tensor, recent: int, first: Tensor) -> Tensor:
    """Return mean and mean square of each query head, float32 [2, batch, heads, dim].

    Args:
        queries: [batch, heads, m, dim], adjacent along dim.
        recent: how many of the newest are taken; at most m.
        first: int32 [batch], how many of those are left out.

    """
    batch, heads, count, dim = queries.shape
    moments = torch.empty(2, batch, heads, dim, dtype=torch.float32, device=queries.device)
    launch(
        _moments,
        (batch * heads,),
        queries,
        moments,
        first,
        heads,
        count,
        *queries.stride()[:3],
        first.stride(0),
        RECENT=recent,
        DIM=dim,
        BLOCK_D=block_size(dim),
        BLOCK_N=64,
        num_warps=4,
    )
    return moments


@triton.jit(do_not_specialize=["heads", "count", "stride_skipped"])
def _moments(
    queries: "Any",
    moments: "Any",
    skipped: "Any",
    heads: "Any",
    count: "Any",
    stride_batch: "Any",
    stride_head: "Any",
    stride_token: "Any",
    stride_skipped: "Any",
    RECENT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Find mean and mean square of the newest queries of one query head."""
    head = tl.program_id(0).to(tl.int64)
    queries += head // heads * stride_batch + head % heads * stride_head
    first = tl.load(skipped + head // heads * stride_skipped)
    dims = tl.arange(0, BLOCK_D)
    mean = tl.zeros((BLOCK_D,), tl.float32)
    square = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, RECENT, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n >= first) & (n < RECENT)
        q = load_entries(queries, count - RECENT + n, inside, dims, stride_token, DIM).to(tl.float32)
        mean += tl.sum(q, 0)
        square += tl.sum(q * q, 0)
    asked = tl.maximum(RECENT - first, 1).to(tl.float32)
    tl.store(moments + head * DIM + dims, mean / asked, mask=dims < DIM)
    tl.store(moments + (tl.num_programs(0) + head) * DIM + dims, square / asked, mask=dims < DIM)
