"""First pass over the keys: sums over all keys of a head, which the second pass needs.

All logits are matrix products with the keys. Each lane keeps its own running sums until the end of the pass.
Exponentials are powers of two, so running maxima are log₂ values.
"""

# Triton's stubs describe the compiler's internal calls, so pyright cannot check the code of kernels.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportCallIssue=false

from typing import Any

import triton
import triton.language as tl

from suffice.kv.kernels.blocks import LOG2_E, LOWEST, load_queries, load_vectors, query_key_products, select_column
from suffice.kv.kernels.dot import precise_dot, truncate_to_bfloat16

# Number of rows in a tile of a tensor core's result. Each lane holds two rows.
_TILE = tl.constexpr(16)


@triton.jit
def _split_precision(x: "Any", dtype: "Any", COLUMNS: tl.constexpr):
    """Split numbers into three parts of `dtype` whose sum has 24 bits: float32 [dim, 4 * columns].

    `x` contains the same columns four times. The result contains the first, second and third part in the first three
    copies, and 0 in the fourth. If `dtype` is float32, the second and third part are 0.
    """
    part = tl.arange(0, 4 * COLUMNS)[None, :] // COLUMNS
    first = x.to(dtype).to(tl.float32)
    second = (x - first).to(dtype).to(tl.float32)
    return tl.where(part == 0, first, tl.where(part == 1, second, tl.where(part == 2, x - first - second, 0.0)))


@triton.jit
def _load_gaussians(
    gaussians: "Any",
    last_column: tl.constexpr,
    DIM: tl.constexpr,
    GAUSSIANS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Load one column for each Gaussian, append a constant column, and repeat all 4 times: [dim, 4 * columns]."""
    offs_c = tl.arange(0, 4 * COLUMNS) % COLUMNS
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_c < GAUSSIANS)[None, :] & (offs_d < DIM)[:, None]
    vectors = tl.load(gaussians + offs_c[None, :] * DIM + offs_d[:, None], mask=mask, other=0.0)
    return tl.where((offs_c == GAUSSIANS)[None, :], last_column, vectors)


@triton.jit
def _compute_features(k: "Any", mean: "Any", half_variance: "Any", BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr):
    """Return k · mean + k² · half_variance of each key and column, float32 [tokens, columns].

    The columns are the logits of the Gaussians, followed by the squared norm of the key (mean 0, half variance 1).
    """
    k32 = k.to(tl.float32)
    square = k32 * k32
    total = precise_dot(k, mean.to(k.dtype), tl.zeros((BLOCK_N, 4 * COLUMNS), tl.float32))
    if k.dtype == tl.float32:
        total = precise_dot(square, half_variance, total)
    else:
        # Squares of 16-bit keys may exceed the range of float16. Split them into two bfloat16 parts; this is exact for
        # bfloat16 keys.
        high = truncate_to_bfloat16(square)
        total = precise_dot((square - high).to(tl.bfloat16), half_variance.to(tl.bfloat16), total)
        total = precise_dot(high.to(tl.bfloat16), half_variance.to(tl.bfloat16), total)
    return tl.sum(tl.reshape(total, (BLOCK_N, 4, COLUMNS)), 1)


@triton.jit
def _update_sum(
    running_max: "Any",
    running_sum: "Any",
    logits: "Any",
    scale: "Any",
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Add 2^(scale · logits), for logits [tokens, queries] and a positive scale, to the running sums of each lane.

    The running sums, [tiles, lanes, queries], are stored as running_sum · 2^running_max.
    """
    pairs = tl.reshape(logits, (BLOCK_N // _TILE, 2, _TILE // 2, BLOCK_Q))
    new_max = tl.maximum(running_max, tl.max(pairs, 1) * scale)
    powers = tl.exp2(pairs * scale - new_max[:, None, :, :])
    return new_max, running_sum * tl.exp2(running_max - new_max) + tl.sum(powers, 1)


@triton.jit
def _store_sums(sums: "Any", running_max: "Any", running_sum: "Any", BLOCK_Q: tl.constexpr):
    """Combine the running sums of all lanes, and store the maxima, then the sums, [queries] each."""
    offs_q = tl.arange(0, BLOCK_Q)
    maximum = tl.max(tl.max(running_max, 0), 0)
    total = tl.sum(tl.sum(running_sum * tl.exp2(running_max - maximum[None, None, :]), 0), 0)
    tl.store(sums + offs_q, maximum)
    tl.store(sums + BLOCK_Q + offs_q, total)


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
        "expected_starts_stride_batch",
        "expected_starts_stride_head",
    ]
)
def key_sums_kernel(
    keys: "Any",
    window_queries: "Any",
    sampled_queries: "Any",
    gaussians: "Any",
    starts: "Any",
    ends: "Any",
    sums: "Any",
    features: "Any",
    expected_starts: "Any",
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
    expected_starts_stride_batch: "Any",
    expected_starts_stride_head: "Any",
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
    """Compute sums over one split of the keys of a head, and store the features of each key.

    `sums` [heads, splits, :] receives the sum of the unit keys [dim], then a maximum and a sum of exponentials for each
    query of the window, each Gaussian, and each sampled query. `features` [gaussians + 1, heads, tokens] receives the
    results of `_compute_features`.
    """
    head = tl.program_id(0).to(tl.int64)
    split_start = tl.program_id(1) * split_size
    num_heads = tl.num_programs(0).to(tl.int64)
    row = head // kv_heads
    keys += row * stride_batch + head % kv_heads * stride_head
    ends += row * ends_stride_batch + head % kv_heads * ends_stride_head
    offs_d = tl.arange(0, BLOCK_D)
    logit_scale = scaling * LOG2_E
    offs_p = tl.arange(0, 16)
    offs_c = tl.arange(0, COLUMNS)
    mask_c = offs_c <= GAUSSIANS
    column_stride = num_heads * num_tokens
    features += head * num_tokens
    start = tl.load(starts + row * starts_stride_batch + head % kv_heads * starts_stride_head)
    expected_start = tl.load(
        expected_starts + row * expected_starts_stride_batch + head % kv_heads * expected_starts_stride_head
    )
    q, window_ends = load_queries(window_queries, ends, ends_stride_query, head, DIM, GROUP, WINDOW, BLOCK_D, BLOCK_W)
    gaussians += head * GAUSSIANS * DIM
    mean = _load_gaussians(gaussians, 0.0, DIM, GAUSSIANS, BLOCK_D, COLUMNS)
    mean = _split_precision(mean, keys.dtype.element_ty, COLUMNS)
    half_variance = _load_gaussians(gaussians + num_heads * GAUSSIANS * DIM, 1.0, DIM, GAUSSIANS, BLOCK_D, COLUMNS)
    half_variance = _split_precision(
        half_variance, tl.float32 if keys.dtype.element_ty == tl.float32 else tl.bfloat16, COLUMNS
    )
    unit_sum = tl.zeros((16, BLOCK_D), tl.float32)
    window_max = tl.full((BLOCK_N // _TILE, _TILE // 2, BLOCK_W), LOWEST, tl.float32)
    window_sum = tl.zeros((BLOCK_N // _TILE, _TILE // 2, BLOCK_W), tl.float32)
    expected_max = tl.full((BLOCK_N // _TILE, _TILE // 2, COLUMNS), LOWEST, tl.float32)
    expected_sum = tl.zeros((BLOCK_N // _TILE, _TILE // 2, COLUMNS), tl.float32)
    if SAMPLED > 0:
        ends += WINDOW * ends_stride_query
        sampled_q, sampled_ends = load_queries(
            sampled_queries, ends, ends_stride_query, head, DIM, GROUP, SAMPLED, BLOCK_D, BLOCK_S
        )
        sampled_max = tl.full((BLOCK_N // _TILE, _TILE // 2, BLOCK_S), LOWEST, tl.float32)
        sampled_sum = tl.zeros((BLOCK_N // _TILE, _TILE // 2, BLOCK_S), tl.float32)
    for block_start in range(split_start, tl.minimum(split_start + split_size, num_tokens), BLOCK_N):
        offs_n = block_start + tl.arange(0, BLOCK_N)
        mask_n = (offs_n >= start) & (offs_n < num_tokens)
        k = load_vectors(keys, offs_n, mask_n, offs_d, stride_token, DIM)
        key_features = _compute_features(k, mean, half_variance, BLOCK_N, COLUMNS)
        tl.store(
            features + offs_c[None, :] * column_stride + offs_n[:, None],
            key_features,
            mask=mask_c[None, :] & (offs_n < num_tokens)[:, None],
        )
        norm = tl.sqrt(select_column(key_features, GAUSSIANS, COLUMNS))
        # A key of norm 0 has no direction and adds nothing.
        inverse_norm = tl.where(norm > 0.0, 1.0 / norm, 0.0)
        if k.dtype == tl.float16:
            inverse_norm = tl.minimum(inverse_norm, 65504.0)
        # The sum of the unit keys is a matrix product of the keys and the inverse norms, which are split into two parts
        # of the keys' dtype.
        high = inverse_norm.to(k.dtype).to(tl.float32)
        parts = tl.where(
            offs_p[:, None] == 0, high[None, :], tl.where(offs_p[:, None] == 1, (inverse_norm - high)[None, :], 0.0)
        )
        unit_sum = precise_dot(parts.to(k.dtype), k, unit_sum)
        expected = tl.where((mask_n & (offs_n >= expected_start))[:, None], key_features, float("-inf"))
        expected_max, expected_sum = _update_sum(expected_max, expected_sum, expected, LOG2_E, BLOCK_N, COLUMNS)
        products = query_key_products(k, q, mask_n, offs_n, window_ends, BLOCK_N, BLOCK_W)
        window_max, window_sum = _update_sum(window_max, window_sum, products, logit_scale, BLOCK_N, BLOCK_W)
        if SAMPLED > 0:
            products = query_key_products(k, sampled_q, mask_n, offs_n, sampled_ends, BLOCK_N, BLOCK_S)
            sampled_max, sampled_sum = _update_sum(sampled_max, sampled_sum, products, logit_scale, BLOCK_N, BLOCK_S)
    sums += (head * tl.num_programs(1) + tl.program_id(1)) * (BLOCK_D + 2 * (BLOCK_W + BLOCK_S + COLUMNS))
    tl.store(sums + offs_d, tl.sum(unit_sum, 0))
    sums += BLOCK_D
    _store_sums(sums, window_max, window_sum, BLOCK_W)
    _store_sums(sums + 2 * BLOCK_W, expected_max, expected_sum, COLUMNS)
    if SAMPLED > 0:
        _store_sums(sums + 2 * (BLOCK_W + COLUMNS), sampled_max, sampled_sum, BLOCK_S)
