"""Neighbors of one node that are, or are not, neighbors of another node, found by binary search in its sorted row."""

# Triton's stubs describe the compiler's internal calls, so pyright cannot check the code of kernels.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportUnknownParameterType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from suffice.gpu import launch

_BLOCK = 64
"""Number of neighbors that a program looks up at a time."""


def match_neighbors(
    rowptr: Tensor, col: Tensor, first: Tensor, second: Tensor, *, common: bool
) -> tuple[Tensor, Tensor]:
    """Return N(i) ∩ N(j), or N(i) − N(j) without j, for each pair of nodes i and j.

    Args:
        rowptr: start of the row of each node, followed by the end of the last row, long [nodes + 1].
        col: Neighbors, in ascending order within each row, long [edges].
        first: i of each pair, long [pairs].
        second: j of each pair, long [pairs].
        common: whether to return the intersection. If False, the difference is returned.

    Returns:
        The nodes, pair after pair and in ascending order within each, long [total]; and their number in each pair, long
        [pairs].

    """
    first, second = first.contiguous(), second.contiguous()
    counts = torch.zeros_like(first)
    if first.numel() == 0:
        return counts, counts
    # The kernel runs twice: once to count the nodes of each pair, and once to store them.
    inputs = (rowptr, col, first, second)
    launch(
        match_neighbors_kernel,
        (first.numel(),),
        *inputs,
        counts,
        counts,
        counts,
        COMMON=common,
        STORE=False,
        BLOCK=_BLOCK,
        num_warps=2,
    )
    ends = counts.cumsum(0)
    nodes = torch.empty(int(ends[-1]), dtype=torch.long, device=first.device)
    starts = ends - counts
    launch(
        match_neighbors_kernel,
        (first.numel(),),
        *inputs,
        counts,
        starts,
        nodes,
        COMMON=common,
        STORE=True,
        BLOCK=_BLOCK,
        num_warps=2,
    )
    return nodes, counts


@triton.jit
def match_neighbors_kernel(
    rowptr: "Any",
    col: "Any",
    first: "Any",
    second: "Any",
    counts: "Any",
    starts: "Any",
    nodes: "Any",
    COMMON: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Look up the neighbors of one node in the row of the other by binary search, and count or store the matches."""
    pair = tl.program_id(0).to(tl.int64)
    i = tl.load(first + pair)
    j = tl.load(second + pair)
    end_i = tl.load(rowptr + i + 1)
    start_j = tl.load(rowptr + j)
    end_j = tl.load(rowptr + j + 1)
    num_matches = tl.zeros((1,), tl.int64)
    if STORE:
        nodes += tl.load(starts + pair)
    for block_start in range(tl.load(rowptr + i), end_i, BLOCK):
        offs_n = block_start + tl.arange(0, BLOCK)
        node = tl.load(col + offs_n, mask=offs_n < end_i, other=-1)
        low = tl.zeros((BLOCK,), tl.int64) + start_j
        high = tl.zeros((BLOCK,), tl.int64) + end_j
        size = end_j - start_j
        while size > 0:
            middle = (low + high) // 2
            is_open = low < high
            right = is_open & (tl.load(col + middle, mask=is_open, other=0) < node)
            high = tl.where(is_open & (right == 0), middle, high)
            low = tl.where(right, middle + 1, low)
            size = size // 2
        is_common = (low < end_j) & (tl.load(col + low, mask=low < end_j, other=-2) == node)
        is_match = (offs_n < end_i) & is_common if COMMON else (offs_n < end_i) & (is_common == 0) & (node != j)
        count = is_match.to(tl.int64)
        if STORE:
            tl.store(nodes + num_matches + tl.cumsum(count, 0) - 1, node, mask=is_match)
        num_matches += tl.sum(count, 0)
    if not STORE:
        tl.store(counts + pair + tl.arange(0, 1), num_matches)
