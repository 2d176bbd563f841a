"""Log weights of the policy `capkv` in two passes over the keys: window attention, expected attention, salience.

What the first pass finds for a head (sums of exponentials, the mean of the unit keys) the second needs before it can
look at a single key again, so K is read twice and no third time. Of the attention of the observation window no more
exists than a block of tokens.
"""

# Triton's annotations speak of its compiler's own calls, not of what a kernel may be written as.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from retain.gpu import launch, power_of_two
from retain.kv.kernels.grid import rows_of, split_tokens
from retain.kv.kernels.moments import query_moments
from retain.kv.kernels.product import product

_BLOCK = 64
_TINY = tl.constexpr(1.1754943508222875e-38)


@dataclass(frozen=True, slots=True)
class Observation:
    """What the log weights are made from.

    Args:
        queries: [batch, heads, m, dim], the newest, after rotary embedding, of the dtype of the keys.
        keys: [batch, kv_heads, tokens, dim], after rotary embedding.
        scaling: factor on the query-key product.
        window: queries of the observation window; at most m.
        recent: queries of which expected attention takes mean and variance; at most m.
        first: int32 [batch], how many of those `recent` it leaves out.
        starts: int32 [batch, kv_heads], first entry that exists; all after it do.
        ends: int32 [batch, kv_heads, window], one past the last entry that each query of the window may read.

    """

    queries: Tensor
    keys: Tensor
    scaling: float
    window: int
    recent: int
    first: Tensor
    starts: Tensor
    ends: Tensor


def observed_log_weights(
    seen: Observation, *, pool: int, beta: float, factors: tuple[float, float, float]
) -> Tensor:  # [batch, kv_heads, tokens]
    """Log Σ c_j w_j / Σw_j over w = pooled window attention, expected attention and salience.

    Args:
        seen: queries and keys.
        pool: odd width of the pooling of the window's attention along the tokens.
        beta: w = exp(−β cos(k, mean of the unit keys)) of the salience.
        factors: c of the three terms, positive.

    Returns:
        float32 [batch, kv_heads, tokens], −inf where no entry exists.

    """
    keys = rows_of(seen.keys)
    batch, kv_heads, tokens, dim = keys.shape
    heads, group = batch * kv_heads, seen.queries.shape[1] // kv_heads
    wide, rows = power_of_two(dim), power_of_two(group * seen.window)
    queries = rows_of(seen.queries)
    moments = query_moments(queries, seen.recent, seen.first)
    window = queries[:, :, queries.shape[2] - seen.window :].contiguous()
    block = _BLOCK // 2 if keys.dtype == torch.float32 else _BLOCK  # so that registers suffice
    splits, chunk = split_tokens(tokens, heads, block, 2, keys.device)
    sums = torch.empty(heads, splits, wide + 2 * rows + 2, dtype=torch.float32, device=keys.device)
    totals = torch.empty(heads, splits, 2, dtype=torch.float32, device=keys.device)
    # Window attention, expected attention, cosine.
    scores = torch.empty(3, batch, kv_heads, tokens, dtype=torch.float32, device=keys.device)
    whole = {
        "DIM": dim,
        "ROWS": group * seen.window,
        "WINDOW": seen.window,
        "BLOCK_D": wide,
        "BLOCK_R": rows,
        "BLOCK_N": block,
        "num_warps": 4,
        "num_stages": 3,
    }
    where = (keys, window, seen.starts, seen.ends, scores, sums)
    sizes = (tokens, chunk, kv_heads, seen.scaling, *keys.stride()[:3], *seen.starts.stride(), *seen.ends.stride())
    launch(_first_pass, (heads, splits), *where, moments, *sizes, GROUP=group, **whole)
    parts = power_of_two(splits, 1)
    launch(_second_pass, (heads, splits), *where, totals, *sizes, beta, POOL=pool, BLOCK_S=parts, **whole)
    log = torch.empty(batch, kv_heads, tokens, dtype=torch.float32, device=keys.device)
    launch(
        _sum_of_terms,
        (heads, triton.cdiv(tokens, 1024)),
        scores,
        sums,
        totals,
        seen.starts,
        log,
        tokens,
        kv_heads,
        splits,
        *seen.starts.stride(),
        beta,
        *factors,
        WIDTH=wide + 2 * rows + 2,
        POOL=pool,
        BLOCK_S=parts,
        BLOCK_N=1024,
        num_warps=4,
    )
    return log


@triton.jit
def _load_window(
    window: "Any",
    head: "Any",
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Load the queries of the window, transposed: [dim, group * window]."""
    rows = tl.arange(0, BLOCK_R)
    dims = tl.arange(0, BLOCK_D)
    place = head * ROWS * DIM + rows[None, :] * DIM + dims[:, None]
    return tl.load(window + place, mask=(rows < ROWS)[None, :] & (dims < DIM)[:, None], other=0.0)


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
def _first_pass(
    keys: "Any",
    window: "Any",
    starts: "Any",
    ends: "Any",
    scores: "Any",
    sums: "Any",
    moments: "Any",
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
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Find the expected attention of each key, and sums over a part of the keys that the second pass needs."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * chunk
    total = tl.num_programs(0).to(tl.int64)
    row = head // heads
    keys += row * stride_batch + head % heads * stride_head
    dims = tl.arange(0, BLOCK_D)
    rows = tl.arange(0, BLOCK_R)
    begin = tl.load(starts + row * starts_batch + head % heads * starts_head)
    places = ends + row * ends_batch + head % heads * ends_head + rows % WINDOW * ends_query
    end = tl.load(places, mask=rows < ROWS, other=0)
    mean = tl.zeros((BLOCK_D,), tl.float32)
    square = tl.zeros((BLOCK_D,), tl.float32)
    for g in range(GROUP):
        place = moments + (head * GROUP + g) * DIM + dims
        mean += tl.load(place, mask=dims < DIM, other=0.0)
        square += tl.load(place + total * GROUP * DIM, mask=dims < DIM, other=0.0)
    mean = mean / GROUP
    spread = tl.maximum(square / GROUP - mean * mean, 0.0) * (0.5 * scaling * scaling)
    mean = mean * scaling
    q = _load_window(window, head, DIM, ROWS, BLOCK_D, BLOCK_R)
    unit = tl.zeros((BLOCK_D,), tl.float32)
    peak = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_R,), tl.float32)
    expected_peak = tl.full((1,), float("-inf"), tl.float32)
    expected_mass = tl.zeros((1,), tl.float32)
    for start in range(first, tl.minimum(first + chunk, tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = (n >= begin) & (n < tokens)
        k = tl.load(
            keys + n.to(tl.int64)[:, None] * stride_token + dims[None, :],
            mask=there[:, None] & (dims < DIM)[None, :],
            other=0.0,
        )
        wide = k.to(tl.float32)
        length = tl.sqrt(tl.sum(wide * wide, 1))
        share = tl.where(there, 1.0 / tl.maximum(length, _TINY), 0.0)
        unit += tl.sum(wide * share[:, None], 0)
        expected = tl.sum(wide * (mean[None, :] + wide * spread[None, :]), 1)
        expected = tl.where(there, expected, float("-inf"))
        tl.store(scores + (total + head) * tokens + n, expected, mask=n < tokens)
        own = tl.maximum(expected_peak, tl.max(expected, 0))
        safe = tl.where(own == float("-inf"), 0.0, own)
        expected_mass = expected_mass * tl.exp(expected_peak - safe) + tl.sum(tl.exp(expected - safe), 0)
        expected_peak = own
        logits = product(k, q, tl.zeros((BLOCK_N, BLOCK_R), tl.float32)) * scaling
        logits = tl.where(there[:, None] & (n[:, None] < end[None, :]), logits, float("-inf"))
        highest = tl.maximum(peak, tl.max(logits, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        mass = mass * tl.exp(peak - base) + tl.sum(tl.exp(logits - base[None, :]), 0)
        peak = highest
    sums += (head * tl.num_programs(1) + tl.program_id(1)) * (BLOCK_D + 2 * BLOCK_R + 2)
    tl.store(sums + dims, unit)
    tl.store(sums + BLOCK_D + rows, peak)
    tl.store(sums + BLOCK_D + BLOCK_R + rows, mass)
    one = tl.arange(0, 1)
    tl.store(sums + BLOCK_D + 2 * BLOCK_R + one, expected_peak)
    tl.store(sums + BLOCK_D + 2 * BLOCK_R + 1 + one, expected_mass)


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
def _second_pass(
    keys: "Any",
    window: "Any",
    starts: "Any",
    ends: "Any",
    scores: "Any",
    sums: "Any",
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
    BLOCK_S: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Find window attention and cosine of each key, and sums over a part of the keys of what they will count."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * chunk
    total = tl.num_programs(0).to(tl.int64)
    splits = tl.num_programs(1)
    row = head // heads
    keys += row * stride_batch + head % heads * stride_head
    dims = tl.arange(0, BLOCK_D)
    rows = tl.arange(0, BLOCK_R)
    parts = tl.arange(0, BLOCK_S)[:, None]
    begin = tl.load(starts + row * starts_batch + head % heads * starts_head)
    places = ends + row * ends_batch + head % heads * ends_head + rows % WINDOW * ends_query
    end = tl.load(places, mask=rows < ROWS, other=0)
    own = sums + (head * splits + parts) * (BLOCK_D + 2 * BLOCK_R + 2)
    unit = tl.sum(tl.load(own + dims[None, :], mask=parts < splits, other=0.0), 0)
    centre = unit / tl.maximum(tl.sqrt(tl.sum(unit * unit, 0)), _TINY)
    peaks = tl.load(own + BLOCK_D + rows[None, :], mask=parts < splits, other=float("-inf"))
    masses = tl.load(own + BLOCK_D + BLOCK_R + rows[None, :], mask=parts < splits, other=0.0)
    peak = tl.max(peaks, 0)
    mass = tl.sum(masses * tl.exp(peaks - tl.where(peak == float("-inf"), 0.0, peak)[None, :]), 0)
    # A query that may read nothing adds nothing.
    normal = tl.where(mass > 0.0, peak + tl.log(mass), float("inf"))
    q = _load_window(window, head, DIM, ROWS, BLOCK_D, BLOCK_R)
    salience_sum = tl.zeros((1,), tl.float32)
    attention_sum = tl.zeros((1,), tl.float32)
    for start in range(first, tl.minimum(first + chunk, tokens), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = (n >= begin) & (n < tokens)
        k = tl.load(
            keys + n.to(tl.int64)[:, None] * stride_token + dims[None, :],
            mask=there[:, None] & (dims < DIM)[None, :],
            other=0.0,
        )
        wide = k.to(tl.float32)
        length = tl.sqrt(tl.sum(wide * wide, 1))
        cosine = tl.sum(wide * centre[None, :], 1) / tl.maximum(length, _TINY)
        salience_sum += tl.sum(tl.where(there, tl.exp(-beta * cosine), 0.0), 0)
        logits = product(k, q, tl.zeros((BLOCK_N, BLOCK_R), tl.float32)) * scaling
        logits = tl.where(there[:, None] & (n[:, None] < end[None, :]), logits, float("-inf"))
        attention = tl.sum(tl.exp(logits - normal[None, :]), 1) / ROWS
        # How many entries' pooled attention this one is part of.
        reach = tl.minimum(n + POOL // 2, tokens - 1) - tl.maximum(n - POOL // 2, begin) + 1
        attention_sum += tl.sum(attention * reach.to(tl.float32), 0) / POOL
        tl.store(scores + head * tokens + n, attention, mask=n < tokens)
        tl.store(scores + (2 * total + head) * tokens + n, cosine, mask=n < tokens)
    totals += (head * splits + tl.program_id(1)) * 2
    one = tl.arange(0, 1)
    tl.store(totals + one, attention_sum)
    tl.store(totals + 1 + one, salience_sum)


@triton.jit(do_not_specialize=["tokens", "heads", "splits", "starts_batch", "starts_head"])
def _sum_of_terms(
    scores: "Any",
    sums: "Any",
    totals: "Any",
    starts: "Any",
    log: "Any",
    tokens: "Any",
    heads: "Any",
    splits: "Any",
    starts_batch: "Any",
    starts_head: "Any",
    beta: "Any",
    window_factor: "Any",
    expected_factor: "Any",
    salience_factor: "Any",
    WIDTH: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Divide each term by its sum over the head's entries, and add them, in logarithms."""
    head = tl.program_id(0).to(tl.int64)
    total = tl.num_programs(0).to(tl.int64)
    parts = tl.arange(0, BLOCK_S)
    inside = parts < splits
    begin = tl.load(starts + head // heads * starts_batch + head % heads * starts_head)
    own = totals + (head * splits + parts) * 2
    window_sum = tl.sum(tl.load(own, mask=inside, other=0.0), 0)
    salience_sum = tl.sum(tl.load(own + 1, mask=inside, other=0.0), 0)
    ends = sums + (head * splits + parts) * WIDTH + WIDTH - 2
    peaks = tl.load(ends, mask=inside, other=float("-inf"))
    peak = tl.max(peaks, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.sum(tl.load(ends + 1, mask=inside, other=0.0) * tl.exp(peaks - peak), 0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (n >= begin) & (n < tokens)
    pooled = tl.zeros((BLOCK_N,), tl.float32)
    for offset in tl.static_range(POOL):
        near = n + offset - POOL // 2
        pooled += tl.load(scores + head * tokens + near, mask=(near >= begin) & (near < tokens), other=0.0)
    # Each logarithm of 0 is −inf by itself: a window may attend to nothing.
    window_log = tl.log(pooled / POOL) - tl.log(tl.maximum(window_sum, _TINY)) + tl.log(window_factor)
    expected = tl.load(scores + (total + head) * tokens + n, mask=there, other=float("-inf"))
    expected_log = expected - peak - tl.log(tl.maximum(mass, _TINY)) + tl.log(expected_factor)
    cosine = tl.load(scores + (2 * total + head) * tokens + n, mask=there, other=0.0)
    salience_log = -beta * cosine - tl.log(tl.maximum(salience_sum, _TINY)) + tl.log(salience_factor)
    highest = tl.maximum(tl.maximum(window_log, expected_log), salience_log)
    mixed = tl.exp(window_log - highest) + tl.exp(expected_log - highest) + tl.exp(salience_log - highest)
    tl.store(log + head * tokens + n, tl.where(there, highest + tl.log(mixed), float("-inf")), mask=n < tokens)
