"""Operations on blocks of keys, values and queries that several kernels share.

Sums over the dimensions of a key are computed as matrix products with the key, so that lanes exchange no data.
"""

# Triton's stubs describe the compiler's internal calls, so pyright cannot check the code of kernels.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import triton
import triton.language as tl

from suffice.kv.kernels.dot import precise_dot

TINY = tl.constexpr(1.1754943508222875e-38)  # smallest normal float32 number
LOG2_E = tl.constexpr(1.4426950408889634)
# Smaller than all exponents that occur, but finite, so that the difference of two maxima is never NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def load_queries(
    queries: "Any",
    ends: "Any",
    ends_stride_query: "Any",
    head: "Any",
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Load the queries of a KV head [dim, group * count], and the end of the keys that each query may read."""
    offs_q = tl.arange(0, BLOCK_Q)
    offs_d = tl.arange(0, BLOCK_D)
    mask_q = offs_q < GROUP * COUNT
    pointers = queries + head * GROUP * COUNT * DIM + offs_q[None, :] * DIM + offs_d[:, None]
    q = tl.load(pointers, mask=mask_q[None, :] & (offs_d < DIM)[:, None], other=0.0)
    return q, tl.load(ends + offs_q % COUNT * ends_stride_query, mask=mask_q, other=0)


@triton.jit
def load_vectors(vectors: "Any", offs_n: "Any", mask_n: "Any", offs_d: "Any", stride_token: "Any", DIM: tl.constexpr):
    """Load a block of keys, values or queries [tokens, dim], 0 where `mask_n` is false."""
    pointers = vectors + offs_n.to(tl.int64)[:, None] * stride_token + offs_d[None, :]
    return tl.load(pointers, mask=mask_n[:, None] & (offs_d < DIM)[None, :], other=0.0)


@triton.jit
def select_column(matrix: "Any", INDEX: tl.constexpr, COLUMNS: tl.constexpr):
    """Return one column [rows] of a matrix [rows, columns]."""
    return tl.sum(tl.where((tl.arange(0, COLUMNS) == INDEX)[None, :], matrix, 0.0), 1)


@triton.jit
def query_key_products(
    k: "Any",
    q: "Any",
    mask_n: "Any",
    offs_n: "Any",
    ends: "Any",
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Return the query-key products of a block [tokens, queries], −inf where a query may not read a key."""
    products = precise_dot(k, q, tl.zeros((BLOCK_N, BLOCK_Q), tl.float32))
    return tl.where(mask_n[:, None] & (offs_n[:, None] < ends[None, :]), products, float("-inf"))
