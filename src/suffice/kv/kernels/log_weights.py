"""Combination of the four terms of the log weights, after both passes over the keys."""

# Triton's stubs describe the compiler's internal calls, so pyright cannot check the code of kernels.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import triton
import triton.language as tl

from suffice.kv.kernels.blocks import LOWEST, TINY

_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["num_tokens", "kv_heads", "num_splits", "starts_stride_batch", "starts_stride_head"])
def log_weights_kernel(
    scores: "Any",
    totals: "Any",
    starts: "Any",
    log_weights: "Any",
    num_tokens: "Any",
    kv_heads: "Any",
    num_splits: "Any",
    starts_stride_batch: "Any",
    starts_stride_head: "Any",
    beta: "Any",
    window_factor: "Any",
    expected_factor: "Any",
    salience_factor: "Any",
    sampled_factor: "Any",
    SAMPLED: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Divide each term by its sum over the head, multiply it by its factor, and store the log of the sum of the terms.

    `scores` and `totals` are the results of `key_scores_kernel`.
    """
    head = tl.program_id(0).to(tl.int64)
    num_heads = tl.num_programs(0).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_SPLITS)
    mask_s = offs_s < num_splits
    start = tl.load(starts + head // kv_heads * starts_stride_batch + head % kv_heads * starts_stride_head)
    totals += (head * num_splits + offs_s) * 5
    window_sum = tl.sum(tl.load(totals, mask=mask_s, other=0.0), 0)
    salience_sum = tl.sum(tl.load(totals + 1, mask=mask_s, other=0.0), 0)
    # Expected attention is stored as log₂.
    expected_maxima = tl.load(totals + 3, mask=mask_s, other=LOWEST)
    expected_max = tl.max(expected_maxima, 0)
    expected_sum = tl.sum(tl.load(totals + 4, mask=mask_s, other=0.0) * tl.exp2(expected_maxima - expected_max), 0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = (offs_n >= start) & (offs_n < num_tokens)
    pooled = tl.zeros((BLOCK_N,), tl.float32)
    for offset in tl.static_range(KERNEL_SIZE):
        neighbor = offs_n + offset - KERNEL_SIZE // 2
        mask = (neighbor >= start) & (neighbor < num_tokens)
        pooled += tl.load(scores + head * num_tokens + neighbor, mask=mask, other=0.0)
    # A term may be 0, for example if no query of the window may read the key. Its log is then −inf.
    window_log = tl.log(pooled / KERNEL_SIZE) - tl.log(tl.maximum(window_sum, TINY)) + tl.log(window_factor)
    expected = tl.load(scores + (num_heads + head) * num_tokens + offs_n, mask=mask_n, other=float("-inf"))
    expected_log = (expected - expected_max) * _LN_2 - tl.log(tl.maximum(expected_sum, TINY)) + tl.log(expected_factor)
    cosine = tl.load(scores + (2 * num_heads + head) * num_tokens + offs_n, mask=mask_n, other=0.0)
    salience_log = -beta * cosine - tl.log(tl.maximum(salience_sum, TINY)) + tl.log(salience_factor)
    sampled_log = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    if SAMPLED:
        sampled_sum = tl.sum(tl.load(totals + 2, mask=mask_s, other=0.0), 0)
        sampled = tl.load(scores + (3 * num_heads + head) * num_tokens + offs_n, mask=mask_n, other=0.0)
        sampled_log = tl.log(sampled) - tl.log(tl.maximum(sampled_sum, TINY)) + tl.log(sampled_factor)
    maximum = tl.maximum(tl.maximum(window_log, expected_log), tl.maximum(salience_log, sampled_log))
    total = tl.exp(window_log - maximum) + tl.exp(expected_log - maximum)
    total += tl.exp(salience_log - maximum) + tl.exp(sampled_log - maximum)
    result = tl.where(mask_n, maximum + tl.log(total), float("-inf"))
    tl.store(log_weights + head * num_tokens + offs_n, result, mask=offs_n < num_tokens)
