"""Second pass over the keys: the score of each key in each term of the log weights."""

# Triton's stubs describe the compiler's internal calls, so pyright cannot check the code of kernels.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportCallIssue=false

from typing import Any

import triton
import triton.language as tl

from suffice.kv.kernels.blocks import (
    LOG2_E,
    LOWEST,
    TINY,
    load_queries,
    load_vectors,
    query_key_products,
    select_column,
)
from suffice.kv.kernels.dot import precise_dot


@triton.jit
def _load_log2_sum(sums: "Any", offs_s: "Any", num_splits: "Any", BLOCK: tl.constexpr):
    """Load the maxima and sums of all splits, and return log₂ of the whole sum; +inf where the sum is 0."""
    maxima = tl.load(sums, mask=offs_s < num_splits, other=LOWEST)
    partial_sums = tl.load(sums + BLOCK, mask=offs_s < num_splits, other=0.0)
    maximum = tl.max(maxima, 0)
    total = tl.sum(partial_sums * tl.exp2(maxima - maximum[None, :]), 0)
    # Subtracting +inf gives a weight of 0 for queries that may read no key.
    return tl.where(total > 0.0, maximum + tl.log2(total), float("inf"))


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "split_size",
        "kv_heads",
        "starts_stride_batch",
        "starts_stride_head",
        "ends_stride_batch",
        "ends_stride_head",
        "ends_stride_query",
    ]
)
def key_scores_kernel(
    keys: "Any",
    window_queries: "Any",
    sampled_queries: "Any",
    features: "Any",
    starts: "Any",
    ends: "Any",
    sums: "Any",
    scores: "Any",
    totals: "Any",
    num_tokens: "Any",
    split_size: "Any",
    kv_heads: "Any",
    scaling: "Any",
    stride_batch: "Any",
    stride_head: "Any",
    stride_token: "Any",
    starts_stride_batch: "Any",
    starts_stride_head: "Any",
    ends_stride_batch: "Any",
    ends_stride_head: "Any",
    ends_stride_query: "Any",
    beta: "Any",
    KERNEL_SIZE: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
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
    """Compute the scores of one split of the keys of a head, and their sums over the split.

    `sums` and `features` are the results of `key_sums_kernel`. `scores` [terms, heads, tokens] receives window
    attention, log₂ of expected attention, the cosine with the mean unit key, and sampled attention. `totals` [heads,
    splits, 5] receives the sums of window attention after pooling, salience and sampled attention, and the maximum and
    sum of expected attention.
    """
    head = tl.program_id(0).to(tl.int64)
    split_start = tl.program_id(1) * split_size
    num_heads = tl.num_programs(0).to(tl.int64)
    num_splits = tl.num_programs(1)
    row = head // kv_heads
    keys += row * stride_batch + head % kv_heads * stride_head
    ends += row * ends_stride_batch + head % kv_heads * ends_stride_head
    offs_d = tl.arange(0, BLOCK_D)
    offs_c = tl.arange(0, COLUMNS)
    logit_scale = scaling * LOG2_E
    salience_scale = -beta * LOG2_E
    offs_s = tl.arange(0, BLOCK_SPLITS)[:, None]
    start = tl.load(starts + row * starts_stride_batch + head % kv_heads * starts_stride_head)
    split_sums = sums + (head * num_splits + offs_s) * (BLOCK_D + 2 * (BLOCK_W + BLOCK_S + COLUMNS))
    unit_sum = tl.sum(tl.load(split_sums + offs_d[None, :], mask=offs_s < num_splits, other=0.0), 0)
    direction = unit_sum / tl.maximum(tl.sqrt(tl.sum(unit_sum * unit_sum, 0)), TINY)
    split_sums += BLOCK_D
    window_log2_sum = _load_log2_sum(split_sums + tl.arange(0, BLOCK_W)[None, :], offs_s, num_splits, BLOCK_W)
    expected_log2_sum = _load_log2_sum(split_sums + 2 * BLOCK_W + offs_c[None, :], offs_s, num_splits, COLUMNS)
    expected_log2_sum = tl.where(offs_c < GAUSSIANS, expected_log2_sum, float("inf"))
    mask_c = offs_c <= GAUSSIANS
    column_stride = num_heads * num_tokens
    features += head * num_tokens
    q, window_ends = load_queries(window_queries, ends, ends_stride_query, head, DIM, GROUP, WINDOW, BLOCK_D, BLOCK_W)
    # Split the direction into two parts of the keys' dtype, two columns whose products are added.
    remainder = direction - direction.to(keys.dtype.element_ty).to(tl.float32)
    offs_p = tl.arange(0, 16)
    direction = tl.where(
        offs_p[None, :] == 0, direction[:, None], tl.where(offs_p[None, :] == 1, remainder[:, None], 0.0)
    )
    direction = direction.to(keys.dtype.element_ty)
    if SAMPLED > 0:
        sampled_sums = split_sums + 2 * (BLOCK_W + COLUMNS) + tl.arange(0, BLOCK_S)[None, :]
        sampled_log2_sum = _load_log2_sum(sampled_sums, offs_s, num_splits, BLOCK_S)
        ends += WINDOW * ends_stride_query
        sampled_q, sampled_ends = load_queries(
            sampled_queries, ends, ends_stride_query, head, DIM, GROUP, SAMPLED, BLOCK_D, BLOCK_S
        )
    salience_total = tl.zeros((BLOCK_N,), tl.float32)
    window_total = tl.zeros((BLOCK_N,), tl.float32)
    sampled_total = tl.zeros((BLOCK_N,), tl.float32)
    expected_max = tl.full((BLOCK_N,), LOWEST, tl.float32)
    expected_sum = tl.zeros((BLOCK_N,), tl.float32)
    for block_start in range(split_start, tl.minimum(split_start + split_size, num_tokens), BLOCK_N):
        offs_n = block_start + tl.arange(0, BLOCK_N)
        mask_n = (offs_n >= start) & (offs_n < num_tokens)
        k = load_vectors(keys, offs_n, mask_n, offs_d, stride_token, DIM)
        pointers = features + offs_c[None, :] * column_stride + offs_n[:, None]
        key_features = tl.load(pointers, mask=mask_c[None, :] & mask_n[:, None], other=0.0)

        norm = tl.sqrt(select_column(key_features, GAUSSIANS, COLUMNS))
        projection = tl.sum(precise_dot(k, direction, tl.zeros((BLOCK_N, 16), tl.float32)), 1)
        cosine = projection / tl.maximum(norm, TINY)
        salience_total += tl.where(mask_n, tl.exp2(cosine * salience_scale), 0.0)
        tl.store(scores + (2 * num_heads + head) * num_tokens + offs_n, cosine, mask=offs_n < num_tokens)

        logits = key_features * LOG2_E - expected_log2_sum[None, :]
        maximum = tl.maximum(tl.max(logits, 1), LOWEST)
        expected = maximum + tl.log2(tl.sum(tl.exp2(logits - maximum[:, None]), 1))
        expected = tl.where(mask_n, expected, float("-inf"))
        tl.store(scores + (num_heads + head) * num_tokens + offs_n, expected, mask=offs_n < num_tokens)
        new_max = tl.maximum(expected_max, expected)
        expected_sum = expected_sum * tl.exp2(expected_max - new_max) + tl.exp2(expected - new_max)
        expected_max = new_max

        products = query_key_products(k, q, mask_n, offs_n, window_ends, BLOCK_N, BLOCK_W)
        attention = tl.sum(tl.exp2(products * logit_scale - window_log2_sum[None, :]), 1)
        # Number of keys whose pooled attention contains the attention of this key.
        num_pooled = (
            tl.minimum(offs_n + KERNEL_SIZE // 2, num_tokens - 1) - tl.maximum(offs_n - KERNEL_SIZE // 2, start) + 1
        )
        window_total += attention * num_pooled.to(tl.float32)
        tl.store(scores + head * num_tokens + offs_n, attention, mask=offs_n < num_tokens)

        if SAMPLED > 0:
            products = query_key_products(k, sampled_q, mask_n, offs_n, sampled_ends, BLOCK_N, BLOCK_S)
            sampled = tl.sum(tl.exp2(products * logit_scale - sampled_log2_sum[None, :]), 1)
            sampled_total += sampled
            tl.store(scores + (3 * num_heads + head) * num_tokens + offs_n, sampled, mask=offs_n < num_tokens)
    totals += (head * num_splits + tl.program_id(1)) * 5
    scalar = tl.arange(0, 1)
    maximum = tl.max(expected_max, 0)
    tl.store(totals + scalar, tl.sum(window_total, 0) / KERNEL_SIZE)
    tl.store(totals + 1 + scalar, tl.sum(salience_total, 0))
    tl.store(totals + 2 + scalar, tl.sum(sampled_total, 0))
    tl.store(totals + 3 + scalar, maximum)
    tl.store(totals + 4 + scalar, tl.sum(expected_sum * tl.exp2(expected_max - maximum), 0))
