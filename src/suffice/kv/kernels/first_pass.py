"""The first pass over the keys that the log weights take: sums over all of them, which the second needs.

Attention logits of the queries, Gaussian logits and lengths are matrix products with the keys. Sums over the keys stay
with the lanes until the end. Exponentials are powers of two.
"""

# Triton's annotations speak of its compiler's own calls, not of what a kernel may be written as.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportCallIssue=false

from typing import Any

import triton
import triton.language as tl

from suffice.kv.kernels.blocks import LOG2_E, LOWEST, column, load_entries, load_queries, query_products
from suffice.kv.kernels.product import cut, product

# Rows that one lane holds two of: what a matrix unit's result looks like.
_TILE = tl.constexpr(16)


@triton.jit
def _in_parts(x: "Any", like: "Any", COLUMNS: tl.constexpr):
    """Split columns that are there four times into parts that add up to them, 24 bits of 16-bit floats: [dim, columns].

    Of float32 the first part is all.
    """
    part = tl.arange(0, 4 * COLUMNS)[None, :] // COLUMNS
    first = x.to(like).to(tl.float32)
    second = (x - first).to(like).to(tl.float32)
    return tl.where(part == 0, first, tl.where(part == 1, second, tl.where(part == 2, x - first - second, 0.0)))


@triton.jit
def _load_gaussians(
    place: "Any",
    length: tl.constexpr,
    DIM: tl.constexpr,
    GAUSSIANS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Load a row of each Gaussian as a column, and `length` in the column behind them: four times, [dim, columns]."""
    column = tl.arange(0, 4 * COLUMNS) % COLUMNS
    dims = tl.arange(0, BLOCK_D)
    mask = (column < GAUSSIANS)[None, :] & (dims < DIM)[:, None]
    found = tl.load(place + column[None, :] * DIM + dims[:, None], mask=mask, other=0.0)
    return tl.where((column == GAUSSIANS)[None, :], length, found)


@triton.jit
def _features(k: "Any", mean: "Any", spread: "Any", BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr):
    """Multiply keys with means, and their squares with spreads: float32 [tokens, columns].

    A column for each Gaussian, and behind them one of the squared length.
    """
    wide = k.to(tl.float32)
    square = wide * wide
    total = product(k, mean.to(k.dtype), tl.zeros((BLOCK_N, 4 * COLUMNS), tl.float32))
    if k.dtype == tl.float32:
        total = product(square, spread, total)
    else:
        # Squares of 16-bit floats are out of float16's range, and exact in two parts of bfloat16 if the keys are. The
        # first is cut off, not rounded: a mask costs a lane less than a conversion and back.
        high = cut(square)
        total = product((square - high).to(tl.bfloat16), spread.to(tl.bfloat16), total)
        total = product(high.to(tl.bfloat16), spread.to(tl.bfloat16), total)
    return tl.sum(tl.reshape(total, (BLOCK_N, 4, COLUMNS)), 1)


@triton.jit
def _grown(
    peak: "Any",
    mass: "Any",
    exponents: "Any",
    factor: "Any",
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add powers of two to running sums over the keys, mass · 2^peak for each lane: [tiles, lanes, rows].

    Exponents are multiplied with a positive factor.
    """
    pairs = tl.reshape(exponents, (BLOCK_N // _TILE, 2, _TILE // 2, BLOCK_R))
    highest = tl.maximum(peak, tl.max(pairs, 1) * factor)
    powers = tl.exp2(pairs * factor - highest[:, None, :, :])
    return highest, mass * tl.exp2(peak - highest) + tl.sum(powers, 1)


@triton.jit
def _together(peak: "Any", mass: "Any"):
    """Put the running sums of all lanes together: peak and mass [rows]."""
    highest = tl.max(tl.max(peak, 0), 0)
    return highest, tl.sum(tl.sum(mass * tl.exp2(peak - highest[None, None, :]), 0), 0)


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
        "inner_batch",
        "inner_head",
    ]
)
def first_pass(
    keys: "Any",
    newest: "Any",
    sampled: "Any",
    gaussians: "Any",
    starts: "Any",
    ends: "Any",
    sums: "Any",
    found: "Any",
    inner: "Any",
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
    inner_batch: "Any",
    inner_head: "Any",
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
    """Find sums over a part of the keys that the second pass needs: of unit keys, and of exponentials."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * chunk
    total = tl.num_programs(0).to(tl.int64)
    row = head // heads
    keys += row * stride_batch + head % heads * stride_head
    ends += row * ends_batch + head % heads * ends_head
    dims = tl.arange(0, BLOCK_D)
    factor = scaling * LOG2_E
    pair = tl.arange(0, 16)
    columns = tl.arange(0, COLUMNS)
    kept = columns <= GAUSSIANS
    plane = total * tokens
    found += head * tokens
    begin = tl.load(starts + row * starts_batch + head % heads * starts_head)
    counted = tl.load(inner + row * inner_batch + head % heads * inner_head)
    q, end = load_queries(newest, ends, ends_query, head, DIM, GROUP, WINDOW, BLOCK_D, BLOCK_W)
    gaussians += head * GAUSSIANS * DIM
    mean = _load_gaussians(gaussians, 0.0, DIM, GAUSSIANS, BLOCK_D, COLUMNS)
    mean = _in_parts(mean, keys.dtype.element_ty, COLUMNS)
    spread = _load_gaussians(gaussians + total * GAUSSIANS * DIM, 1.0, DIM, GAUSSIANS, BLOCK_D, COLUMNS)
    spread = _in_parts(spread, tl.float32 if keys.dtype.element_ty == tl.float32 else tl.bfloat16, COLUMNS)
    unit = tl.zeros((16, BLOCK_D), tl.float32)
    peak = tl.full((BLOCK_N // _TILE, _TILE // 2, BLOCK_W), LOWEST, tl.float32)
    mass = tl.zeros((BLOCK_N // _TILE, _TILE // 2, BLOCK_W), tl.float32)
    bell_peak = tl.full((BLOCK_N // _TILE, _TILE // 2, COLUMNS), LOWEST, tl.float32)
    bell_mass = tl.zeros((BLOCK_N // _TILE, _TILE // 2, COLUMNS), tl.float32)
    if SAMPLED > 0:
        ends += WINDOW * ends_query
        far_q, far_end = load_queries(sampled, ends, ends_query, head, DIM, GROUP, SAMPLED, BLOCK_D, BLOCK_S)
        far_peak = tl.full((BLOCK_N // _TILE, _TILE // 2, BLOCK_S), LOWEST, tl.float32)
        far_mass = tl.zeros((BLOCK_N // _TILE, _TILE // 2, BLOCK_S), tl.float32)
    for start in range(first, tl.minimum(first + chunk, tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = (n >= begin) & (n < tokens)
        k = load_entries(keys, n, there, dims, stride_token, DIM)
        features = _features(k, mean, spread, BLOCK_N, COLUMNS)
        tl.store(found + columns[None, :] * plane + n[:, None], features, mask=kept[None, :] & (n < tokens)[:, None])
        length = tl.sqrt(column(features, GAUSSIANS, COLUMNS))
        # A key of no length points nowhere.
        share = tl.where(length > 0.0, 1.0 / length, 0.0)
        if k.dtype == tl.float16:
            share = tl.minimum(share, 65504.0)
        high = share.to(k.dtype).to(tl.float32)
        shares = tl.where(pair[:, None] == 0, high[None, :], tl.where(pair[:, None] == 1, (share - high)[None, :], 0.0))
        unit = product(shares.to(k.dtype), k, unit)
        bells = tl.where((there & (n >= counted))[:, None], features, float("-inf"))
        bell_peak, bell_mass = _grown(bell_peak, bell_mass, bells, LOG2_E, BLOCK_N, COLUMNS)
        products = query_products(k, q, there, n, end, BLOCK_N, BLOCK_W)
        peak, mass = _grown(peak, mass, products, factor, BLOCK_N, BLOCK_W)
        if SAMPLED > 0:
            products = query_products(k, far_q, there, n, far_end, BLOCK_N, BLOCK_S)
            far_peak, far_mass = _grown(far_peak, far_mass, products, factor, BLOCK_N, BLOCK_S)
    sums += (head * tl.num_programs(1) + tl.program_id(1)) * (BLOCK_D + 2 * (BLOCK_W + BLOCK_S + COLUMNS))
    tl.store(sums + dims, tl.sum(unit, 0))
    sums += BLOCK_D
    _store_sums(sums, peak, mass, BLOCK_W)
    _store_sums(sums + 2 * BLOCK_W, bell_peak, bell_mass, COLUMNS)
    if SAMPLED > 0:
        _store_sums(sums + 2 * (BLOCK_W + COLUMNS), far_peak, far_mass, BLOCK_S)


@triton.jit
def _store_sums(place: "Any", peak: "Any", mass: "Any", BLOCK: tl.constexpr):
    """Store peaks, and behind them masses, of all lanes together."""
    rows = tl.arange(0, BLOCK)
    peak, mass = _together(peak, mass)
    tl.store(place + rows, peak)
    tl.store(place + BLOCK + rows, mass)
