"""The second pass over the keys that the log weights take: what each key gets from each term."""

# Triton's annotations speak of its compiler's own calls, not of what a kernel may be written as.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportCallIssue=false

from typing import Any

import triton
import triton.language as tl

from suffice.kv.kernels.blocks import LOG2_E, LOWEST, TINY, column, load_entries, load_queries, query_products
from suffice.kv.kernels.product import product


@triton.jit
def _normal(place: "Any", many: "Any", splits: "Any", BLOCK: tl.constexpr):
    """Return log₂ of the whole sum from the peaks and masses that the parts left at `place`; +inf if it is 0."""
    peaks = tl.load(place, mask=many < splits, other=LOWEST)
    masses = tl.load(place + BLOCK, mask=many < splits, other=0.0)
    peak = tl.max(peaks, 0)
    mass = tl.sum(masses * tl.exp2(peaks - peak[None, :]), 0)
    # What saw nothing adds nothing.
    return tl.where(mass > 0.0, peak + tl.log2(mass), float("inf"))


@triton.jit(
    do_not_specialize=[
        "tokens",
        "chunk",
        "heads",
        "starts_batch",
        "starts_head",
        "ends_batch",
        "ends_head",
        "ends_query",
    ]
)
def second_pass(
    keys: "Any",
    newest: "Any",
    sampled: "Any",
    found: "Any",
    starts: "Any",
    ends: "Any",
    sums: "Any",
    scores: "Any",
    totals: "Any",
    tokens: "Any",
    chunk: "Any",
    heads: "Any",
    scaling: "Any",
    stride_batch: "Any",
    stride_head: "Any",
    stride_token: "Any",
    starts_batch: "Any",
    starts_head: "Any",
    ends_batch: "Any",
    ends_head: "Any",
    ends_query: "Any",
    beta: "Any",
    POOL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    SAMPLED: tl.constexpr,
    GAUSSIANS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_S: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Find what each key gets from each term, and sums over a part of the keys of what the terms will count."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * chunk
    total = tl.num_programs(0).to(tl.int64)
    splits = tl.num_programs(1)
    row = head // heads
    keys += row * stride_batch + head % heads * stride_head
    ends += row * ends_batch + head % heads * ends_head
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, COLUMNS)
    factor = scaling * LOG2_E
    fall = -beta * LOG2_E
    many = tl.arange(0, BLOCK_P)[:, None]
    begin = tl.load(starts + row * starts_batch + head % heads * starts_head)
    own = sums + (head * splits + many) * (BLOCK_D + 2 * (BLOCK_W + BLOCK_S + COLUMNS))
    unit = tl.sum(tl.load(own + dims[None, :], mask=many < splits, other=0.0), 0)
    centre = unit / tl.maximum(tl.sqrt(tl.sum(unit * unit, 0)), TINY)
    own += BLOCK_D
    normal = _normal(own + tl.arange(0, BLOCK_W)[None, :], many, splits, BLOCK_W)
    bell_normal = _normal(own + 2 * BLOCK_W + columns[None, :], many, splits, COLUMNS)
    bell_normal = tl.where(columns < GAUSSIANS, bell_normal, float("inf"))
    kept = columns <= GAUSSIANS
    plane = total * tokens
    found += head * tokens
    q, end = load_queries(newest, ends, ends_query, head, DIM, GROUP, WINDOW, BLOCK_D, BLOCK_W)
    # The centre in two parts, which its product adds up again.
    rest = centre - centre.to(keys.dtype.element_ty).to(tl.float32)
    pair = tl.arange(0, 16)
    centre = tl.where(pair[None, :] == 0, centre[:, None], tl.where(pair[None, :] == 1, rest[:, None], 0.0))
    centre = centre.to(keys.dtype.element_ty)
    if SAMPLED > 0:
        far_place = own + 2 * (BLOCK_W + COLUMNS) + tl.arange(0, BLOCK_S)[None, :]
        far_normal = _normal(far_place, many, splits, BLOCK_S)
        ends += WINDOW * ends_query
        far_q, far_end = load_queries(sampled, ends, ends_query, head, DIM, GROUP, SAMPLED, BLOCK_D, BLOCK_S)
    salience_sum = tl.zeros((BLOCK_N,), tl.float32)
    attention_sum = tl.zeros((BLOCK_N,), tl.float32)
    sampled_sum = tl.zeros((BLOCK_N,), tl.float32)
    peak = tl.full((BLOCK_N,), LOWEST, tl.float32)
    mass = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, tl.minimum(first + chunk, tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = (n >= begin) & (n < tokens)
        k = load_entries(keys, n, there, dims, stride_token, DIM)
        place = found + columns[None, :] * plane + n[:, None]
        features = tl.load(place, mask=kept[None, :] & there[:, None], other=0.0)
        length = tl.sqrt(column(features, GAUSSIANS, COLUMNS))
        along = tl.sum(product(k, centre, tl.zeros((BLOCK_N, 16), tl.float32)), 1)
        cosine = along / tl.maximum(length, TINY)
        salience_sum += tl.where(there, tl.exp2(cosine * fall), 0.0)
        tl.store(scores + (2 * total + head) * tokens + n, cosine, mask=n < tokens)
        bells = features * LOG2_E - bell_normal[None, :]
        level = tl.maximum(tl.max(bells, 1), LOWEST)
        mixed = level + tl.log2(tl.sum(tl.exp2(bells - level[:, None]), 1))
        mixed = tl.where(there, mixed, float("-inf"))
        tl.store(scores + (total + head) * tokens + n, mixed, mask=n < tokens)
        highest = tl.maximum(peak, mixed)
        mass = mass * tl.exp2(peak - highest) + tl.exp2(mixed - highest)
        peak = highest
        weights = tl.exp2(query_products(k, q, there, n, end, BLOCK_N, BLOCK_W) * factor - normal[None, :])
        attention = tl.sum(weights, 1)
        # How many entries' pooled attention this one is part of.
        reach = tl.minimum(n + POOL // 2, tokens - 1) - tl.maximum(n - POOL // 2, begin) + 1
        attention_sum += attention * reach.to(tl.float32)
        tl.store(scores + head * tokens + n, attention, mask=n < tokens)
        if SAMPLED > 0:
            exponents = query_products(k, far_q, there, n, far_end, BLOCK_N, BLOCK_S) * factor - far_normal[None, :]
            far = tl.sum(tl.exp2(exponents), 1)
            sampled_sum += far
            tl.store(scores + (3 * total + head) * tokens + n, far, mask=n < tokens)
    totals += (head * splits + tl.program_id(1)) * 5
    one = tl.arange(0, 1)
    highest = tl.max(peak, 0)
    tl.store(totals + one, tl.sum(attention_sum, 0) / POOL)
    tl.store(totals + 1 + one, tl.sum(salience_sum, 0))
    tl.store(totals + 2 + one, tl.sum(sampled_sum, 0))
    tl.store(totals + 3 + one, highest)
    tl.store(totals + 4 + one, tl.sum(mass * tl.exp2(peak - highest), 0))
