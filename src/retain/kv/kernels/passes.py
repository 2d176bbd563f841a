"""The two passes over the keys that the log weights take."""

# Triton's annotations speak of its compiler's own calls, not of what a kernel may be written as.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import triton
import triton.language as tl

from retain.kv.kernels.product import product

_TINY = tl.constexpr(1.1754943508222875e-38)


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
def _load_keys(keys: "Any", n: "Any", there: "Any", dims: "Any", stride_token: "Any", DIM: tl.constexpr):
    """Load a block of keys, 0 where there is none: [tokens, dim]."""
    place = keys + n.to(tl.int64)[:, None] * stride_token + dims[None, :]
    return tl.load(place, mask=there[:, None] & (dims < DIM)[None, :], other=0.0)


@triton.jit
def _logits(
    k: "Any",
    q: "Any",
    there: "Any",
    n: "Any",
    end: "Any",
    scaling: "Any",
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return the attention logits of a block, −inf for what a query may not read: [tokens, group * count]."""
    logits = product(k, q, tl.zeros((BLOCK_N, BLOCK_R), tl.float32)) * scaling
    return tl.where(there[:, None] & (n[:, None] < end[None, :]), logits, float("-inf"))


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
    asked: "Any",
    gaussians: "Any",
    starts: "Any",
    ends: "Any",
    sums: "Any",
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
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    GAUSSIANS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Find sums over a part of the keys that the second pass needs: of unit keys, and of exponentials."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * chunk
    total = tl.num_programs(0).to(tl.int64)
    row = head // heads
    keys += row * stride_batch + head % heads * stride_head
    dims = tl.arange(0, BLOCK_D)
    rows = tl.arange(0, BLOCK_R)
    bells = tl.arange(0, BLOCK_G)
    begin = tl.load(starts + row * starts_batch + head % heads * starts_head)
    counted = tl.load(inner + row * inner_batch + head % heads * inner_head)
    places = ends + row * ends_batch + head % heads * ends_head + rows % COUNT * ends_query
    end = tl.load(places, mask=rows < ROWS, other=0)
    q = _load_asked(asked, head, DIM, ROWS, BLOCK_D, BLOCK_R)
    unit = tl.zeros((BLOCK_D,), tl.float32)
    peak = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_R,), tl.float32)
    bell_peak = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    bell_mass = tl.zeros((BLOCK_G,), tl.float32)
    for start in range(first, tl.minimum(first + chunk, tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = (n >= begin) & (n < tokens)
        k = _load_keys(keys, n, there, dims, stride_token, DIM)
        wide = k.to(tl.float32)
        length = tl.sqrt(tl.sum(wide * wide, 1))
        share = tl.where(there, 1.0 / tl.maximum(length, _TINY), 0.0)
        unit += tl.sum(wide * share[:, None], 0)
        for g in tl.static_range(GAUSSIANS):
            expected = _expected(wide, gaussians, head * GAUSSIANS + g, total * GAUSSIANS, dims, DIM)
            expected = tl.where((n >= counted) & there, expected, float("-inf"))
            own = tl.maximum(bell_peak, tl.where(bells == g, tl.max(expected, 0), float("-inf")))
            safe = tl.where(own == float("-inf"), 0.0, own)
            grown = bell_mass * tl.exp(bell_peak - safe)
            at = tl.sum(tl.where(bells == g, safe, 0.0), 0)
            bell_mass = tl.where(bells == g, grown + tl.sum(tl.exp(expected - at), 0), bell_mass)
            bell_peak = own
        logits = _logits(k, q, there, n, end, scaling, BLOCK_N, BLOCK_R)
        highest = tl.maximum(peak, tl.max(logits, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        mass = mass * tl.exp(peak - base) + tl.sum(tl.exp(logits - base[None, :]), 0)
        peak = highest
    sums += (head * tl.num_programs(1) + tl.program_id(1)) * (BLOCK_D + 2 * BLOCK_R + 2 * BLOCK_G)
    tl.store(sums + dims, unit)
    tl.store(sums + BLOCK_D + rows, peak)
    tl.store(sums + BLOCK_D + BLOCK_R + rows, mass)
    tl.store(sums + BLOCK_D + 2 * BLOCK_R + bells, bell_peak)
    tl.store(sums + BLOCK_D + 2 * BLOCK_R + BLOCK_G + bells, bell_mass)


@triton.jit
def _expected(
    wide: "Any",
    gaussians: "Any",
    which: "Any",
    spreads: "Any",
    dims: "Any",
    DIM: tl.constexpr,
):
    """Return the log of the attention that a Gaussian of queries pays to each key, before it is normalised."""
    mean = tl.load(gaussians + which * DIM + dims, mask=dims < DIM, other=0.0)
    spread = tl.load(gaussians + (spreads + which) * DIM + dims, mask=dims < DIM, other=0.0)
    return tl.sum(wide * (mean[None, :] + wide * spread[None, :]), 1)


@triton.jit
def _log_of_sums(place: "Any", many: "Any", splits: "Any", BLOCK: tl.constexpr):
    """Return log Σ of exponentials from the peaks and masses that the parts left at `place`."""
    peaks = tl.load(place, mask=many < splits, other=float("-inf"))
    masses = tl.load(place + BLOCK, mask=many < splits, other=0.0)
    peak = tl.max(peaks, 0)
    mass = tl.sum(masses * tl.exp(peaks - tl.where(peak == float("-inf"), 0.0, peak)[None, :]), 0)
    # What saw nothing adds nothing.
    return tl.where(mass > 0.0, peak + tl.log(mass), float("inf"))


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
    asked: "Any",
    gaussians: "Any",
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
    WINDOW: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    GAUSSIANS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Find what each key gets from each term, and sums over a part of the keys of what the terms will count."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * chunk
    total = tl.num_programs(0).to(tl.int64)
    splits = tl.num_programs(1)
    row = head // heads
    keys += row * stride_batch + head % heads * stride_head
    dims = tl.arange(0, BLOCK_D)
    rows = tl.arange(0, BLOCK_R)
    bells = tl.arange(0, BLOCK_G)
    many = tl.arange(0, BLOCK_S)[:, None]
    begin = tl.load(starts + row * starts_batch + head % heads * starts_head)
    places = ends + row * ends_batch + head % heads * ends_head + rows % COUNT * ends_query
    end = tl.load(places, mask=rows < ROWS, other=0)
    own = sums + (head * splits + many) * (BLOCK_D + 2 * BLOCK_R + 2 * BLOCK_G)
    unit = tl.sum(tl.load(own + dims[None, :], mask=many < splits, other=0.0), 0)
    centre = unit / tl.maximum(tl.sqrt(tl.sum(unit * unit, 0)), _TINY)
    normal = _log_of_sums(own + BLOCK_D + rows[None, :], many, splits, BLOCK_R)
    bell_normal = _log_of_sums(own + BLOCK_D + 2 * BLOCK_R + bells[None, :], many, splits, BLOCK_G)
    of_window = rows % COUNT < WINDOW
    q = _load_asked(asked, head, DIM, ROWS, BLOCK_D, BLOCK_R)
    salience_sum = tl.zeros((1,), tl.float32)
    attention_sum = tl.zeros((1,), tl.float32)
    sampled_sum = tl.zeros((1,), tl.float32)
    peak = tl.full((1,), float("-inf"), tl.float32)
    mass = tl.zeros((1,), tl.float32)
    for start in range(first, tl.minimum(first + chunk, tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = (n >= begin) & (n < tokens)
        k = _load_keys(keys, n, there, dims, stride_token, DIM)
        wide = k.to(tl.float32)
        length = tl.sqrt(tl.sum(wide * wide, 1))
        cosine = tl.sum(wide * centre[None, :], 1) / tl.maximum(length, _TINY)
        salience_sum += tl.sum(tl.where(there, tl.exp(-beta * cosine), 0.0), 0)
        tl.store(scores + (2 * total + head) * tokens + n, cosine, mask=n < tokens)
        mixed = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        for g in tl.static_range(GAUSSIANS):
            expected = _expected(wide, gaussians, head * GAUSSIANS + g, total * GAUSSIANS, dims, DIM)
            expected = tl.where(there, expected - tl.sum(tl.where(bells == g, bell_normal, 0.0), 0), float("-inf"))
            higher = tl.maximum(mixed, expected)
            level = tl.where(higher == float("-inf"), 0.0, higher)
            mixed = level + tl.log(tl.exp(mixed - level) + tl.exp(expected - level))
        tl.store(scores + (total + head) * tokens + n, mixed, mask=n < tokens)
        highest = tl.maximum(peak, tl.max(mixed, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        mass = mass * tl.exp(peak - base) + tl.sum(tl.exp(mixed - base), 0)
        peak = highest
        logits = _logits(k, q, there, n, end, scaling, BLOCK_N, BLOCK_R)
        weights = tl.exp(logits - normal[None, :])
        attention = tl.sum(tl.where(of_window[None, :], weights, 0.0), 1)
        # How many entries' pooled attention this one is part of.
        reach = tl.minimum(n + POOL // 2, tokens - 1) - tl.maximum(n - POOL // 2, begin) + 1
        attention_sum += tl.sum(attention * reach.to(tl.float32), 0) / POOL
        tl.store(scores + head * tokens + n, attention, mask=n < tokens)
        if COUNT > WINDOW:
            sampled = tl.sum(tl.where(of_window[None, :], 0.0, weights), 1)
            sampled_sum += tl.sum(sampled, 0)
            tl.store(scores + (3 * total + head) * tokens + n, sampled, mask=n < tokens)
    totals += (head * splits + tl.program_id(1)) * 5
    one = tl.arange(0, 1)
    tl.store(totals + one, attention_sum)
    tl.store(totals + 1 + one, salience_sum)
    tl.store(totals + 2 + one, sampled_sum)
    tl.store(totals + 3 + one, peak)
    tl.store(totals + 4 + one, mass)
