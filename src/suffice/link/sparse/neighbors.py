"""Common and residual neighbors of pairs of nodes, sums over them, and rows of the squared adjacency.

The lists hold only the neighborhoods of the given pairs, so that memory grows with the batch and not with the graph.
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
    """A list of nodes for each of several pairs or nodes, all lists in one tensor.

    Attributes:
        node: the nodes, list after list, long [total].
        owner: the list that each node belongs to, ascending, long [total].
        offsets: where each list starts, followed by the total, long [lists + 1].

    """

    node: Tensor
    owner: Tensor
    offsets: Tensor

    @classmethod
    def from_owners(cls, node: Tensor, owner: Tensor, lists: int) -> Neighbors:
        """Make `lists` lists from nodes [total] and the list that each belongs to, ascending [total]."""
        return cls(node, owner, offsets_from_counts(torch.bincount(owner, minlength=lists)))


def common_neighbors(adjacency: Adjacency, pairs: Tensor) -> Neighbors:
    """Return N(i) ∩ N(j) for each pair (i, j).

    The neighbors of the node with the smaller degree are looked up among those of the other node.

    Args:
        adjacency: graph without the edges that are scored.
        pairs: long [2, pairs].

    """
    first, second = pairs
    swap = adjacency.degree[second] < adjacency.degree[first]
    low, high = torch.where(swap, second, first), torch.where(swap, first, second)  # by degree
    if can_use_kernels(adjacency.csr.col):
        return _match_neighbors(adjacency, low, high, common=True)
    node, owner = adjacency.csr.expand(low)
    keep = adjacency.contains(high.index_select(0, owner), node).nonzero().flatten()
    return Neighbors.from_owners(node.index_select(0, keep), owner.index_select(0, keep), pairs.size(1))


def residual_neighbors(adjacency: Adjacency, pairs: Tensor) -> tuple[Neighbors, Neighbors]:
    """Return N(i) − N(j) and N(j) − N(i) for each pair (i, j), both without i and j.

    Args:
        adjacency: graph without the edges that are scored.
        pairs: long [2, pairs].

    """

    def difference(first: Tensor, second: Tensor) -> Neighbors:
        if can_use_kernels(adjacency.csr.col):
            return _match_neighbors(adjacency, first, second, common=False)
        node, owner = adjacency.csr.expand(first)
        other = second.index_select(0, owner)
        keep = (~adjacency.contains(other, node) & (node != other)).nonzero().flatten()
        return Neighbors.from_owners(node.index_select(0, keep), owner.index_select(0, keep), pairs.size(1))

    return difference(pairs[0], pairs[1]), difference(pairs[1], pairs[0])


def _match_neighbors(adjacency: Adjacency, first: Tensor, second: Tensor, *, common: bool) -> Neighbors:
    from suffice.link.sparse.kernels.match_neighbors import match_neighbors

    node, counts = match_neighbors(adjacency.csr.rowptr, adjacency.csr.col, first, second, common=common)
    return Neighbors(node, torch.repeat_interleave(counts), offsets_from_counts(counts))


def squared_rows(adjacency: Adjacency, nodes: Tensor) -> tuple[Neighbors, Tensor]:
    """Return rows of A²: the nodes that walks of length two reach from each node, and the number of these walks.

    Args:
        adjacency: A.
        nodes: rows to return, long [n].

    Returns:
        The nodes reached from each node, and the number of walks to each of them, float [total].

    """
    middle, owner = adjacency.csr.expand(nodes)
    end, walk = adjacency.csr.expand(middle)
    codes, count = torch.unique(owner[walk] * adjacency.num_nodes + end, return_counts=True)
    owner = torch.div(codes, max(adjacency.num_nodes, 1), rounding_mode="floor")
    return Neighbors.from_owners(codes - owner * adjacency.num_nodes, owner, nodes.numel()), count.float()


def pool(x: Tensor, neighbors: Neighbors, weight: Tensor | None = None) -> Tensor:
    """Return the sum of the rows of x over the nodes of each list: [lists, channels].

    Args:
        x: [nodes, channels], differentiable.
        neighbors: the lists.
        weight: weight of each node of each list, [total], not differentiable; None for 1.

    """
    return _Pool.apply(x, neighbors, weight)  # pyright: ignore[reportReturnType]


def sum_segments(x: Tensor, index: Tensor, offsets: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the sum of the rows of x over each segment of an index: [segments, channels]; not differentiable.

    Args:
        x: [nodes, channels].
        index: rows of x, segment after segment, long [total].
        offsets: where each segment starts, followed by the total, long [segments + 1].
        weight: weight of each row of each segment, [total]; None for 1.

    """
    if index.numel() == 0 or offsets.numel() == 1:
        return x.new_zeros(offsets.numel() - 1, x.size(1))
    return F.embedding_bag(index, x, offsets[:-1], mode="sum", per_sample_weights=weight)


class _Pool(Function):
    # `embedding_bag` in both directions is several times as fast as `index_add_` and as its own backward.
    @staticmethod
    def forward(ctx: Any, x: Tensor, neighbors: Neighbors, weight: Tensor | None) -> Tensor:
        ctx.num_nodes, ctx.neighbors, ctx.weight = x.size(0), neighbors, weight
        return sum_segments(x, neighbors.node, neighbors.offsets, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        node, order = ctx.neighbors.node.sort(stable=True)
        transposed = Neighbors.from_owners(ctx.neighbors.owner[order], node, ctx.num_nodes)
        weight = None if ctx.weight is None else ctx.weight[order]
        return sum_segments(gradients[0].contiguous(), transposed.node, transposed.offsets, weight), None, None
