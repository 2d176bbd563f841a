"""Weighted overlap of one-hop and two-hop neighborhoods (Yun et al. 2021, eq. 5 to 7)."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from suffice.link.sparse.adjacency import MAX_DENSE_ENTRIES, Adjacency, CompressedRows, offsets_from_counts
from suffice.link.sparse.neighbors import Neighbors, squared_rows, sum_segments

EDGE_UNIT = 2**14
"""Value that an edge adds to an entry of `DenseWalks.table`.

The remainder of an entry is the number of walks of length two, which is at most the number of nodes, 8,192.
"""
_MAX_LIST_ENTRIES = 2**22


def overlap(adjacency: Adjacency, pairs: Tensor, weight: Tensor, beta: float) -> Tensor:
    """Return Σ_k Ã_ik Ã_jk w_k for each pair (i, j), with Ã = A + βA²: [pairs].

    For graphs of up to 8,192 nodes, A² is kept as a dense matrix whose rows are corrected for the edges that a view
    lacks. For larger graphs, the two-hop neighborhoods of the pairs are listed. Both give the same result.

    Args:
        adjacency: A, without the edges that are to be scored.
        pairs: long [2, pairs].
        weight: w, [nodes], differentiable.
        beta: weight of walks of length two (β).

    """
    if pairs.size(1) == 0:
        return weight.new_zeros(0) + 0 * weight.sum()  # differentiable in `weight`
    if adjacency.num_nodes**2 > MAX_DENSE_ENTRIES:
        nodes, inverse = torch.unique(pairs, return_inverse=True)
        return _overlap_of_lists(adjacency, nodes, inverse, weight, beta)
    walks = dense_walks(adjacency.base)
    with walks.rows_of_view(adjacency, pairs.unique()) as table:
        parts = [walks.shared_nodes(table, part, beta) for part in pairs.split(walks.pairs_per_chunk, dim=1)]
    sums = [_WeightedSum.apply(weight, lists, value.to(weight.dtype)) for lists, value in parts]
    return torch.cat(sums)  # pyright: ignore[reportArgumentType]


def dense_walks(graph: Adjacency) -> DenseWalks:
    """Return the dense matrix of walks of a graph that is not a view, computed once."""
    return graph.memoize("dense walks", lambda: DenseWalks(graph))


class DenseWalks:
    """A² and A of a graph in one dense matrix, with the positions of the entries that are not 0.

    Args:
        graph: A, with at most 8,192 nodes; not a view.

    Attributes:
        table: A² + `EDGE_UNIT` · A, int16 [nodes, nodes].

    """

    def __init__(self, graph: Adjacency) -> None:
        n = graph.num_nodes
        self.table = torch.zeros(n, n, dtype=torch.int16, device=graph.device)
        for nodes in torch.arange(n, device=graph.device).split(512):
            codes = _walk_codes(graph.csr, graph.csr, nodes)
            self.table[nodes] = torch.bincount(codes, minlength=nodes.numel() * n).view(nodes.numel(), -1).short()
        self.table.view(-1)[graph.csr.codes] += EDGE_UNIT
        columns = [part.nonzero()[:, 1].int() for part in self.table.split(512)]
        self._column = torch.cat(columns) if columns else graph.csr.col.int()
        self._size = torch.cat([part.count_nonzero(dim=1) for part in self.table.split(512)]).int()
        self._start = offsets_from_counts(self._size)
        # A pair has at most n shared nodes, so that the lists of a chunk have at most a few million entries.
        self.pairs_per_chunk = max(1, _MAX_LIST_ENTRIES // max(1, n))
        self._lock = Lock()

    @contextmanager
    def rows_of_view(self, view: Adjacency, nodes: Tensor) -> Generator[Tensor]:
        """Context manager in which some rows of the table are those of a view of the graph.

        With A = A' + R, where R holds the edges that the view lacks, A'² = A² − A'R − RA' − R². The few entries that
        change are updated in place and restored on exit.

        Args:
            view: the graph or a view of it.
            nodes: rows that will be read, unique, long [n].

        Yields:
            The table, int16 [nodes, nodes].

        """
        removed = view.removed
        if removed is None:
            yield self.table
            return
        n = view.num_nodes
        walks = [
            _walk_codes(first, second, nodes)
            for first, second in ((view.csr, removed), (removed, view.csr), (removed, removed))
        ]
        column, owner = removed.expand(nodes)
        position = torch.cat([*walks, owner * n + column])
        # From rows of `nodes` to rows of the table.
        row = torch.div(position, n, rounding_mode="floor")
        position += (nodes.index_select(0, row) - row) * n
        change = torch.full_like(position, -1, dtype=torch.int16)
        change[position.numel() - column.numel() :] = -EDGE_UNIT
        flat = self.table.view(-1)
        with self._lock:
            flat.scatter_add_(0, position, change)
            try:
                yield self.table
            finally:
                flat.scatter_add_(0, position, change.neg_())

    def shared_nodes(self, table: Tensor, pairs: Tensor, beta: float) -> tuple[Neighbors, Tensor]:
        """Return the nodes k that may have Ã_ik Ã_jk ≠ 0 for each pair (i, j), and these products, float [total].

        Args:
            table: what `rows_of_view` yielded for the nodes of the pairs.
            pairs: long [2, pairs].
            beta: weight of walks of length two (β).

        """
        n = table.size(0)
        first, second = pairs
        swap = self._size[second] < self._size[first]
        low, high = torch.where(swap, second, first), torch.where(swap, first, second)  # by size of the row
        size = self._size.index_select(0, low)
        offsets = offsets_from_counts(size)
        owner = torch.repeat_interleave(size)
        # Indices of 32 bits can address the whole table and take half the time.
        index = (self._start.index_select(0, low) - offsets[:-1]).int().index_select(0, owner)
        index.add_(torch.arange(owner.numel(), dtype=index.dtype, device=index.device))
        node = self._column.index_select(0, index)
        values: list[Tensor] = []
        for end in (low, high):
            position = (end * n).int().index_select(0, owner).add_(node)
            entry = table.view(-1).index_select(0, position)
            values.append((entry & (EDGE_UNIT - 1)).float().mul_(beta).add_(entry >> 14))
        return Neighbors(node, owner, offsets), values[0].mul_(values[1])


def _walk_codes(first: CompressedRows, second: CompressedRows, nodes: Tensor) -> Tensor:
    """Return a code for each walk with one step in `first` and one in `second`, from position p in `nodes` to node q.

    The code is p · num_nodes + q.
    """
    middle, owner = first.expand(nodes)
    end, walk = second.expand(middle)
    return owner[walk] * first.num_nodes + end


def _overlap_of_lists(adjacency: Adjacency, nodes: Tensor, pairs: Tensor, weight: Tensor, beta: float) -> Tensor:
    """Return the overlap of pairs [2, pairs] of positions in `nodes` from lists of two-step neighborhoods: [pairs]."""
    # Rows of Ã of the nodes, as the union of one-step and two-step neighborhoods.
    squared, count = squared_rows(adjacency, nodes)
    node, owner = adjacency.csr.expand(nodes)
    codes = torch.cat([owner * adjacency.num_nodes + node, squared.owner * adjacency.num_nodes + squared.node])
    codes, inverse = codes.unique(return_inverse=True)
    value = count.new_zeros(codes.numel())
    value.index_add_(0, inverse, torch.cat([torch.ones_like(node, dtype=value.dtype), beta * count]))
    rows = CompressedRows(codes, adjacency.num_nodes)  # `row` is a position in `nodes`
    size = torch.bincount(rows.row, minlength=nodes.numel())
    offsets = offsets_from_counts(size)
    # Each entry of the shorter row of a pair is looked up in the longer row.
    swap = size[pairs[1]] < size[pairs[0]]
    low, high = torch.where(swap, pairs[1], pairs[0]), torch.where(swap, pairs[0], pairs[1])
    pair = torch.repeat_interleave(size[low])
    first = torch.arange(pair.numel(), device=pair.device)
    first = first + (offsets[low] - offsets_from_counts(size[low])[:-1])[pair]
    second = rows.find(high[pair] * adjacency.num_nodes + rows.col[first])
    found = (second >= 0).nonzero().flatten()
    first, second, pair = first[found], second[found], pair[found]
    lists = Neighbors.from_owners(rows.col[first], pair, pairs.size(1))
    products = (value[first] * value[second]).to(weight.dtype)
    return _WeightedSum.apply(weight, lists, products)  # pyright: ignore[reportReturnType]


class _WeightedSum(Function):
    # Σ_k value_k · weight_k over the nodes k of each list.
    @staticmethod
    def forward(ctx: Any, weight: Tensor, lists: Neighbors, value: Tensor) -> Tensor:
        ctx.lists, ctx.value, ctx.num_nodes = lists, value, weight.numel()
        offsets = lists.offsets.to(lists.node.dtype)
        return sum_segments(weight.unsqueeze(-1), lists.node, offsets, value).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        terms = gradients[0].index_select(0, ctx.lists.owner).mul_(ctx.value)
        return terms.new_zeros(ctx.num_nodes).scatter_add_(0, ctx.lists.node.long(), terms), None, None
