"""Attention of one new token over heads of unequal length.

The entries of all heads are divided into parts of similar length. One program computes the attention over each part, so
a long head is shared by many multiprocessors. A second kernel combines the parts of each head. The query heads of a
GQA group share one read of the keys and values.
"""

# Triton's stubs describe the compiler's internal calls, so pyright cannot check the code of kernels.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from suffice.gpu import block_size, launch
from suffice.kv.kernels.decode_plan import DecodePlan
from suffice.kv.kernels.dot import precise_dot
from suffice.kv.kernels.grid import contiguous_rows

_BLOCK = 64
"""Number of entries that a program processes at a time."""

_BLOCK_PARTS = 32
"""Number of parts of a head that are combined at a time."""


def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    plan: DecodePlan,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Return the softmax attention of one query token.

    Args:
        query: [batch, heads, dim].
        keys: [entries, dim], one head after the other. The tail of each head follows its packed entries.
        values: [entries, value_dim], in the same order.
        positions: positions of the tail, int32 [batch, tail], negative for entries that may not be read.
        plan: division of the entries into parts.
        scaling: factor of the query-key product.
        softcap: soft cap of the logits; None for no soft cap.
        sink_logits: logit of the attention sink of each query head, [heads]; None for no sinks.

    Returns:
        [batch, heads, value_dim], 0 for queries that may not read any entry.

    """
    query, keys, values, positions = (
        contiguous_rows(query),
        keys.contiguous(),
        values.contiguous(),
        positions.contiguous(),
    )
    batch, heads, dim = query.shape
    tail, value_dim = positions.shape[1], values.shape[-1]
    kv_heads = (len(plan.spans) - 1) // batch
    group = heads // kv_heads
    num_parts = len(plan.items)
    out = query.new_empty(batch, heads, value_dim)
    partial = torch.empty(num_parts, group, value_dim, dtype=torch.float32, device=query.device)
    maxima, sums = torch.empty(2, num_parts, group, dtype=torch.float32, device=query.device)
    launch(
        attention_parts_kernel,
        (num_parts,),
        query,
        keys,
        values,
        positions,
        keys if plan.bias is None else plan.bias,  # not read without a bias
        plan.items,
        partial,
        maxima,
        sums,
        scaling,
        0.0 if softcap is None else softcap,
        kv_heads,
        tail,
        *query.stride()[:2],
        SOFTCAP=softcap is not None,
        BIASED=plan.bias is not None,
        GROUP=group,
        DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_G=block_size(group),
        BLOCK_D=block_size(dim),
        BLOCK_V=block_size(value_dim),
        BLOCK_N=_BLOCK // 2 if keys.dtype == torch.float32 else _BLOCK,  # limited by the number of registers
        num_warps=4,
        num_stages=3,
    )
    combine_parts(partial, maxima, sums, plan, sink_logits, out)
    return out


def combine_parts(
    partial: Tensor,
    maxima: Tensor,
    sums: Tensor,
    plan: DecodePlan,
    sink_logits: Tensor | None,
    out: Tensor,
    *,
    separate_last: bool = False,
) -> None:
    """Combine the parts of each query head.

    Args:
        partial: sums of values, weighted by exponentials, float32 [parts, num_key_value_groups, value_dim].
        maxima: maximum logits, float32 [parts, num_key_value_groups].
        sums: sums of exponentials, shaped like `maxima`.
        plan: division of the entries into parts.
        sink_logits: logit of the attention sink of each query head, [heads]; None for no sinks.
        out: receives the output, [batch, heads, value_dim]. With `separate_last`, [2, batch, heads, value_dim]: the
            shares of all parts but the last of each head, and of the last one.
        separate_last: whether the last part of each head is kept apart.

    """
    *_, batch, heads, value_dim = out.shape
    launch(
        combine_parts_kernel,
        (batch * heads, 2 if separate_last else 1),
        partial,
        maxima,
        sums,
        plan.spans,
        maxima if sink_logits is None else sink_logits.float().contiguous(),  # not read without sinks
        out,
        heads,
        SINKS=sink_logits is not None,
        SEPARATE_LAST=separate_last,
        GROUP=partial.shape[1],
        VALUE_DIM=value_dim,
        BLOCK_V=block_size(value_dim),
        BLOCK_P=_BLOCK_PARTS,
        num_warps=4,
    )


@triton.jit
def _tanh(x: "Any"):
    """Return tanh x in float32. The series is used where the difference of exponentials would lose digits."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0))))
    decay = tl.exp(-2.0 * tl.abs(x))
    ratio = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.04, series, tl.where(x < 0.0, -ratio, ratio))


@triton.jit
def cap_logits(logits: "Any", softcap: "Any"):
    """Return c tanh(logits / c) for the soft cap c."""
    return _tanh(logits / softcap) * softcap


@triton.jit
def update_softmax(running_max: "Any", running_sum: "Any", logits: "Any"):
    """Add the logits of a block of entries, [queries, entries], to a softmax.

    Returns:
        The new maximum logit and the new sum of exponentials, the factor of all earlier exponentials, and the
        exponentials of the block.

    """
    new_max = tl.maximum(running_max, tl.max(logits, 1))
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    decay = tl.exp(running_max - finite_max)
    weights = tl.exp(logits - finite_max[:, None])
    return new_max, running_sum * decay + tl.sum(weights, 1), decay, weights


@triton.jit
def attend_to_entries(
    q: "Any",
    keys: "Any",
    values: "Any",
    positions: "Any",
    bias: "Any",
    num_entries: "Any",
    scaling: "Any",
    softcap: "Any",
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    BIASED: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return the maximum logit, the sum of exponentials and the weighted sum of the values of consecutive entries."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    running_max = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_G,), tl.float32)
    acc = tl.zeros((BLOCK_G, BLOCK_V), tl.float32)
    for block_start in range(0, num_entries, BLOCK_N):
        offs_n = block_start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < num_entries
        if MASKED:
            mask_n = mask_n & (tl.load(positions + offs_n, mask=mask_n, other=-1) >= 0)
        k = tl.load(
            keys + offs_n[None, :] * DIM + offs_d[:, None],
            mask=mask_n[None, :] & (offs_d < DIM)[:, None],
            other=0.0,
        )
        v = tl.load(
            values + offs_n[:, None] * VALUE_DIM + offs_v[None, :],
            mask=mask_n[:, None] & (offs_v < VALUE_DIM)[None, :],
            other=0.0,
        )
        logits = precise_dot(q, k, tl.zeros((BLOCK_G, BLOCK_N), tl.float32)) * scaling
        if SOFTCAP:
            logits = cap_logits(logits, softcap)
        if BIASED:
            logits += tl.load(bias + offs_n, mask=mask_n, other=0.0)[None, :]
        logits = tl.where(mask_n[None, :], logits, float("-inf"))
        running_max, running_sum, decay, weights = update_softmax(running_max, running_sum, logits)
        acc = precise_dot(weights.to(v.dtype), v, acc * decay[:, None])
    return running_max, running_sum, acc


@triton.jit(do_not_specialize=["kv_heads", "tail"])
def attention_parts_kernel(
    query: "Any",
    keys: "Any",
    values: "Any",
    positions: "Any",
    bias: "Any",
    items: "Any",
    partial: "Any",
    maxima: "Any",
    sums: "Any",
    scaling: "Any",
    softcap: "Any",
    kv_heads: "Any",
    tail: "Any",
    query_stride_batch: "Any",
    query_stride_head: "Any",
    SOFTCAP: tl.constexpr,
    BIASED: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute the attention of one GQA group over one part."""
    part = tl.program_id(0).to(tl.int64)
    row_and_head = tl.load(items + part * 5).to(tl.int64)
    first = tl.load(items + part * 5 + 1).to(tl.int64)
    num_entries = tl.load(items + part * 5 + 2)
    tail_start = tl.load(items + part * 5 + 3)
    packed_start = tl.load(items + part * 5 + 4).to(tl.int64)
    row = row_and_head // kv_heads
    head = row_and_head % kv_heads
    offs_g = tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    q = tl.load(
        query + row * query_stride_batch + (head * GROUP + offs_g)[:, None] * query_stride_head + offs_d[None, :],
        mask=(offs_g < GROUP)[:, None] & (offs_d < DIM)[None, :],
        other=0.0,
    )
    if tail_start < 0:
        maximum, total, acc = attend_to_entries(
            q,
            keys + first * DIM,
            values + first * VALUE_DIM,
            positions,
            bias + packed_start,
            num_entries,
            scaling,
            softcap,
            SOFTCAP,
            False,
            BIASED,
            DIM,
            VALUE_DIM,
            BLOCK_G,
            BLOCK_D,
            BLOCK_V,
            BLOCK_N,
        )
    else:
        maximum, total, acc = attend_to_entries(
            q,
            keys + first * DIM,
            values + first * VALUE_DIM,
            positions + row * tail + tail_start,
            bias,
            tl.where(num_entries < 0, tail - tail_start, num_entries),
            scaling,
            softcap,
            SOFTCAP,
            True,
            False,
            DIM,
            VALUE_DIM,
            BLOCK_G,
            BLOCK_D,
            BLOCK_V,
            BLOCK_N,
        )
    tl.store(maxima + part * GROUP + offs_g, maximum, mask=offs_g < GROUP)
    tl.store(sums + part * GROUP + offs_g, total, mask=offs_g < GROUP)
    tl.store(
        partial + (part * GROUP + offs_g)[:, None] * VALUE_DIM + offs_v[None, :],
        acc,
        mask=(offs_g < GROUP)[:, None] & (offs_v < VALUE_DIM)[None, :],
    )


@triton.jit(do_not_specialize=["num_heads"])
def combine_parts_kernel(
    partial: "Any",
    maxima: "Any",
    sums: "Any",
    spans: "Any",
    sink_logits: "Any",
    out: "Any",
    num_heads: "Any",
    SINKS: tl.constexpr,
    SEPARATE_LAST: tl.constexpr,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Combine the parts of one query head. A sink counts as a part with one entry whose value is 0.

    With SEPARATE_LAST, a second program of each head writes the share of the last part in the output, and the first
    one that of all others.
    """
    head = tl.program_id(0).to(tl.int64)
    first = tl.load(spans + head // GROUP)
    end = tl.load(spans + head // GROUP + 1)
    offs_v = tl.arange(0, BLOCK_V)
    if SINKS:
        running_max = tl.load(sink_logits + head % num_heads + tl.zeros((1,), tl.int32))
        running_sum = tl.full((1,), 1.0, tl.float32)
    else:
        running_max = tl.full((1,), float("-inf"), tl.float32)
        running_sum = tl.zeros((1,), tl.float32)
    acc = tl.zeros((BLOCK_V,), tl.float32)
    for block_start in range(first, end, BLOCK_P):
        parts = block_start + tl.arange(0, BLOCK_P)
        index = parts.to(tl.int64) * GROUP + head % GROUP
        part_max = tl.load(maxima + index, mask=parts < end, other=float("-inf"))
        new_max = tl.maximum(running_max, tl.max(part_max, 0))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp(running_max - finite_max)
        weights = tl.exp(part_max - finite_max)
        part_sum = tl.load(sums + index, mask=parts < end, other=0.0)
        running_sum = running_sum * decay + tl.sum(weights * part_sum, 0)
        is_own = parts < end
        if SEPARATE_LAST:
            is_own = tl.where(tl.program_id(1) == 0, parts < end - 1, parts == end - 1)
        part_acc = tl.load(
            partial + index[:, None] * VALUE_DIM + offs_v[None, :],
            mask=is_own[:, None] & (offs_v < VALUE_DIM)[None, :],
            other=0.0,
        )
        acc = acc * decay + tl.sum(part_acc * weights[:, None], 0)
        running_max = new_max
    result = acc / tl.where(running_sum > 0.0, running_sum, 1.0)
    if SEPARATE_LAST:
        out += tl.program_id(1) * tl.num_programs(0).to(tl.int64) * VALUE_DIM
    tl.store(out + head * VALUE_DIM + offs_v, result.to(out.dtype.element_ty), mask=offs_v < VALUE_DIM)
