"""Capacity of a cache and leverage of each value, from Gram matrices and inverse Cholesky factors.

The formulas are those of `suffice.information.capacity`. The values are read twice, and no copy of them is written.
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
from suffice.kv.kernels.blocks import load_vectors
from suffice.kv.kernels.cholesky import InverseFactor, inverse_factor
from suffice.kv.kernels.dot import precise_dot
from suffice.kv.kernels.gram import weighted_gram
from suffice.kv.kernels.grid import contiguous_rows, split_tokens


def factorize(values: Tensor, log_weights: Tensor, ridge: float) -> InverseFactor:
    """Factorize A = σ²I + Σ w v vᵀ of each head, with σ² = ridge · tr(Σ w v vᵀ)/value_dim.

    Weights are scaled so that the largest weight of a head is 1.

    Args:
        values: [batch, kv_heads, tokens, value_dim], float32, bfloat16 or float16.
        log_weights: float32 [batch, kv_heads, tokens], −inf for entries that do not exist.
        ridge: λ, at least 1e-3. Below that, 16-bit parts of the factor are not accurate enough.

    """
    min_trace = 1e-4 if values.dtype == torch.float16 else 1e-12
    return inverse_factor(weighted_gram(values, log_weights), values.shape[-1], ridge, min_trace)


def factorize_subset(values: Tensor, log_weights: Tensor, kept: Tensor, whole: InverseFactor) -> InverseFactor:
    """Factorize A for a subset of the entries, with the σ² of all entries.

    Args:
        values: [batch, kv_heads, tokens, value_dim], float32, bfloat16 or float16.
        log_weights: float32 [batch, kv_heads, tokens], −inf for entries that do not exist.
        kept: indices of the entries in the subset, long [batch, kv_heads, width], −1 for unused slots.
        whole: result of `factorize` for all entries.

    """
    tokens = log_weights.shape[-1]
    mask = torch.zeros(*kept.shape[:2], tokens + 1, dtype=torch.bool, device=kept.device)
    mask.scatter_(-1, kept.where(kept >= 0, tokens), True)
    subset_log_weights = log_weights.masked_fill(~mask[..., :tokens], float("-inf"))
    # `weighted_gram` scales by the largest weight of the subset. Scale by the largest weight of all entries instead.
    scale = (subset_log_weights.amax(-1) - log_weights.amax(-1)).exp()
    gram = weighted_gram(values, subset_log_weights) * scale[..., None, None]
    return inverse_factor(gram, values.shape[-1], 0.0, noise=whole.noise)


def quadratic_forms(values: Tensor, log_weights: Tensor, factor: InverseFactor, power: float | None = None) -> Tensor:
    """Return vᵀA⁻¹v of each value, or, with `power`, its log score.

    Args:
        values: [batch, kv_heads, tokens, value_dim], float32, bfloat16 or float16.
        log_weights: float32 [batch, kv_heads, tokens], −inf for entries that do not exist.
        factor: result of `factorize` for these values and weights.
        power: if given, the log score log (w · (vᵀA⁻¹v)^power) is returned.

    Returns:
        float32 [batch, kv_heads, tokens]. For entries that do not exist, 0 without `power`, and −inf with it.

    """
    values = contiguous_rows(values)
    batch, heads, tokens, dim = values.shape
    block_n, block_d = 128, block_size(dim)
    splits, split_size = split_tokens(tokens, batch * heads, block_n, 2, values.device)
    result = torch.empty(batch, heads, tokens, dtype=torch.float32, device=values.device)
    launch(
        quadratic_form_kernel,
        (batch * heads, splits),
        values,
        log_weights.contiguous(),
        factor.inverse,
        factor.noise,
        result,
        tokens,
        split_size,
        heads,
        float(power or 0),
        *values.stride()[:3],
        SCORE=power is not None,
        DIM=dim,
        BLOCK_D=block_d,
        BLOCK_N=block_n,
        num_warps=4 if block_d <= 64 else 8,
        num_stages=3,
    )
    return result


@triton.jit(do_not_specialize=["num_tokens", "split_size", "kv_heads"])
def quadratic_form_kernel(
    values: "Any",
    log_weights: "Any",
    inverse: "Any",
    noise: "Any",
    result: "Any",
    num_tokens: "Any",
    split_size: "Any",
    kv_heads: "Any",
    power: "Any",
    stride_batch: "Any",
    stride_head: "Any",
    stride_token: "Any",
    SCORE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute vᵀA⁻¹v = ‖L⁻¹v‖² / σ² for one split of the values of a head."""
    head = tl.program_id(0).to(tl.int64)
    split_start = tl.program_id(1) * split_size
    values += head // kv_heads * stride_batch + head % kv_heads * stride_head
    log_weights += head * num_tokens
    result += head * num_tokens
    offs_d = tl.arange(0, BLOCK_D)
    variance = tl.load(noise + head)
    # The transpose of L⁻¹. The values are multiplied by it from the right.
    matrix = tl.load(inverse + head * BLOCK_D * BLOCK_D + offs_d[None, :] * BLOCK_D + offs_d[:, None])
    high = matrix.to(values.dtype.element_ty)
    # Two 16-bit parts preserve the precision of the matrix. The values are exact in 16 bits.
    low = (matrix - high.to(tl.float32)).to(values.dtype.element_ty)
    for block_start in range(split_start, tl.minimum(split_start + split_size, num_tokens), BLOCK_N):
        offs_n = block_start + tl.arange(0, BLOCK_N)
        log_weight = tl.load(log_weights + offs_n, mask=offs_n < num_tokens, other=float("-inf"))
        mask_n = log_weight > float("-inf")
        v = load_vectors(values, offs_n, mask_n, offs_d, stride_token, DIM)
        y = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        if v.dtype != tl.float32:
            y = precise_dot(v, low, y)
        y = precise_dot(v, high, y)
        product = tl.sum(y * y, 1) / variance
        if SCORE:
            product = tl.where(mask_n, log_weight + power * tl.log(product), float("-inf"))
        tl.store(result + offs_n, product, mask=offs_n < num_tokens)
