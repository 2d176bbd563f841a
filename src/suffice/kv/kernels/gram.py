"""Weighted Gram matrices Σ w v vᵀ in one pass over the values."""

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
from suffice.kv.kernels.grid import rows_of, split_tokens
from suffice.kv.kernels.product import cut, product


def weighted_gram(values: Tensor, log_weights: Tensor) -> Tensor:
    """Σ w v vᵀ of each row and head, the largest weight of a head counting as 1; float32 sums.

    Args:
        values: [batch, kv_heads, tokens, value_dim], float32, bfloat16 or float16. Those of weight 0 are not looked at.
        log_weights: float32 [batch, kv_heads, tokens], −inf for weight 0.

    Returns:
        [batch, kv_heads, D, D], float32, D the next power of two, 0 beyond value_dim. Its two halves agree up to
        rounding.

    """
    values = rows_of(values)
    batch, heads, tokens, dim = values.shape
    block, wide = 64, block_size(dim)
    splits, chunk = split_tokens(tokens, batch * heads, block, 1, values.device)
    log_weights = log_weights.contiguous()
    peaks = log_weights.amax(-1)
    parts = torch.empty(batch * heads, splits, wide, wide, dtype=torch.float32, device=values.device)
    launch(
        _gram,
        (batch * heads, splits),
        values,
        log_weights,
        peaks,
        parts,
        tokens,
        chunk,
        heads,
        *values.stride()[:3],
        DIM=dim,
        BLOCK_D=wide,
        BLOCK_N=block,
        num_warps=4 if wide <= 64 else 8,
        num_stages=3,
    )
    total = parts[:, 0] if splits == 1 else parts.sum(1)
    return total.view(batch, heads, wide, wide)


@triton.jit(do_not_specialize=["tokens", "chunk", "heads"])
def _gram(
    values: "Any",
    log_weights: "Any",
    peaks: "Any",
    parts: "Any",
    tokens: "Any",
    chunk: "Any",
    heads: "Any",
    stride_batch: "Any",
    stride_head: "Any",
    stride_token: "Any",
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * chunk
    values += head // heads * stride_batch + head % heads * stride_head
    log_weights += head * tokens
    dims = tl.arange(0, BLOCK_D)
    peak = tl.load(peaks + head)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    gram = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for start in range(first, tl.minimum(first + chunk, tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        log = tl.load(log_weights + n, mask=n < tokens, other=float("-inf"))
        there = log > float("-inf")
        v = load_entries(values, n, there, dims, stride_token, DIM)
        # The root on both sides keeps the exponents of small weights in range of 16 bits.
        rows = v.to(tl.float32) * tl.exp(0.5 * (log - peak))[:, None]
        if v.dtype == tl.float32:
            gram = product(tl.trans(rows), rows, gram)
        else:
            # (h + l)(h + l)ᵀ without the square of the rounding error l; h·2lᵀ is made symmetric by the reader.
            wide = cut(rows) if v.dtype == tl.bfloat16 else rows.to(v.dtype).to(tl.float32)
            high, low = wide.to(v.dtype), (2.0 * (rows - wide)).to(v.dtype)
            left = tl.trans(high)
            gram = product(left, high, gram)
            gram = product(left, low, gram)
    parts += (head * tl.num_programs(1) + tl.program_id(1)) * BLOCK_D * BLOCK_D
    tl.store(parts + dims[:, None] * BLOCK_D + dims[None, :], gram)
