"""Common and residual neighbours of pairs of nodes, what is pooled from them, and rows of adjacency powers.

Lists are as long as the neighbourhoods of the pairs asked for: memory grows with the batch, not with the graph.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from suffice.gpu import can_use_kernels
from suffice.link.sparse.adjacency import Adjacency, offsets_from_counts


class Neighbors(NamedTuple):
    """A list of nodes for each pair (or each node) asked for.

    Args:
        node: long [total], list after list.
        owner: which list each belongs to, ascending, long [total].
        offsets: where each list begins, long [lists + 1].

    """

    node: Tensor
    owner: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, node: Tensor, owner: Tensor, lists: int) -> Neighbors:
        """Make the lists of nodes and their ascending owners."""
        return cls(node, owner, offsets_from_counts(torch.bincount(owner, minlength=lists)))


def common_neighbors(graph: Adjacency, pairs: Tensor) -> Neighbors:
    """Return N(i) ∩ N(j) for each pair (i, j).

    The end with fewer neighbours is expanded, each looked up at the other end.

    Args:
        graph: without the edges that are to be scored.
        pairs: long [2, pairs].

    """
    first, second = pairs
    swap = graph.degree[second] < graph.degree[first]
    few, many = torch.where(swap, second, first), torch.where(swap, first, second)
    if can_use_kernels(graph.csr.col):
        return _matching(graph, few, many, common=True)
    node, owner = graph.csr.expand(few)
    keep = graph.contains(many.index_select(0, owner), node).nonzero().flatten()
    return Neighbors.of(node.index_select(0, keep), owner.index_select(0, keep), pairs.size(1))


def residual_neighbors(graph: Adjacency, pairs: Tensor) -> tuple[Neighbors, Neighbors]:
    """Return N(i) − N(j) and N(j) − N(i) for each pair (i, j), without i and j themselves.

    Args:
        graph: without the edges that are to be scored.
        pairs: long [2, pairs].

    """

    def one(these: Tensor, those: Tensor) -> Neighbors:
        if can_use_kernels(graph.csr.col):
            return _matching(graph, these, those, common=False)
        node, owner = graph.csr.expand(these)
        others = those.index_select(0, owner)
        keep = (~graph.contains(others, node) & (node != others)).nonzero().flatten()
        return Neighbors.of(node.index_select(0, keep), owner.index_select(0, keep), pairs.size(1))

    return one(pairs[0], pairs[1]), one(pairs[1], pairs[0])


def _matching(graph: Adjacency, these: Tensor, those: Tensor, *, common: bool) -> Neighbors:
    from suffice.link.sparse.kernels.match_neighbors import match_neighbors

    node, counts = match_neighbors(graph.csr.rowptr, graph.csr.col, these, those, common=common)
    return Neighbors(node, torch.repeat_interleave(counts), offsets_from_counts(counts))


def square_rows(graph: Adjacency, nodes: Tensor) -> tuple[Neighbors, Tensor]:
    """Return rows of A²: for each node, where walks of two steps lead, and how many lead there, float [total].

    Args:
        graph: A.
        nodes: which rows, long [n].

    """
    middle, owner = graph.csr.expand(nodes)
    end, place = graph.csr.expand(middle)
    codes, count = torch.unique(owner[place] * graph.num_nodes + end, return_counts=True)
    owner = torch.div(codes, max(graph.num_nodes, 1), rounding_mode="floor")
    return Neighbors.of(codes - owner * graph.num_nodes, owner, nodes.numel()), count.float()


def pool(x: Tensor, neighbors: Neighbors, weight: Tensor | None = None) -> Tensor:
    """Sum the rows of each list's nodes: [lists, channels].

    Args:
        x: [nodes, channels]; gradients pass to it.
        neighbors: which rows.
        weight: of each entry, [total]; no gradient passes to it.

    """
    return _Pool.apply(x, neighbors, weight)  # pyright: ignore[reportReturnType]


def bags(x: Tensor, index: Tensor, starts: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum rows of x, bag after bag, [bags, channels]; not for gradients.

    Args:
        x: [nodes, channels].
        index: which rows, long [total].
        starts: where each bag begins, and where the last ends, long [bags + 1].
        weight: of each entry, [total].

    """
    if index.numel() == 0 or starts.numel() == 1:
        return x.new_zeros(starts.numel() - 1, x.size(1))
    return F.embedding_bag(index, x, starts[:-1], mode="sum", per_sample_weights=weight)


class _Pool(Function):
    # `embedding_bag` both ways: several times as fast as `index_add_` and as its own backward.
    @staticmethod
    def forward(ctx: Any, x: Tensor, neighbors: Neighbors, weight: Tensor | None) -> Tensor:
        ctx.rows, ctx.neighbors, ctx.weight = x.size(0), neighbors, weight
        return bags(x, neighbors.node, neighbors.offsets, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        node, order = ctx.neighbors.node.sort(stable=True)
        turned = Neighbors.of(ctx.neighbors.owner[order], node, ctx.rows)
        weight = None if ctx.weight is None else ctx.weight[order]
        return bags(gradients[0].contiguous(), turned.node, turned.offsets, weight), None, None
