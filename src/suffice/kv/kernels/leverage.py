"""Capacity of a cache and what each value contributes to it, from Gram matrices and their Cholesky factors."""

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
from suffice.kv.kernels.cholesky import Factor, inverse_factor
from suffice.kv.kernels.gram import weighted_gram
from suffice.kv.kernels.grid import rows_of, split_tokens
from suffice.kv.kernels.product import product


def factorize(values: Tensor, log_weights: Tensor, ridge: float) -> Factor:
    """Factorise A = σ²I + Σ w v vᵀ, σ² = ridge · tr/dim, the largest weight of a head counting as 1.

    Args:
        values: [batch, kv_heads, tokens, value_dim], float32, bfloat16 or float16.
        log_weights: float32 [batch, kv_heads, tokens], −inf for those that do not exist.
        ridge: λ, at least 1e-3: below that, 16-bit factors lose too much.

    """
    least = 1e-4 if values.dtype == torch.float16 else 1e-12
    return inverse_factor(weighted_gram(values, log_weights), values.shape[-1], ridge, least)


def part_factor(values: Tensor, log_weights: Tensor, kept: Tensor, whole: Factor) -> Factor:
    """Factorise the same of some of the entries, with the σ² of all; arguments as of `factorize`.

    Args:
        values: as there.
        log_weights: as there.
        kept: long [batch, kv_heads, width], which entries those are, −1 for none.
        whole: of all entries.

    """
    tokens = log_weights.shape[-1]
    chosen = torch.zeros(*kept.shape[:2], tokens + 1, dtype=torch.bool, device=kept.device)
    chosen.scatter_(-1, kept.where(kept >= 0, tokens), True)
    part = log_weights.masked_fill(~chosen[..., :tokens], float("-inf"))
    # Each set counts its own largest weight as 1.
    scale = (part.amax(-1) - log_weights.amax(-1)).exp()
    gram = weighted_gram(values, part) * scale[..., None, None]
    return inverse_factor(gram, values.shape[-1], 0.0, noise=whole.noise)


def inner_products(values: Tensor, log_weights: Tensor, factor: Factor, power: float | None = None) -> Tensor:
    """vᵀA⁻¹v of each value, float32 [batch, kv_heads, tokens]; 0 where there is none.

    With a power, log (w · (vᵀA⁻¹v)^power) in place of it, −inf where there is none.
    Arguments are those of `factorize` and what it returned. Between them V is read twice, nothing of its size written.
    """
    values = rows_of(values)
    batch, heads, tokens, dim = values.shape
    wide = block_size(dim)
    block = 128
    splits, chunk = split_tokens(tokens, batch * heads, block, 2, values.device)
    inner = torch.empty(batch, heads, tokens, dtype=torch.float32, device=values.device)
    launch(
        _quadratic_form,
        (batch * heads, splits),
        values,
        log_weights.contiguous(),
        factor.inverse,
        factor.noise,
        inner,
        tokens,
        chunk,
        heads,
        float(power or 0),
        *values.stride()[:3],
        SCORE=power is not None,
        DIM=dim,
        BLOCK_D=wide,
        BLOCK_N=block,
        num_warps=4 if wide <= 64 else 8,
        num_stages=3,
    )
    return inner


@triton.jit(do_not_specialize=["tokens", "chunk", "heads"])
def _quadratic_form(
    values: "Any",
    log_weights: "Any",
    inverse: "Any",
    noise: "Any",
    inner: "Any",
    tokens: "Any",
    chunk: "Any",
    heads: "Any",
    power: "Any",
    stride_batch: "Any",
    stride_head: "Any",
    stride_token: "Any",
    SCORE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * chunk
    values += head // heads * stride_batch + head % heads * stride_head
    log_weights += head * tokens
    inner += head * tokens
    dims = tl.arange(0, BLOCK_D)
    variance = tl.load(noise + head)
    # Transposed: what L⁻¹ maps the columns of Vᵀ to, V maps to from the left.
    matrix = tl.load(inverse + head * BLOCK_D * BLOCK_D + dims[None, :] * BLOCK_D + dims[:, None])
    high = matrix.to(values.dtype.element_ty)
    # Values of 16 bits are exact as they are, and the matrix is not: it comes in two parts.
    low = (matrix - high.to(tl.float32)).to(values.dtype.element_ty)
    for start in range(first, tl.minimum(first + chunk, tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        log = tl.load(log_weights + n, mask=n < tokens, other=float("-inf"))
        there = log > float("-inf")
        v = load_entries(values, n, there, dims, stride_token, DIM)
        y = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        if v.dtype != tl.float32:
            y = product(v, low, y)
        y = product(v, high, y)
        found = tl.sum(y * y, 1) / variance
        if SCORE:
            found = tl.where(there, log + power * tl.log(found), float("-inf"))
        tl.store(inner + n, found, mask=n < tokens)
