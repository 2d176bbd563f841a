"""Mean and mean square of the newest queries, which define the Gaussian of expected attention."""

# Triton's stubs describe the compiler's internal calls, so pyright cannot check the code of kernels.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from suffice.gpu import block_size, launch
from suffice.kv.kernels.blocks import load_vectors


def query_moments(queries: Tensor, num_recent: int, num_skipped: Tensor) -> Tensor:
    """Return the mean and the mean square of the newest queries of each head, float32 [2, batch, heads, dim].

    Args:
        queries: [batch, heads, m, dim], contiguous along dim.
        num_recent: number of newest queries to use, at most m.
        num_skipped: number of the oldest of these queries to skip, int32 [batch].

    """
    batch, heads, num_queries, dim = queries.shape
    moments = torch.empty(2, batch, heads, dim, dtype=torch.float32, device=queries.device)
    launch(
        moments_kernel,
        (batch * heads,),
        queries,
        moments,
        num_skipped,
        heads,
        num_queries,
        *queries.stride()[:3],
        num_skipped.stride(0),
        RECENT=num_recent,
        DIM=dim,
        BLOCK_D=block_size(dim),
        BLOCK_N=64,
        num_warps=4,
    )
    return moments


@triton.jit(do_not_specialize=["num_heads", "num_queries", "skipped_stride"])
def moments_kernel(
    queries: "Any",
    moments: "Any",
    num_skipped: "Any",
    num_heads: "Any",
    num_queries: "Any",
    stride_batch: "Any",
    stride_head: "Any",
    stride_token: "Any",
    skipped_stride: "Any",
    RECENT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute the moments of one query head."""
    head = tl.program_id(0).to(tl.int64)
    queries += head // num_heads * stride_batch + head % num_heads * stride_head
    skipped = tl.load(num_skipped + head // num_heads * skipped_stride)
    offs_d = tl.arange(0, BLOCK_D)
    mean = tl.zeros((BLOCK_D,), tl.float32)
    square = tl.zeros((BLOCK_D,), tl.float32)
    for block_start in range(0, RECENT, BLOCK_N):
        offs_n = block_start + tl.arange(0, BLOCK_N)
        mask_n = (offs_n >= skipped) & (offs_n < RECENT)
        q = load_vectors(queries, num_queries - RECENT + offs_n, mask_n, offs_d, stride_token, DIM).to(tl.float32)
        mean += tl.sum(q, 0)
        square += tl.sum(q * q, 0)
    num_used = tl.maximum(RECENT - skipped, 1).to(tl.float32)
    tl.store(moments + head * DIM + offs_d, mean / num_used, mask=offs_d < DIM)
    tl.store(moments + (tl.num_programs(0) + head) * DIM + offs_d, square / num_used, mask=offs_d < DIM)
