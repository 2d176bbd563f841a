"""Weighted neighbourhood overlap over one and two steps (Yun et al. 2021, eq. 5 to 7)."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from suffice.link.sparse.adjacency import SMALL, Adjacency, CompressedRows, offsets_from_counts
from suffice.link.sparse.neighbors import Neighbors, bags, square_rows

# A² and A in one number of 16 bits: no count of walks is above the number of nodes, which is at most 8,192 here.
_EDGE = 2**14
_ENTRIES = 2**22


def overlap(graph: Adjacency, pairs: Tensor, weight: Tensor, beta: float) -> Tensor:
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
    if graph.num_nodes**2 > SMALL:
        ends, place = torch.unique(pairs, return_inverse=True)
        return _listed(graph, ends, place, weight, beta)
    steps = _steps_of(graph)
    with steps.of(graph, pairs.unique()) as table:
        parts = [steps.shared(table, part, beta) for part in pairs.split(steps.pairs_at_a_time, dim=1)]
    sums = [_Sum.apply(weight, lists, value.to(weight.dtype)) for lists, value in parts]
    return torch.cat(sums)  # pyright: ignore[reportArgumentType]


def square_dense(graph: Adjacency, nodes: Tensor) -> Tensor:
    """Return rows of A², float [n, nodes], from a dense A² of the graph's base that is made once.

    Args:
        graph: a graph or a view of it, at most 8,192 nodes.
        nodes: which rows, long [n].

    """
    with _steps_of(graph).of(graph, nodes.unique()) as table:
        return (table.index_select(0, nodes) & (_EDGE - 1)).float()


def _steps_of(graph: Adjacency) -> _Steps:
    base = graph.base
    return base.memoize("steps", lambda: _Steps(base))


class _Steps:
    """A² + 2^14 A, dense, and in which columns each of its rows is not 0.

    Args:
        graph: A, of at most 8,192 nodes; not a view.

    """

    def __init__(self, graph: Adjacency) -> None:
        n = graph.num_nodes
        self.table = torch.zeros(n, n, dtype=torch.int16, device=graph.device)
        columns: list[Tensor] = []
        for nodes in torch.arange(n, device=graph.device).split(512):
            codes = _steps(graph.csr, graph.csr, nodes)
            self.table[nodes] = torch.bincount(codes, minlength=nodes.numel() * n).view(nodes.numel(), -1).short()
        self.table.view(-1)[graph.csr.codes] += _EDGE
        for part in self.table.split(512):
            columns.append(part.nonzero()[:, 1].int())
        self.column = torch.cat(columns) if columns else graph.csr.col.int()
        self.size = torch.cat([part.count_nonzero(dim=1) for part in self.table.split(512)]).int()
        self.start = offsets_from_counts(self.size)
        # So that the lists of a part have some million entries in any graph.
        self.pairs_at_a_time = max(1, _ENTRIES // max(1, n))
        self.lock = Lock()

    @contextmanager
    def of(self, graph: Adjacency, nodes: Tensor) -> Generator[Tensor]:
        """Let the rows of some nodes be those of a view of the graph: [nodes, nodes].

        With A = A' + R, where the view lacks R, A'² = A² - A'R - RA' - R². Few numbers of a row change: they are
        changed in place, and changed back.

        Args:
            graph: the view.
            nodes: none twice, long [n].

        """
        removed = graph.removed
        if removed is None:
            yield self.table
            return
        n = graph.num_nodes
        codes: list[Tensor] = []
        for first, second in ((graph.csr, removed), (removed, graph.csr), (removed, removed)):
            codes.append(_steps(first, second, nodes))
        node, owner = removed.expand(nodes)
        codes.append(owner * n + node)
        place = torch.cat(codes)
        row = torch.div(place, n, rounding_mode="floor")
        place += (nodes.index_select(0, row) - row) * n
        less = torch.full_like(place, -1, dtype=torch.int16)
        less[place.numel() - node.numel() :] = -_EDGE
        flat = self.table.view(-1)
        with self.lock:
            flat.scatter_add_(0, place, less)
            try:
                yield self.table
            finally:
                flat.scatter_add_(0, place, less.neg_())

    def shared(self, table: Tensor, pairs: Tensor, beta: float) -> tuple[Neighbors, Tensor]:
        """List the nodes that both ends of each pair may reach, and the products Ã_ik Ã_jk, float [total].

        Args:
            table: the rows of both ends.
            pairs: long [2, pairs].
            beta: weight of two steps.

        """
        n = table.size(0)
        first, second = pairs
        swap = self.size[second] < self.size[first]
        few, many = torch.where(swap, second, first), torch.where(swap, first, second)
        size = self.size.index_select(0, few)
        starts = offsets_from_counts(size)
        owner = torch.repeat_interleave(size)
        # Numbers of 32 bits, which hold any place in the table and cost half.
        shift = (self.start.index_select(0, few) - starts[:-1]).int().index_select(0, owner)
        node = self.column.index_select(
            0, shift.add_(torch.arange(owner.numel(), dtype=shift.dtype, device=shift.device))
        )
        values: list[Tensor] = []
        for ends in (few, many):
            place = (ends * n).int().index_select(0, owner).add_(node)
            steps = table.view(-1).index_select(0, place)
            values.append((steps & (_EDGE - 1)).float().mul_(beta).add_(steps >> 14))
        return Neighbors(node, owner, starts), values[0].mul_(values[1])


def _steps(first: CompressedRows, second: CompressedRows, nodes: Tensor) -> Tensor:
    middle, owner = first.expand(nodes)
    end, place = second.expand(middle)
    return owner[place] * first.num_nodes + end


def _listed(graph: Adjacency, ends: Tensor, place: Tensor, weight: Tensor, beta: float) -> Tensor:
    two, count = square_rows(graph, ends)
    node, owner = graph.csr.expand(ends)
    codes = torch.cat([owner * graph.num_nodes + node, two.owner * graph.num_nodes + two.node])
    codes, inverse = codes.unique(return_inverse=True)
    value = count.new_zeros(codes.numel())
    value.index_add_(0, inverse, torch.cat([torch.ones_like(node, dtype=value.dtype), beta * count]))
    rows = CompressedRows(codes, graph.num_nodes)  # row: place in `ends`; codes ascend with it
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
        return bags(weight.unsqueeze(-1), lists.node, lists.offsets.to(lists.node.dtype), value).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        terms = gradients[0].index_select(0, ctx.lists.owner).mul_(ctx.value)
        return terms.new_zeros(ctx.nodes).scatter_add_(0, ctx.lists.node.long(), terms), None, None
