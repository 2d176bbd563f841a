"""Attention of one new token over heads of unequal length: the keys are cut into parts, their results put together.

Every part is one program, whatever head it is of, so that a long head keeps no processor waiting; the query heads of a
GQA group read a key once between them.
"""

# Triton's annotations speak of its compiler's own calls, not of what a kernel may be written as.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false
# pyright: reportGeneralTypeIssues=false

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from suffice.gpu import block_size, launch
from suffice.kv.kernels.grid import processors, rows_of
from suffice.kv.kernels.product import product

_BLOCK = 64
_PARTS = 32  # partial results of one head that are put together at a time
_LEAST, _MOST = 128, 4096  # entries of a part


@dataclass(frozen=True, slots=True)
class Plan:
    """How heads of unequal length are cut into parts of about equal length.

    Args:
        items: int32 [parts, 4]: row and head as one number; first entry; entries, −1 for all that there are then; and
            of new tokens, which follow the packed entries, the first one's number, −1 for packed entries. Parts of
            one head follow each other; the last goes on to the newest token.
        spans: int32 [batch * kv_heads + 1], first part of each head, and one past the last of all.

    """

    items: Tensor
    spans: Tensor

    @classmethod
    def of(cls, packed: list[tuple[int, int]], tail: int, device: torch.device) -> "Plan":
        """Cut heads, row by row, whose packed entries start there and are so many, with a tail of so many or more."""
        first, sizes = np.asarray(packed, dtype=np.int64).T
        fair = triton.next_power_of_2(int((sizes + tail).sum()) // (4 * processors(device)) + 1)
        part = min(max(fair, _LEAST), _MOST)
        counts = -(-sizes // part)
        whole = tail // part
        ends = (counts + whole + 1).cumsum()
        spans = np.concatenate(([0], ends))
        head = np.repeat(np.arange(len(sizes)), counts + whole + 1)
        number = np.arange(spans[-1]) - spans[head]
        late = number >= counts[head]
        new = np.where(late, (number - counts[head]) * part, -1)
        start = first[head] + np.where(late, sizes[head] + new, number * part)
        size = np.where(late, part, np.minimum(part, sizes[head] - number * part))
        size[ends - 1] = -1
        items = torch.from_numpy(np.stack((head, start, size, new), axis=1).astype(np.int32))
        parts = torch.from_numpy(spans.astype(np.int32))
        return cls(*(x.to(device, non_blocking=True) for x in (items, parts)))


def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    plan: Plan,
    scaling: float,
) -> Tensor:
    """Softmax attention of one query for each row and head.

    Args:
        query: [batch, heads, dim].
        keys: [entries, dim], one head after the other, those of the new tokens behind each.
        values: [entries, value_dim], in the same order.
        positions: int32 [batch, new] of the new tokens, negative for those that may not be read.
        plan: where each head's entries are.
        scaling: factor on the query-key product.

    Returns:
        [batch, heads, value_dim], 0 where a query may read nothing.

    """
    query, keys, values, positions = rows_of(query), keys.contiguous(), values.contiguous(), positions.contiguous()
    batch, heads, dim = query.shape
    new, value_dim = positions.shape[1], values.shape[-1]
    kv_heads = (len(plan.spans) - 1) // batch
    group = heads // kv_heads
    parts = len(plan.items)
    out = query.new_empty(batch, heads, value_dim)
    partial = torch.empty(parts, group, value_dim, dtype=torch.float32, device=query.device)
    peaks, masses = torch.empty(2, parts, group, dtype=torch.float32, device=query.device)
    wide = block_size(value_dim)
    launch(
        _part,
        (parts,),
        query,
        keys,
        values,
        positions,
        plan.items,
        partial,
        peaks,
        masses,
        scaling,
        kv_heads,
        new,
        *query.stride()[:2],
        GROUP=group,
        DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_G=block_size(group),
        BLOCK_D=block_size(dim),
        BLOCK_V=wide,
        BLOCK_N=_BLOCK // 2 if keys.dtype == torch.float32 else _BLOCK,  # so that registers suffice
        num_warps=4,
        num_stages=3,
    )
    launch(
        _together,
        (batch * heads,),
        partial,
        peaks,
        masses,
        plan.spans,
        out,
        GROUP=group,
        VALUE_DIM=value_dim,
        BLOCK_V=wide,
        BLOCK_P=_PARTS,
        num_warps=4,
    )
    return out


@triton.jit
def _walk(
    q: "Any",
    keys: "Any",
    values: "Any",
    positions: "Any",
    count: "Any",
    scaling: "Any",
    MASKED: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention over `count` entries that follow each other: its maximum, sum of exponentials, weighted values."""
    dims = tl.arange(0, BLOCK_D)
    outs = tl.arange(0, BLOCK_V)
    peak = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_G,), tl.float32)
    total = tl.zeros((BLOCK_G, BLOCK_V), tl.float32)
    for start in range(0, count, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = n < count
        if MASKED:
            there = there & (tl.load(positions + n, mask=there, other=-1) >= 0)
        k = tl.load(keys + n[None, :] * DIM + dims[:, None], mask=there[None, :] & (dims < DIM)[:, None], other=0.0)
        v = tl.load(
            values + n[:, None] * VALUE_DIM + outs[None, :],
            mask=there[:, None] & (outs < VALUE_DIM)[None, :],
            other=0.0,
        )
        logits = product(q, k, tl.zeros((BLOCK_G, BLOCK_N), tl.float32)) * scaling
        logits = tl.where(there[None, :], logits, float("-inf"))
        highest = tl.maximum(peak, tl.max(logits, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        shrink = tl.exp(peak - base)
        weights = tl.exp(logits - base[:, None])
        mass = mass * shrink + tl.sum(weights, 1)
        total = product(weights.to(v.dtype), v, total * shrink[:, None])
        peak = highest
    return peak, mass, total


@triton.jit(do_not_specialize=["kv_heads", "new"])
def _part(
    query: "Any",
    keys: "Any",
    values: "Any",
    positions: "Any",
    items: "Any",
    partial: "Any",
    peaks: "Any",
    masses: "Any",
    scaling: "Any",
    kv_heads: "Any",
    new: "Any",
    query_batch: "Any",
    query_head: "Any",
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    which = tl.load(items + item * 4).to(tl.int64)
    first = tl.load(items + item * 4 + 1).to(tl.int64)
    count = tl.load(items + item * 4 + 2)
    number = tl.load(items + item * 4 + 3)
    row = which // kv_heads
    head = which % kv_heads
    group = tl.arange(0, BLOCK_G)
    dims = tl.arange(0, BLOCK_D)
    outs = tl.arange(0, BLOCK_V)
    q = tl.load(
        query + row * query_batch + (head * GROUP + group)[:, None] * query_head + dims[None, :],
        mask=(group < GROUP)[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )
    if number < 0:
        peak, mass, total = _walk(
            q,
            keys + first * DIM,
            values + first * VALUE_DIM,
            positions,
            count,
            scaling,
            False,
            DIM,
            VALUE_DIM,
            BLOCK_G,
            BLOCK_D,
            BLOCK_V,
            BLOCK_N,
        )
    else:
        peak, mass, total = _walk(
            q,
            keys + first * DIM,
            values + first * VALUE_DIM,
            positions + row * new + number,
            tl.where(count < 0, new - number, count),
            scaling,
            True,
            DIM,
            VALUE_DIM,
            BLOCK_G,
            BLOCK_D,
            BLOCK_V,
            BLOCK_N,
        )
    tl.store(peaks + item * GROUP + group, peak, mask=group < GROUP)
    tl.store(masses + item * GROUP + group, mass, mask=group < GROUP)
    tl.store(
        partial + (item * GROUP + group)[:, None] * VALUE_DIM + outs[None, :],
        total,
        mask=(group < GROUP)[:, None] & (outs < VALUE_DIM)[None, :],
    )


@triton.jit
def _together(
    partial: "Any",
    peaks: "Any",
    masses: "Any",
    spans: "Any",
    out: "Any",
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Put the parts of one query head together."""
    head = tl.program_id(0).to(tl.int64)
    first = tl.load(spans + head // GROUP)
    last = tl.load(spans + head // GROUP + 1)
    outs = tl.arange(0, BLOCK_V)
    peak = tl.full((1,), float("-inf"), tl.float32)
    mass = tl.zeros((1,), tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(first, last, BLOCK_P):
        n = start + tl.arange(0, BLOCK_P)
        place = n.to(tl.int64) * GROUP + head % GROUP
        own = tl.load(peaks + place, mask=n < last, other=float("-inf"))
        highest = tl.maximum(peak, tl.max(own, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        shrink = tl.exp(peak - base)
        weights = tl.exp(own - base)
        mass = mass * shrink + tl.sum(weights * tl.load(masses + place, mask=n < last, other=0.0), 0)
        parts = tl.load(
            partial + place[:, None] * VALUE_DIM + outs[None, :],
            mask=(n < last)[:, None] & (outs < VALUE_DIM)[None, :],
            other=0.0,
        )
        total = total * shrink + tl.sum(parts * weights[:, None], 0)
        peak = highest
    result = total / tl.where(mass > 0.0, mass, 1.0)
    tl.store(out + head * VALUE_DIM + outs, result.to(out.dtype.element_ty), mask=outs < VALUE_DIM)
