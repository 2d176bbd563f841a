"""Attention of one new token over quantized entries of heads of unequal length, together with exact entries.

The kernel reads the packed integers and the scales. The quantized entries of each head are divided into parts of
similar length, as in `decoding`, and the exact entries of the head are its last part. Queries arrive rotated like the
quantized keys. The output of quantized values is rotated back after all parts are combined.
"""

# Triton's stubs describe the compiler's internal calls, so pyright cannot check the code of kernels.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false

import functools
import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from suffice.gpu import block_size, launch
from suffice.kv.attention.quantized_attention import ExactEntries, QuantizedFormat, QuantizedHeads
from suffice.kv.kernels.decode_plan import DecodePlan
from suffice.kv.kernels.decoding import (
    attend_to_entries,
    cap_logits,
    combine_parts,
    update_softmax,
)
from suffice.kv.kernels.dot import precise_dot
from suffice.kv.kernels.grid import contiguous_rows

_BLOCK_NUMBERS = 8192
"""Numbers of the keys that a program processes at a time, which is limited by the number of registers."""

_FLOAT_2_23 = tl.constexpr(0x4B000000)
"""The float32 number 2^23 as an integer."""


def decode_quantized(
    query: Tensor,
    quantized: QuantizedHeads,
    exact: ExactEntries,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Return the softmax attention of one query token.

    Args:
        query: [batch, heads, head_dim].
        quantized: quantized entries.
        exact: the other entries, in the dtype of the query.
        scaling: factor of the query-key product.
        softcap: soft cap of the logits; None for no soft cap.
        sink_logits: logit of the attention sink of each query head, [heads]; None for no sinks.

    Returns:
        [batch, heads, value_dim], 0 for queries that may not read any entry.

    """
    query = contiguous_rows(query)
    keys, values = _contiguous_heads(exact.keys), _contiguous_heads(exact.values)
    positions = contiguous_rows(exact.positions)
    # Without a bias, these are not read.
    exact_bias = positions if exact.logit_bias is None else contiguous_rows(exact.logit_bias)
    quantized_bias = exact_bias if quantized.logit_bias is None else quantized.logit_bias
    batch, heads, head_dim = query.shape
    kv_heads, width, value_dim = values.shape[1:]
    group = heads // kv_heads
    plan = _make_plan(tuple(itertools.chain(*quantized.lengths)), query.device)
    num_parts = len(plan.items)
    is_float32 = query.dtype == torch.float32
    key_format, value_format = quantized.key_format, quantized.value_format
    rotated, of_mean = _rotate_queries(query.float().unflatten(1, (kv_heads, group)), quantized)
    partial = torch.empty(num_parts, group, value_format.padded_dim, dtype=torch.float32, device=query.device)
    maxima, sums = torch.empty(2, num_parts, group, dtype=torch.float32, device=query.device)
    launch(
        quantized_parts_kernel,
        (num_parts,),
        query,
        keys,
        values,
        positions,
        exact_bias,
        quantized_bias,
        rotated,
        of_mean,
        quantized.keys.codes,
        quantized.keys.scales,
        quantized.values.codes,
        quantized.values.scales,
        plan.items,
        partial,
        maxima,
        sums,
        scaling,
        0.0 if softcap is None else softcap,
        kv_heads,
        width,
        *query.stride()[:2],
        *keys.stride()[:2],
        *values.stride()[:2],
        *positions.stride()[:2],
        *exact_bias.stride()[:2],
        SOFTCAP=softcap is not None,
        BIASED=quantized.logit_bias is not None,
        GROUP=group,
        DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_G=block_size(group),
        BLOCK_D=block_size(head_dim),
        BLOCK_V=block_size(value_dim),
        BLOCK_N=_BLOCK_NUMBERS // (2 if is_float32 else 1) // max(64, block_size(max(head_dim, value_dim))),
        BLOCK_EXACT=16 if is_float32 else 32,
        **_format_constants("KEY", key_format),
        **_format_constants("VALUE", value_format),
        num_warps=4,
        num_stages=3,
    )
    shares = torch.empty(2, batch, heads, value_format.padded_dim, dtype=torch.float32, device=query.device)
    combine_parts(partial, maxima, sums, plan, sink_logits, shares, separate_last=True)
    output = shares[0] @ value_format.rotation(shares).mT + shares[1, ..., :value_dim]
    return output.to(query.dtype)


@functools.lru_cache(maxsize=1024)
def _make_plan(lengths: tuple[int, ...], device: torch.device) -> DecodePlan:
    """Divide the quantized entries of each head into parts; a last part stands for its exact entries."""
    starts = itertools.accumulate(lengths, initial=0)
    return DecodePlan.from_heads(list(zip(starts, lengths, strict=False)), 0, device)


def _rotate_queries(queries: Tensor, quantized: QuantizedHeads) -> tuple[Tensor, Tensor]:
    """Return queries as the quantized keys need them, and their products with the mean key.

    Args:
        queries: float32 [batch, num_key_value_heads, num_key_value_groups, head_dim].
        quantized: quantized entries.

    Returns:
        [batch, num_key_value_heads, num_key_value_groups, padded_dim] and [batch, num_key_value_heads,
        num_key_value_groups].

    """
    rotated = (queries / quantized.scales.float()[:, :, None]) @ quantized.key_format.rotation(queries)
    return rotated.contiguous(), (queries @ quantized.means.float()[..., None]).contiguous()


def _contiguous_heads(x: Tensor) -> Tensor:
    """Return x, [batch, heads, entries, dim], with contiguous entries of each head."""
    return x if x.stride()[2:] == (x.shape[-1], 1) else x.contiguous()


def _format_constants(name: str, format_: QuantizedFormat) -> dict[str, int]:
    """Return the constants of a kernel that describe a format."""
    size = block_size(format_.group_size, 8)
    return {
        f"{name}_BITS": format_.bits,
        f"{name}_PADDED": format_.padded_dim,
        f"{name}_GROUP_SIZE": format_.group_size,
        f"{name}_BLOCK_GROUPS": block_size(format_.padded_dim // format_.group_size, max(1, 16 // size)),
        f"{name}_BLOCK_SIZE": size,
    }


@triton.jit
def rotated_dims(PADDED: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Return the dimension of each column of a block of rotated vectors, and whether it exists."""
    column = tl.arange(0, BLOCK_GROUPS * BLOCK_SIZE)
    dims = column // BLOCK_SIZE * GROUP_SIZE + column % BLOCK_SIZE
    return dims, (column % BLOCK_SIZE < GROUP_SIZE) & (dims < PADDED)


@triton.jit
def load_quantized(
    codes: "Any",
    scales: "Any",
    offs_n: "Any",
    mask_n: "Any",
    BITS: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return rotated vectors, float32 [entries, BLOCK_GROUPS * BLOCK_SIZE]; see `rotated_dims` for the columns.

    The layout of the integers is that of `suffice.kv.storage.bit_packing.pack_bits`. The integer c of b bits stands for
    s (c − (2^b − 1)/2) with s = 2^((scale − 160) / 4). Its bits are not moved within their byte: where they begin at
    bit i, s is multiplied by 2^−i. The bits of some integers are in two bytes.
    """
    BYTES: tl.constexpr = PADDED * BITS // 8
    SECTION: tl.constexpr = PADDED // 8 if BITS == 3 else (PADDED // 2 if BITS == 5 else BYTES)
    offs_g = tl.arange(0, BLOCK_GROUPS)
    offs_j = tl.arange(0, BLOCK_SIZE)
    dims = offs_g[:, None] * GROUP_SIZE + offs_j[None, :]
    mask_g = offs_g * GROUP_SIZE < PADDED
    mask = mask_n[:, None, None] & (mask_g[:, None] & (offs_j < GROUP_SIZE)[None, :])[None, :, :]
    rows = codes + (offs_n * BYTES)[:, None, None]
    section = dims // SECTION
    group_scales = tl.load(
        scales + (offs_n * (PADDED // GROUP_SIZE))[:, None] + offs_g[None, :],
        mask=mask_n[:, None] & mask_g[None, :],
        other=0,
    )
    factors = tl.exp2(group_scales.to(tl.float32) * 0.25 - 40.0)[:, :, None]
    offsets = factors * (-0.5 * ((1 << BITS) - 1))
    if BITS == 3:
        # Six sections have two of three blocks of bytes each. The others are in the two highest bits of the blocks:
        # the seventh in two bits of the first and one of the second block, the eighth in the other three.
        index = tl.where(section < 6, section % 3, section - 6) * SECTION + dims % SECTION
        lowest = tl.where(section < 3, 0, tl.where(section < 6, 3, section))
        bits = tl.where(section < 6, 7 << lowest, tl.where(section == 6, 192, 128))
        other_bits = tl.where(section == 6, 64, 192)
        other_factors = factors * tl.where(section == 6, 4 / 64, 2 / 64)[None, :, :]
        other_mask = mask & (section >= 6)[None, :, :]
        other = _load_bits(rows + (index + SECTION)[None, :, :], other_mask, other_bits[None, :, :])
        offsets = other * other_factors + offsets
    else:
        index = dims % SECTION
        lowest = section * (4 if BITS == 5 else BITS)
        bits = ((1 << (4 if BITS == 5 else BITS)) - 1) << lowest
        if BITS == 5:
            # Half a byte holds the four low bits. The highest bits come last, in eight sections that share bytes.
            WIDTH: tl.constexpr = PADDED // 8
            other_bits = 1 << (dims // WIDTH)
            other = _load_bits(rows + (4 * WIDTH + dims % WIDTH)[None, :, :], mask, other_bits[None, :, :])
            offsets = other * (factors * (16.0 / other_bits.to(tl.float32))[None, :, :]) + offsets
    numbers = _load_bits(rows + index[None, :, :], mask, bits[None, :, :])
    unit_factors = factors * (1.0 / (1 << lowest).to(tl.float32))[None, :, :]
    return tl.reshape(numbers * unit_factors + offsets, (BLOCK_N, BLOCK_GROUPS * BLOCK_SIZE))


@triton.jit
def _load_bits(pointers: "Any", mask: "Any", bits: "Any"):
    """Return some bits of bytes as float32, 0 where `mask` is false.

    They replace the lowest bits of 2^23, because a conversion from integers to floats is slow.
    """
    packed = tl.load(pointers, mask=mask, other=0).to(tl.int32)
    return ((packed & bits) | _FLOAT_2_23).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _attend_to_quantized(
    q: "Any",
    of_mean: "Any",
    key_codes: "Any",
    key_scales: "Any",
    value_codes: "Any",
    value_scales: "Any",
    bias: "Any",
    num_entries: "Any",
    scaling: "Any",
    softcap: "Any",
    SOFTCAP: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_PADDED: tl.constexpr,
    KEY_GROUP_SIZE: tl.constexpr,
    KEY_BLOCK_GROUPS: tl.constexpr,
    KEY_BLOCK_SIZE: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    VALUE_GROUP_SIZE: tl.constexpr,
    VALUE_BLOCK_GROUPS: tl.constexpr,
    VALUE_BLOCK_SIZE: tl.constexpr,
):
    """Return the maximum logit, the sum of exponentials and the weighted sum of the values of consecutive entries."""
    running_max = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, VALUE_BLOCK_GROUPS * VALUE_BLOCK_SIZE), tl.float32)
    for block_start in range(0, num_entries, BLOCK_N):
        offs_n = block_start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < num_entries
        k = load_quantized(
            key_codes,
            key_scales,
            offs_n,
            mask_n,
            KEY_BITS,
            KEY_PADDED,
            KEY_GROUP_SIZE,
            KEY_BLOCK_GROUPS,
            KEY_BLOCK_SIZE,
            BLOCK_N,
        ).to(q.dtype)
        v = load_quantized(
            value_codes,
            value_scales,
            offs_n,
            mask_n,
            VALUE_BITS,
            VALUE_PADDED,
            VALUE_GROUP_SIZE,
            VALUE_BLOCK_GROUPS,
            VALUE_BLOCK_SIZE,
            BLOCK_N,
        ).to(q.dtype)
        products = precise_dot(q, tl.trans(k), tl.zeros((BLOCK_G, BLOCK_N), tl.float32))
        logits = (products + of_mean[:, None]) * scaling
        if SOFTCAP:
            logits = cap_logits(logits, softcap)
        if BIASED:
            logits += tl.load(bias + offs_n, mask=mask_n, other=0.0)[None, :]
        logits = tl.where(mask_n[None, :], logits, float("-inf"))
        running_max, running_sum, decay, weights = update_softmax(running_max, running_sum, logits)
        acc = precise_dot(weights.to(v.dtype), v, acc * decay[:, None])
    return running_max, running_sum, acc


@triton.jit(
    do_not_specialize=[
        "kv_heads",
        "width",
        "position_stride_batch",
        "position_stride_head",
        "bias_stride_batch",
        "bias_stride_head",
    ]
)
def quantized_parts_kernel(
    query: "Any",
    keys: "Any",
    values: "Any",
    positions: "Any",
    exact_bias: "Any",
    quantized_bias: "Any",
    rotated: "Any",
    of_mean: "Any",
    key_codes: "Any",
    key_scales: "Any",
    value_codes: "Any",
    value_scales: "Any",
    items: "Any",
    partial: "Any",
    maxima: "Any",
    sums: "Any",
    scaling: "Any",
    softcap: "Any",
    kv_heads: "Any",
    width: "Any",
    query_stride_batch: "Any",
    query_stride_head: "Any",
    key_stride_batch: "Any",
    key_stride_head: "Any",
    value_stride_batch: "Any",
    value_stride_head: "Any",
    position_stride_batch: "Any",
    position_stride_head: "Any",
    bias_stride_batch: "Any",
    bias_stride_head: "Any",
    SOFTCAP: tl.constexpr,
    BIASED: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_EXACT: tl.constexpr,
    KEY_BITS: tl.constexpr,
    KEY_PADDED: tl.constexpr,
    KEY_GROUP_SIZE: tl.constexpr,
    KEY_BLOCK_GROUPS: tl.constexpr,
    KEY_BLOCK_SIZE: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    VALUE_GROUP_SIZE: tl.constexpr,
    VALUE_BLOCK_GROUPS: tl.constexpr,
    VALUE_BLOCK_SIZE: tl.constexpr,
):
    """Compute the attention of one GQA group over one part: quantized entries, or all exact entries of a head."""
    part = tl.program_id(0).to(tl.int64)
    row_and_head = tl.load(items + part * 5).to(tl.int64)
    first = tl.load(items + part * 5 + 1).to(tl.int64)
    num_entries = tl.load(items + part * 5 + 2)
    row = row_and_head // kv_heads
    head = row_and_head % kv_heads
    offs_g = tl.arange(0, BLOCK_G)
    mask_g = offs_g < GROUP
    partial += (part * GROUP + offs_g)[:, None] * VALUE_PADDED
    if num_entries >= 0:
        dims, exists = rotated_dims(KEY_PADDED, KEY_GROUP_SIZE, KEY_BLOCK_GROUPS, KEY_BLOCK_SIZE)
        q = tl.load(
            rotated + (row_and_head * GROUP + offs_g)[:, None] * KEY_PADDED + dims[None, :],
            mask=mask_g[:, None] & exists[None, :],
            other=0.0,
        )
        # Integers of 8 bits need the exponents of bfloat16 more than the digits of float16.
        q = q if query.dtype.element_ty == tl.float32 else q.to(tl.bfloat16)
        maximum, total, acc = _attend_to_quantized(
            q,
            tl.load(of_mean + row_and_head * GROUP + offs_g, mask=mask_g, other=0.0),
            key_codes + first * (KEY_PADDED * KEY_BITS // 8),
            key_scales + first * (KEY_PADDED // KEY_GROUP_SIZE),
            value_codes + first * (VALUE_PADDED * VALUE_BITS // 8),
            value_scales + first * (VALUE_PADDED // VALUE_GROUP_SIZE),
            quantized_bias + first,
            num_entries,
            scaling,
            softcap,
            SOFTCAP,
            BIASED,
            BLOCK_G,
            BLOCK_N,
            KEY_BITS,
            KEY_PADDED,
            KEY_GROUP_SIZE,
            KEY_BLOCK_GROUPS,
            KEY_BLOCK_SIZE,
            VALUE_BITS,
            VALUE_PADDED,
            VALUE_GROUP_SIZE,
            VALUE_BLOCK_GROUPS,
            VALUE_BLOCK_SIZE,
        )
        dims, exists = rotated_dims(VALUE_PADDED, VALUE_GROUP_SIZE, VALUE_BLOCK_GROUPS, VALUE_BLOCK_SIZE)
        tl.store(maxima + part * GROUP + offs_g, maximum, mask=mask_g)
        tl.store(sums + part * GROUP + offs_g, total, mask=mask_g)
        tl.store(partial + dims[None, :], acc, mask=mask_g[:, None] & exists[None, :])
    else:
        offs_d = tl.arange(0, BLOCK_D)
        q = tl.load(
            query + row * query_stride_batch + (head * GROUP + offs_g)[:, None] * query_stride_head + offs_d[None, :],
            mask=mask_g[:, None] & (offs_d < DIM)[None, :],
            other=0.0,
        )
        maximum, total, acc = attend_to_entries(
            q,
            keys + row * key_stride_batch + head * key_stride_head,
            values + row * value_stride_batch + head * value_stride_head,
            positions + row * position_stride_batch + head * position_stride_head,
            exact_bias + row * bias_stride_batch + head * bias_stride_head,
            width,
            scaling,
            softcap,
            SOFTCAP,
            True,
            BIASED,
            DIM,
            VALUE_DIM,
            BLOCK_G,
            BLOCK_D,
            BLOCK_V,
            BLOCK_EXACT,
        )
        offs_v = tl.arange(0, BLOCK_V)
        tl.store(maxima + part * GROUP + offs_g, maximum, mask=mask_g)
        tl.store(sums + part * GROUP + offs_g, total, mask=mask_g)
        tl.store(partial + offs_v[None, :], acc, mask=mask_g[:, None] & (offs_v < VALUE_DIM)[None, :])
