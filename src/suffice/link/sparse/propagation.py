"""The symmetrically normalised adjacency times features (Kipf & Welling 2017, eq. 2), forwards and backwards."""

from __future__ import annotations

from typing import Any

import torch
from scipy.sparse import csr_matrix, diags_array
from torch import Tensor
from torch.autograd import Function

from suffice.link.sparse.adjacency import Adjacency, offsets_from_counts
from suffice.link.sparse.neighbors import bags


def propagate(graph: Adjacency, x: Tensor) -> Tensor:
    """Return D^-1/2 (A + I) D^-1/2 x, with D the degrees of A + I: [nodes, channels].

    The same as PyG's `gcn_norm` and a sum over edges, without a tensor of messages.

    Args:
        graph: A.
        x: [nodes, channels]; gradients pass to it.

    """
    return _Propagate.apply(x, graph)  # pyright: ignore[reportReturnType]


def is_mostly_zero(x: Tensor) -> bool:
    """Return whether features are of the kind that a product of sparse matrices is faster for, on the CPU."""
    fit = x.is_cpu and x.layout == torch.strided and x.dtype in (torch.float32, torch.float64)
    return fit and not x.requires_grad and int(torch.count_nonzero(x)) < 0.05 * x.numel()


def propagate_sparse(graph: Adjacency, x: Tensor, out: Tensor) -> None:
    """Write what `propagate` returns, by a product of sparse matrices; no gradient passes to x.

    Args:
        graph: A.
        x: [nodes, channels], `is_mostly_zero`.
        out: of the same shape, adjacent, on the CPU.

    """
    nodes, rows = x.size(0), graph.csr
    scale = (graph.degree + 1).to(x.dtype).rsqrt().numpy()
    weights = scale[rows.row.numpy()] * scale[rows.col.numpy()]
    adjacency = csr_matrix((weights, rows.col.numpy(), rows.rowptr.numpy()), shape=(nodes, nodes))
    product: Any = (adjacency + diags_array(scale * scale, format="csr")) @ csr_matrix(x.numpy())
    product.toarray(out=out.numpy())


def neighbor_mean(graph: Adjacency, x: Tensor) -> Tensor:
    """Return the mean of x over the neighbours of each node, 0 where there are none: [nodes, channels].

    Args:
        graph: A.
        x: [nodes, channels]; gradients pass to it.

    """
    return _Mean.apply(x, graph)  # pyright: ignore[reportReturnType]


def propagate_without_own_edge(graph: Adjacency, both: Tensor, pairs: Tensor) -> Tensor:
    """Return rows of ÂX at the ends of pairs, each in the graph that lacks just this pair: [2 · pairs, channels].

    With S_i = Σ_{k∈N(i)∪i} x_k/√d_k the row is S_i/√d_i. Without edge (i, j), d_i falls by one, x_j leaves the sum
    and x_i counts by its new degree; what other neighbours weigh doesn't change. Of a pair that is no edge the rows
    stay. First come all first ends.

    Args:
        graph: A.
        both: ÂX above X, `torch.cat([propagate(graph, x), x])`, [2 · nodes, channels]; no gradient passes to it.
        pairs: long [2, pairs].

    """
    edge = (graph.csr.find(pairs[0] * graph.num_nodes + pairs[1]) >= 0).repeat(2)
    these, those = pairs.flatten(), pairs.flip(0).flatten()
    known = edge.nonzero().flatten()
    if known.numel() == 0:
        return both.index_select(0, these)
    starts = offsets_from_counts(1 + 2 * edge)
    index, weight = (both.new_zeros(int(starts[-1]), dtype=kind) for kind in (torch.long, both.dtype))
    index[starts[:-1]], weight[starts[:-1]] = these, 1.0
    these, those, place = these[known], those[known], starts[known]
    degree = (graph.degree + 1).to(both.dtype)
    old, new = degree[these], degree[these] - 1
    weight[place] = (old / new).sqrt()
    index[place + 1], weight[place + 1] = those + graph.num_nodes, -(degree[those] * new).rsqrt()
    index[place + 2], weight[place + 2] = these + graph.num_nodes, (new.rsqrt() - old.rsqrt()) * new.rsqrt()
    return bags(both, index, starts, weight)


def _product(graph: Adjacency, x: Tensor) -> Tensor:
    scale = (graph.degree + 1).to(x.dtype).rsqrt().unsqueeze(-1)
    x = x * scale
    return (bags(x, graph.csr.col, graph.csr.rowptr) + x).mul_(scale)


class _Propagate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, graph: Adjacency) -> Tensor:
        ctx.graph = graph
        return _product(graph, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _product(ctx.graph, gradients[0].contiguous()), None  # the matrix is symmetric


class _Mean(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, graph: Adjacency) -> Tensor:
        ctx.graph = graph
        return bags(x, graph.csr.col, graph.csr.rowptr).div_(_count(graph, x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        graph: Adjacency = ctx.graph
        shares = gradients[0] / _count(graph, gradients[0])
        return bags(shares, graph.csr.col, graph.csr.rowptr), None  # every edge is there in both directions


def _count(graph: Adjacency, x: Tensor) -> Tensor:
    return graph.degree.clamp_min(1).to(x.dtype).unsqueeze(-1)
