"""What kernels do alike with a block of keys, values or queries.

What is summed over the dimensions of a key is a matrix product with it, so that nothing is passed between lanes for it.
"""

# Triton's annotations speak of its compiler's own calls, not of what a kernel may be written as.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import triton
import triton.language as tl

from suffice.kv.kernels.product import product

TINY = tl.constexpr(1.1754943508222875e-38)
LOG2_E = tl.constexpr(1.4426950408889634)
# Below every exponent that there is, and finite: differences of two stay numbers.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def load_queries(
    asked: "Any",
    ends: "Any",
    stride: "Any",
    head: "Any",
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Load the queries of a KV head, [dim, group * count], and one past the last key that each may read, int32."""
    rows = tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    there = rows < GROUP * COUNT
    place = asked + head * GROUP * COUNT * DIM + rows[None, :] * DIM + dims[:, None]
    q = tl.load(place, mask=there[None, :] & (dims < DIM)[:, None], other=0.0)
    return q, tl.load(ends + rows % COUNT * stride, mask=there, other=0)


@triton.jit
def load_entries(entries: "Any", n: "Any", there: "Any", dims: "Any", stride_token: "Any", DIM: tl.constexpr):
    """Load a block of keys, values or queries, 0 where there is none: [tokens, dim]."""
    place = entries + n.to(tl.int64)[:, None] * stride_token + dims[None, :]
    return tl.load(place, mask=there[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def column(features: "Any", which: tl.constexpr, COLUMNS: tl.constexpr):
    """Return one column: [tokens]."""
    return tl.sum(tl.where((tl.arange(0, COLUMNS) == which)[None, :], features, 0.0), 1)


@triton.jit
def query_products(
    k: "Any",
    q: "Any",
    there: "Any",
    n: "Any",
    end: "Any",
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return the query-key products of a block, −inf for what a query may not read: [tokens, rows]."""
    products = product(k, q, tl.zeros((BLOCK_N, BLOCK_R), tl.float32))
    return tl.where(there[:, None] & (n[:, None] < end[None, :]), products, float("-inf"))
