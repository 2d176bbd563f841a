"""Weighted Gram matrices Σ w v vᵀ in one pass over the values."""

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
from suffice.kv.kernels.dot import precise_dot, truncate_to_bfloat16
from suffice.kv.kernels.grid import contiguous_rows, split_tokens


def weighted_gram(values: Tensor, log_weights: Tensor) -> Tensor:
    """Return Σ w v vᵀ of each head, with weights scaled so that the largest weight of a head is 1.

    Args:
        values: [batch, kv_heads, tokens, value_dim], float32, bfloat16 or float16. Values of weight 0 are ignored.
        log_weights: float32 [batch, kv_heads, tokens], −inf for weight 0.

    Returns:
        float32 [batch, kv_heads, D, D], where D is `block_size(value_dim)`, 0 beyond value_dim. The matrix is symmetric
        up to rounding.

    """
    values = contiguous_rows(values)
    batch, heads, tokens, dim = values.shape
    block_n, block_d = 64, block_size(dim)
    splits, split_size = split_tokens(tokens, batch * heads, block_n, 1, values.device)
    log_weights = log_weights.contiguous()
    max_log_weights = log_weights.amax(-1)
    partial = torch.empty(batch * heads, splits, block_d, block_d, dtype=torch.float32, device=values.device)
    launch(
        gram_kernel,
        (batch * heads, splits),
        values,
        log_weights,
        max_log_weights,
        partial,
        tokens,
        split_size,
        heads,
        *values.stride()[:3],
        DIM=dim,
        BLOCK_D=block_d,
        BLOCK_N=block_n,
        num_warps=4 if block_d <= 64 else 8,
        num_stages=3,
    )
    total = partial[:, 0] if splits == 1 else partial.sum(1)
    return total.view(batch, heads, block_d, block_d)


@triton.jit(do_not_specialize=["num_tokens", "split_size", "kv_heads"])
def gram_kernel(
    values: "Any",
    log_weights: "Any",
    max_log_weights: "Any",
    partial: "Any",
    num_tokens: "Any",
    split_size: "Any",
    kv_heads: "Any",
    stride_batch: "Any",
    stride_head: "Any",
    stride_token: "Any",
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute the Gram matrix of one split of the values of a head."""
    head = tl.program_id(0).to(tl.int64)
    split_start = tl.program_id(1) * split_size
    values += head // kv_heads * stride_batch + head % kv_heads * stride_head
    log_weights += head * num_tokens
    offs_d = tl.arange(0, BLOCK_D)
    max_log_weight = tl.load(max_log_weights + head)
    max_log_weight = tl.where(max_log_weight == float("-inf"), 0.0, max_log_weight)
    gram = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for block_start in range(split_start, tl.minimum(split_start + split_size, num_tokens), BLOCK_N):
        offs_n = block_start + tl.arange(0, BLOCK_N)
        log_weight = tl.load(log_weights + offs_n, mask=offs_n < num_tokens, other=float("-inf"))
        mask_n = log_weight > float("-inf")
        v = load_vectors(values, offs_n, mask_n, offs_d, stride_token, DIM)
        # Multiply both factors by √w, because small w would underflow in 16 bits.
        rows = v.to(tl.float32) * tl.exp(0.5 * (log_weight - max_log_weight))[:, None]
        if v.dtype == tl.float32:
            gram = precise_dot(tl.trans(rows), rows, gram)
        else:
            # Split the rows into 16-bit parts, h + l. (h + l)ᵀ(h + l) ≈ hᵀh + hᵀl + lᵀh, without the square of the
            # rounding error l. hᵀ(2l) has the same symmetric part as hᵀl + lᵀh, and needs one product fewer. The caller
            # symmetrizes the matrix.
            rounded = truncate_to_bfloat16(rows) if v.dtype == tl.bfloat16 else rows.to(v.dtype).to(tl.float32)
            high, low = rounded.to(v.dtype), (2.0 * (rows - rounded)).to(v.dtype)
            left = tl.trans(high)
            gram = precise_dot(left, high, gram)
            gram = precise_dot(left, low, gram)
    partial += (head * tl.num_programs(1) + tl.program_id(1)) * BLOCK_D * BLOCK_D
    tl.store(partial + offs_d[:, None] * BLOCK_D + offs_d[None, :], gram)
