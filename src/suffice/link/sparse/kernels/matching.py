"""Neighbours of one node that are, or are not, neighbours of another: each looked up in the other's sorted row."""

# Triton's annotations speak of its compiler's own calls, not of what a kernel may be written as.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from suffice.gpu import launch

_BLOCK = 64  # neighbours that are looked up at a time


def matching(pointers: Tensor, columns: Tensor, these: Tensor, those: Tensor, *, common: bool) -> tuple[Tensor, Tensor]:
    """Return N(i) ∩ N(j), or N(i) − N(j) without j, of each pair of nodes i and j.

    Args:
        pointers: where the row of each node begins, and the last ends, long [nodes + 1].
        columns: neighbours, ascending within each row, long [edges].
        these: i of each pair, long [pairs].
        those: j of each pair, long [pairs].
        common: which of the two.

    Returns:
        The nodes, list after list and ascending within each, long [total]; and their number, long [pairs].

    """
    these, those = these.contiguous(), those.contiguous()
    counts = torch.zeros_like(these)
    if these.numel() == 0:
        return counts, counts
    work = (pointers, columns, these, those)
    launch(
        _match, (these.numel(),), *work, counts, counts, counts, COMMON=common, FILL=False, BLOCK=_BLOCK, num_warps=2
    )
    ends = counts.cumsum(0)
    found = torch.empty(int(ends[-1]), dtype=torch.long, device=these.device)
    starts = ends - counts
    launch(_match, (these.numel(),), *work, counts, starts, found, COMMON=common, FILL=True, BLOCK=_BLOCK, num_warps=2)
    return found, counts


@triton.jit
def _match(
    pointers: "Any",
    columns: "Any",
    these: "Any",
    those: "Any",
    counts: "Any",
    starts: "Any",
    found: "Any",
    COMMON: tl.constexpr,
    FILL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    this = tl.load(these + pair)
    that = tl.load(those + pair)
    last = tl.load(pointers + this + 1)
    begin = tl.load(pointers + that)
    end = tl.load(pointers + that + 1)
    done = tl.zeros((1,), tl.int64)
    if FILL:
        found += tl.load(starts + pair)
    for start in range(tl.load(pointers + this), last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        node = tl.load(columns + n, mask=n < last, other=-1)
        low = tl.zeros((BLOCK,), tl.int64) + begin
        high = tl.zeros((BLOCK,), tl.int64) + end
        size = end - begin
        while size > 0:
            middle = (low + high) // 2
            open_ = low < high
            right = open_ & (tl.load(columns + middle, mask=open_, other=0) < node)
            high = tl.where(open_ & (right == 0), middle, high)
            low = tl.where(right, middle + 1, low)
            size = size // 2
        same = (low < end) & (tl.load(columns + low, mask=low < end, other=-2) == node)
        wanted = (n < last) & same if COMMON else (n < last) & (same == 0) & (node != that)
        number = wanted.to(tl.int64)
        if FILL:
            tl.store(found + done + tl.cumsum(number, 0) - 1, node, mask=wanted)
        done += tl.sum(number, 0)
    if not FILL:
        tl.store(counts + pair + tl.arange(0, 1), done)
