"""The two passes over the keys that the log weights take.

What is summed over the dimensions of a key is a matrix product with it: attention logits of the queries, Gaussian
logits, its length and its cosine with a centre, so that nothing is passed between lanes for it. Sums over the keys stay
with the lanes until the end. Exponentials are powers of two.
"""

# Triton's annotations speak of its compiler's own calls, not of what a kernel may be written as.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportCallIssue=false

from typing import Any

import triton
import triton.language as tl

from retain.kv.kernels.product import cut, product

_TINY = tl.constexpr(1.1754943508222875e-38)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Below every exponent that there is, and finite: differences of two stay numbers.
_LOWEST = tl.constexpr(-1e30)
# Rows that one lane holds two of: what a matrix unit's result looks like.
_TILE = tl.constexpr(16)


@triton.jit
def _load_asked(
    asked: "Any",
    head: "Any",
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Load the queries of a KV head, transposed: [dim, group * count]."""
    rows = tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    place = head * ROWS * DIM + rows[None, :] * DIM + dims[:, None]
    return tl.load(asked + place, mask=(rows < ROWS)[None, :] & (dims < DIM)[:, None], other=0.0)


@triton.jit
def _load_ends(place: "Any", stride: "Any", ROWS: tl.constexpr, COUNT: tl.constexpr, BLOCK_R: tl.constexpr):
    """Load one past the last key that each query of a KV head may read: int32 [group * count]."""
    rows = tl.arange(0, BLOCK_R)
    return tl.load(place + rows % COUNT * stride, mask=rows < ROWS, other=0)


@triton.jit
def _load_keys(keys: "Any", n: "Any", there: "Any", dims: "Any", stride_token: "Any", DIM: tl.constexpr):
    """Load a block of keys, 0 where there is none: [tokens, dim]."""
    place = keys + n.to(tl.int64)[:, None] * stride_token + dims[None, :]
    return tl.load(place, mask=there[:, None] & (dims < DIM)[None, :], other=0.0)


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
def _column(features: "Any", which: tl.constexpr, COLUMNS: tl.constexpr):
    """Return one column: [tokens]."""
    return tl.sum(tl.where((tl.arange(0, COLUMNS) == which)[None, :], features, 0.0), 1)


@triton.jit
def _products(
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


@triton.jit
def _normal(place: "Any", many: "Any", splits: "Any", BLOCK: tl.constexpr):
    """Return log₂ of the whole sum from the peaks and masses that the parts left at `place`; +inf if it is 0."""
    peaks = tl.load(place, mask=many < splits, other=_LOWEST)
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
    factor = scaling * _LOG2_E
    pair = tl.arange(0, 16)
    columns = tl.arange(0, COLUMNS)
    kept = columns <= GAUSSIANS
    plane = total * tokens
    found += head * tokens
    begin = tl.load(starts + row * starts_batch + head % heads * starts_head)
    counted = tl.load(inner + row * inner_batch + head % heads * inner_head)
    end = _load_ends(ends, ends_query, GROUP * WINDOW, WINDOW, BLOCK_W)
    q = _load_asked(newest, head, DIM, GROUP * WINDOW, BLOCK_D, BLOCK_W)
    gaussians += head * GAUSSIANS * DIM
    mean = _load_gaussians(gaussians, 0.0, DIM, GAUSSIANS, BLOCK_D, COLUMNS)
    mean = _in_parts(mean, keys.dtype.element_ty, COLUMNS)
    spread = _load_gaussians(gaussians + total * GAUSSIANS * DIM, 1.0, DIM, GAUSSIANS, BLOCK_D, COLUMNS)
    spread = _in_parts(spread, tl.float32 if keys.dtype.element_ty == tl.float32 else tl.bfloat16, COLUMNS)
    unit = tl.zeros((16, BLOCK_D), tl.float32)
    peak = tl.full((BLOCK_N // _TILE, _TILE // 2, BLOCK_W), _LOWEST, tl.float32)
    mass = tl.zeros((BLOCK_N // _TILE, _TILE // 2, BLOCK_W), tl.float32)
    bell_peak = tl.full((BLOCK_N // _TILE, _TILE // 2, COLUMNS), _LOWEST, tl.float32)
    bell_mass = tl.zeros((BLOCK_N // _TILE, _TILE // 2, COLUMNS), tl.float32)
    if SAMPLED > 0:
        far_end = _load_ends(ends + WINDOW * ends_query, ends_query, GROUP * SAMPLED, SAMPLED, BLOCK_S)
        far_q = _load_asked(sampled, head, DIM, GROUP * SAMPLED, BLOCK_D, BLOCK_S)
        far_peak = tl.full((BLOCK_N // _TILE, _TILE // 2, BLOCK_S), _LOWEST, tl.float32)
        far_mass = tl.zeros((BLOCK_N // _TILE, _TILE // 2, BLOCK_S), tl.float32)
    for start in range(first, tl.minimum(first + chunk, tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = (n >= begin) & (n < tokens)
        k = _load_keys(keys, n, there, dims, stride_token, DIM)
        features = _features(k, mean, spread, BLOCK_N, COLUMNS)
        tl.store(found + columns[None, :] * plane + n[:, None], features, mask=kept[None, :] & (n < tokens)[:, None])
        length = tl.sqrt(_column(features, GAUSSIANS, COLUMNS))
        share = tl.where(there, 1.0 / tl.maximum(length, _TINY), 0.0)
        high = share.to(k.dtype).to(tl.float32)
        shares = tl.where(pair[:, None] == 0, high[None, :], tl.where(pair[:, None] == 1, (share - high)[None, :], 0.0))
        unit = product(shares.to(k.dtype), k, unit)
        bells = tl.where((there & (n >= counted))[:, None], features, float("-inf"))
        bell_peak, bell_mass = _grown(bell_peak, bell_mass, bells, _LOG2_E, BLOCK_N, COLUMNS)
        products = _products(k, q, there, n, end, BLOCK_N, BLOCK_W)
        peak, mass = _grown(peak, mass, products, factor, BLOCK_N, BLOCK_W)
        if SAMPLED > 0:
            products = _products(k, far_q, there, n, far_end, BLOCK_N, BLOCK_S)
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
    factor = scaling * _LOG2_E
    fall = -beta * _LOG2_E
    many = tl.arange(0, BLOCK_P)[:, None]
    begin = tl.load(starts + row * starts_batch + head % heads * starts_head)
    own = sums + (head * splits + many) * (BLOCK_D + 2 * (BLOCK_W + BLOCK_S + COLUMNS))
    unit = tl.sum(tl.load(own + dims[None, :], mask=many < splits, other=0.0), 0)
    centre = unit / tl.maximum(tl.sqrt(tl.sum(unit * unit, 0)), _TINY)
    own += BLOCK_D
    normal = _normal(own + tl.arange(0, BLOCK_W)[None, :], many, splits, BLOCK_W)
    bell_normal = _normal(own + 2 * BLOCK_W + columns[None, :], many, splits, COLUMNS)
    bell_normal = tl.where(columns < GAUSSIANS, bell_normal, float("inf"))
    kept = columns <= GAUSSIANS
    plane = total * tokens
    found += head * tokens
    end = _load_ends(ends, ends_query, GROUP * WINDOW, WINDOW, BLOCK_W)
    q = _load_asked(newest, head, DIM, GROUP * WINDOW, BLOCK_D, BLOCK_W)
    # The centre in two parts, which its product adds up again.
    rest = centre - centre.to(keys.dtype.element_ty).to(tl.float32)
    pair = tl.arange(0, 16)
    centre = tl.where(pair[None, :] == 0, centre[:, None], tl.where(pair[None, :] == 1, rest[:, None], 0.0))
    centre = centre.to(keys.dtype.element_ty)
    if SAMPLED > 0:
        far_place = own + 2 * (BLOCK_W + COLUMNS) + tl.arange(0, BLOCK_S)[None, :]
        far_normal = _normal(far_place, many, splits, BLOCK_S)
        far_end = _load_ends(ends + WINDOW * ends_query, ends_query, GROUP * SAMPLED, SAMPLED, BLOCK_S)
        far_q = _load_asked(sampled, head, DIM, GROUP * SAMPLED, BLOCK_D, BLOCK_S)
    salience_sum = tl.zeros((BLOCK_N,), tl.float32)
    attention_sum = tl.zeros((BLOCK_N,), tl.float32)
    sampled_sum = tl.zeros((BLOCK_N,), tl.float32)
    peak = tl.full((BLOCK_N,), _LOWEST, tl.float32)
    mass = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, tl.minimum(first + chunk, tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = (n >= begin) & (n < tokens)
        k = _load_keys(keys, n, there, dims, stride_token, DIM)
        place = found + columns[None, :] * plane + n[:, None]
        features = tl.load(place, mask=kept[None, :] & there[:, None], other=0.0)
        length = tl.sqrt(_column(features, GAUSSIANS, COLUMNS))
        along = tl.sum(product(k, centre, tl.zeros((BLOCK_N, 16), tl.float32)), 1)
        cosine = along / tl.maximum(length, _TINY)
        salience_sum += tl.where(there, tl.exp2(cosine * fall), 0.0)
        tl.store(scores + (2 * total + head) * tokens + n, cosine, mask=n < tokens)
        bells = features * _LOG2_E - bell_normal[None, :]
        level = tl.maximum(tl.max(bells, 1), _LOWEST)
        mixed = level + tl.log2(tl.sum(tl.exp2(bells - level[:, None]), 1))
        mixed = tl.where(there, mixed, float("-inf"))
        tl.store(scores + (total + head) * tokens + n, mixed, mask=n < tokens)
        highest = tl.maximum(peak, mixed)
        mass = mass * tl.exp2(peak - highest) + tl.exp2(mixed - highest)
        peak = highest
        weights = tl.exp2(_products(k, q, there, n, end, BLOCK_N, BLOCK_W) * factor - normal[None, :])
        attention = tl.sum(weights, 1)
        # How many entries' pooled attention this one is part of.
        reach = tl.minimum(n + POOL // 2, tokens - 1) - tl.maximum(n - POOL // 2, begin) + 1
        attention_sum += attention * reach.to(tl.float32)
        tl.store(scores + head * tokens + n, attention, mask=n < tokens)
        if SAMPLED > 0:
            weights = tl.exp2(_products(k, far_q, there, n, far_end, BLOCK_N, BLOCK_S) * factor - far_normal[None, :])
            far = tl.sum(weights, 1)
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
