"""The symmetrically normalised adjacency times features (Kipf & Welling 2017, eq. 2), forwards and backwards."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from retain.link.messages import MessageGraph
from retain.link.neighbors import bags


def propagate(graph: MessageGraph, x: Tensor) -> Tensor:
    """Return D^-1/2 (A + I) D^-1/2 x, with D the degrees of A + I: [nodes, channels].

    The same as PyG's `gcn_norm` and a sum over edges, without a tensor of messages.

    Args:
        graph: A.
        x: [nodes, channels]; gradients pass to it.

    """
    return _Propagate.apply(x, graph)  # pyright: ignore[reportReturnType]


def without_own_edge(graph: MessageGraph, x: Tensor, propagated: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of `propagate` at both ends of edges, each in the graph that lacks just this edge.

    With S_i = Σ_{k∈N(i)∪i} x_k/√d_k the row is S_i/√d_i. Without edge (i, j), d_i falls by one, x_j leaves the sum
    and x_i counts by its new degree; what other neighbours weigh doesn't change.

    Args:
        graph: A, with the edges in it.
        x: [nodes, channels].
        propagated: `propagate(graph, x)`.
        pairs: edges of the graph, long [2, pairs].

    """
    degree = (graph.degree + 1).to(x.dtype).unsqueeze(-1)

    def one(these: Tensor, those: Tensor) -> Tensor:
        old, new = degree[these], degree[these] - 1
        total = propagated.index_select(0, these) * old.sqrt()
        total.addcmul_(x.index_select(0, those), degree[those].rsqrt(), value=-1)
        total.addcmul_(x.index_select(0, these), new.rsqrt() - old.rsqrt())
        return total.mul_(new.rsqrt())

    return one(pairs[0], pairs[1]), one(pairs[1], pairs[0])


def _product(graph: MessageGraph, x: Tensor) -> Tensor:
    scale = (graph.degree + 1).to(x.dtype).rsqrt().unsqueeze(-1)
    x = x * scale
    return (bags(x, graph.rows.col, graph.rows.pointers) + x).mul_(scale)


class _Propagate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, graph: MessageGraph) -> Tensor:
        ctx.graph = graph
        return _product(graph, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _product(ctx.graph, gradients[0].contiguous()), None  # the matrix is symmetric
