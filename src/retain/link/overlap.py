"""Weighted neighbourhood overlap over one and two steps (Yun et al. 2021, eq. 5 to 7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from retain.link.messages import SMALL, MessageGraph, Rows
from retain.link.neighbors import Neighbors, square_rows


def overlap(graph: MessageGraph, pairs: Tensor, weight: Tensor, beta: float) -> Tensor:
    """Return Σ_k Ã_ik Ã_jk w_k for each pair (i, j), with Ã = A + βA²: [pairs].

    On graphs of up to 8,192 nodes A² is kept dense, and rows of a view are corrected for the edges that it lacks;
    on others the two-step neighbourhoods of the pairs are listed. Both give the same.

    Args:
        graph: A, without the edges that are to be scored.
        pairs: long [2, pairs].
        weight: w, [nodes]; gradients pass to it.
        beta: weight of two steps.

    """
    if pairs.size(1) == 0:
        return weight.new_zeros(0) + 0 * weight.sum()
    ends, place = torch.unique(pairs, return_inverse=True)
    if graph.num_nodes**2 > SMALL:
        return _listed(graph, ends, place, weight, beta)
    rows = square_dense(graph, ends).mul_(beta)
    node, owner = graph.rows.expand(ends)
    rows.view(-1).index_add_(0, owner * graph.num_nodes + node, torch.ones_like(node, dtype=rows.dtype))
    return (rows[place[0]] * rows[place[1]]).to(weight.dtype) @ weight


def square_dense(graph: MessageGraph, nodes: Tensor) -> Tensor:
    """Return rows of A², float [n, nodes], from a dense A² of the graph's base that is made once.

    With A = A' + R, where a view lacks R, A'² = A² - A'R - RA' - R².

    Args:
        graph: a graph or a view of it, at most 8,192 nodes.
        nodes: which rows, long [n].

    """
    base = graph.base
    rows = base.remember("square", lambda: _square(base))[nodes].float()
    removed = graph.removed
    if removed is not None:
        for first, second in ((graph.rows, removed), (removed, graph.rows), (removed, removed)):
            codes = _steps(first, second, nodes)
            rows.view(-1).index_add_(0, codes, torch.full_like(codes, -1, dtype=rows.dtype))
    return rows


def _steps(first: Rows, second: Rows, nodes: Tensor) -> Tensor:
    middle, owner = first.expand(nodes)
    end, place = second.expand(middle)
    return owner[place] * first.num_nodes + end


def _square(graph: MessageGraph) -> Tensor:
    # int16: no count is above the number of nodes, which is at most 8,192 here.
    square = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.int16, device=graph.device)
    for nodes in torch.arange(graph.num_nodes, device=graph.device).split(512):
        codes = _steps(graph.rows, graph.rows, nodes)
        square[nodes] = torch.bincount(codes, minlength=nodes.numel() * graph.num_nodes).view(nodes.numel(), -1).short()
    return square


def _listed(graph: MessageGraph, ends: Tensor, place: Tensor, weight: Tensor, beta: float) -> Tensor:
    two, count = square_rows(graph, ends)
    node, owner = graph.rows.expand(ends)
    codes = torch.cat([owner * graph.num_nodes + node, two.owner * graph.num_nodes + two.node])
    codes, inverse = codes.unique(return_inverse=True)
    value = count.new_zeros(codes.numel())
    value.index_add_(0, inverse, torch.cat([torch.ones_like(node, dtype=value.dtype), beta * count]))
    rows = Rows(codes, graph.num_nodes)  # row: place in `ends`; codes ascend with it
    size = torch.bincount(rows.row, minlength=ends.numel())
    swap = size[place[1]] < size[place[0]]
    few, many = torch.where(swap, place[1], place[0]), torch.where(swap, place[0], place[1])
    starts = torch.cat([size.new_zeros(1), size.cumsum(0)])
    pair = torch.repeat_interleave(size[few])
    first = torch.arange(pair.numel(), device=pair.device)
    first = first + (starts[few] - torch.cat([size.new_zeros(1), size[few].cumsum(0)[:-1]]))[pair]
    second = rows.find(many[pair] * graph.num_nodes + rows.col[first])
    both = (second >= 0).nonzero().flatten()
    first, second, pair = first[both], second[both], pair[both]
    lists = Neighbors.of(rows.col[first], pair, place.size(1))
    return _Sum.apply(weight, lists, (value[first] * value[second]).to(weight.dtype))  # pyright: ignore[reportReturnType]


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, lists: Neighbors, value: Tensor) -> Tensor:
        ctx.lists, ctx.value, ctx.nodes = lists, value, weight.numel()
        sums = weight.new_zeros(lists.pointers.numel() - 1)
        return sums.index_add_(0, lists.owner, value * weight[lists.node])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        terms = ctx.value * gradients[0][ctx.lists.owner]
        return terms.new_zeros(ctx.nodes).index_add_(0, ctx.lists.node, terms), None, None
