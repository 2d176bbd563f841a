"""The sum of the terms of log weights, each divided by its own sum."""

# Triton's annotations speak of its compiler's own calls, not of what a kernel may be written as.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import triton
import triton.language as tl

from suffice.kv.kernels.blocks import LOWEST, TINY

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["tokens", "heads", "splits", "starts_batch", "starts_head"])
def sum_of_terms(
    scores: "Any",
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
    sampled_factor: "Any",
    SAMPLED: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Divide each term by its sum over the head's entries, and add them, in logarithms."""
    head = tl.program_id(0).to(tl.int64)
    total = tl.num_programs(0).to(tl.int64)
    parts = tl.arange(0, BLOCK_P)
    inside = parts < splits
    begin = tl.load(starts + head // heads * starts_batch + head % heads * starts_head)
    own = totals + (head * splits + parts) * 5
    window_sum = tl.sum(tl.load(own, mask=inside, other=0.0), 0)
    salience_sum = tl.sum(tl.load(own + 1, mask=inside, other=0.0), 0)
    # Expected attention comes in powers of two.
    peaks = tl.load(own + 3, mask=inside, other=LOWEST)
    peak = tl.max(peaks, 0)
    mass = tl.sum(tl.load(own + 4, mask=inside, other=0.0) * tl.exp2(peaks - peak), 0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (n >= begin) & (n < tokens)
    pooled = tl.zeros((BLOCK_N,), tl.float32)
    for offset in tl.static_range(POOL):
        near = n + offset - POOL // 2
        pooled += tl.load(scores + head * tokens + near, mask=(near >= begin) & (near < tokens), other=0.0)
    # Each logarithm of 0 is −inf by itself: a window may attend to nothing.
    window_log = tl.log(pooled / POOL) - tl.log(tl.maximum(window_sum, TINY)) + tl.log(window_factor)
    expected = tl.load(scores + (total + head) * tokens + n, mask=there, other=float("-inf"))
    expected_log = (expected - peak) * _LN_2 - tl.log(tl.maximum(mass, TINY)) + tl.log(expected_factor)
    cosine = tl.load(scores + (2 * total + head) * tokens + n, mask=there, other=0.0)
    salience_log = -beta * cosine - tl.log(tl.maximum(salience_sum, TINY)) + tl.log(salience_factor)
    sampled_log = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    if SAMPLED:
        sampled_sum = tl.sum(tl.load(own + 2, mask=inside, other=0.0), 0)
        sampled = tl.load(scores + (3 * total + head) * tokens + n, mask=there, other=0.0)
        sampled_log = tl.log(sampled) - tl.log(tl.maximum(sampled_sum, TINY)) + tl.log(sampled_factor)
    highest = tl.maximum(tl.maximum(window_log, expected_log), tl.maximum(salience_log, sampled_log))
    mixed = tl.exp(window_log - highest) + tl.exp(expected_log - highest)
    mixed += tl.exp(salience_log - highest) + tl.exp(sampled_log - highest)
    tl.store(log + head * tokens + n, tl.where(there, highest + tl.log(mixed), float("-inf")), mask=n < tokens)
