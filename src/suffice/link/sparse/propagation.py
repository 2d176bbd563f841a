"""Propagation of features: products with the normalized adjacency (Kipf & Welling 2017, eq. 2) and neighbor means."""

from __future__ import annotations

from typing import Any

import torch
from scipy.sparse import csr_matrix, diags_array
from torch import Tensor
from torch.autograd import Function

from suffice.link.sparse.adjacency import Adjacency, offsets_from_counts
from suffice.link.sparse.neighbors import sum_segments


def propagate(adjacency: Adjacency, x: Tensor) -> Tensor:
    """Return Âx = D^-1/2 (A + I) D^-1/2 x, with D the degrees of A + I: [nodes, channels].

    The result is that of PyG's `gcn_norm` and a sum over edges, without a tensor of messages [edges, channels].

    Args:
        adjacency: A.
        x: [nodes, channels], differentiable.

    """
    return _Propagate.apply(x, adjacency)  # pyright: ignore[reportReturnType]


def is_mostly_zero(x: Tensor) -> bool:
    """Return whether a product of sparse matrices is faster: on the CPU, if less than 5 % of the features are not 0.

    Args:
        x: dense features, [nodes, channels].

    """
    fits = x.is_cpu and x.layout == torch.strided and x.dtype in (torch.float32, torch.float64)
    return fits and not x.requires_grad and int(torch.count_nonzero(x)) < 0.05 * x.numel()


def propagate_sparse(adjacency: Adjacency, x: Tensor, out: Tensor) -> None:
    """Compute the same Âx as `propagate` by a product of sparse matrices; not differentiable.

    Args:
        adjacency: A.
        x: features for which `is_mostly_zero` is True, [nodes, channels].
        out: contiguous tensor on the CPU to which Âx is written, [nodes, channels].

    """
    nodes, csr = x.size(0), adjacency.csr
    scale = (adjacency.degree + 1).to(x.dtype).rsqrt().numpy()
    weights = scale[csr.row.numpy()] * scale[csr.col.numpy()]
    matrix = csr_matrix((weights, csr.col.numpy(), csr.rowptr.numpy()), shape=(nodes, nodes))
    product: Any = (matrix + diags_array(scale * scale, format="csr")) @ csr_matrix(x.numpy())
    product.toarray(out=out.numpy())


def neighbor_mean(adjacency: Adjacency, x: Tensor) -> Tensor:
    """Return the mean of x over the neighbors of each node, 0 for a node without neighbors: [nodes, channels].

    Args:
        adjacency: A.
        x: [nodes, channels], differentiable.

    """
    return _NeighborMean.apply(x, adjacency)  # pyright: ignore[reportReturnType]


def propagate_without_own_edge(adjacency: Adjacency, stacked: Tensor, pairs: Tensor) -> Tensor:
    """Return the rows of Âx of both nodes of each pair, in the graph without only this pair: [2·pairs, channels].

    This differs from `remove_edges`, which removes all pairs from one graph. With S_i = Σ_{k∈N(i)∪{i}} x_k/√d_k the
    row of i is S_i/√d_i. Without the edge (i, j), d_i is smaller by one, x_j leaves the sum, and the weight of x_i is
    that of its new degree; the weights of the other neighbors do not change. The rows of a pair that is not an edge do
    not change.

    Args:
        adjacency: A.
        stacked: Âx stacked on x, `torch.cat([propagate(adjacency, x), x])`, [2·nodes, channels]; not differentiable.
        pairs: long [2, pairs].

    Returns:
        The rows of the first nodes of all pairs, followed by the rows of the second nodes.

    """
    is_edge = (adjacency.csr.find(pairs[0] * adjacency.num_nodes + pairs[1]) >= 0).repeat(2)
    node, other = pairs.flatten(), pairs.flip(0).flatten()
    edges = is_edge.nonzero().flatten()
    if edges.numel() == 0:
        return stacked.index_select(0, node)
    # Each result is a weighted sum of one row of `stacked` (not an edge) or three: Âx_i, x_j and x_i.
    offsets = offsets_from_counts(1 + 2 * is_edge)
    index, weight = (stacked.new_zeros(int(offsets[-1]), dtype=dtype) for dtype in (torch.long, stacked.dtype))
    index[offsets[:-1]], weight[offsets[:-1]] = node, 1.0
    node, other, start = node[edges], other[edges], offsets[edges]
    degree = (adjacency.degree + 1).to(stacked.dtype)
    old, new = degree[node], degree[node] - 1
    weight[start] = (old / new).sqrt()
    index[start + 1], weight[start + 1] = other + adjacency.num_nodes, -(degree[other] * new).rsqrt()
    index[start + 2], weight[start + 2] = node + adjacency.num_nodes, (new.rsqrt() - old.rsqrt()) * new.rsqrt()
    return sum_segments(stacked, index, offsets, weight)


def _normalized_product(adjacency: Adjacency, x: Tensor) -> Tensor:
    scale = (adjacency.degree + 1).to(x.dtype).rsqrt().unsqueeze(-1)
    x = x * scale
    return (sum_segments(x, adjacency.csr.col, adjacency.csr.rowptr) + x).mul_(scale)


class _Propagate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, adjacency: Adjacency) -> Tensor:
        ctx.adjacency = adjacency
        return _normalized_product(adjacency, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _normalized_product(ctx.adjacency, gradients[0].contiguous()), None  # Â is symmetric


class _NeighborMean(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, adjacency: Adjacency) -> Tensor:
        ctx.adjacency = adjacency
        return sum_segments(x, adjacency.csr.col, adjacency.csr.rowptr).div_(_num_neighbors(adjacency, x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        adjacency: Adjacency = ctx.adjacency
        shares = gradients[0] / _num_neighbors(adjacency, gradients[0])
        return sum_segments(shares, adjacency.csr.col, adjacency.csr.rowptr), None  # A is symmetric


def _num_neighbors(adjacency: Adjacency, x: Tensor) -> Tensor:
    return adjacency.degree.clamp_min(1).to(x.dtype).unsqueeze(-1)
