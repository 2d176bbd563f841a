"""BUDDY: ELPH on features that are propagated once, before training (Chamberlain et al. 2023, sec. 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from suffice.link.models.base import Encoding
from suffice.link.models.sketched import SketchHead, SketchModel
from suffice.link.sparse.adjacency import Adjacency, as_adjacency
from suffice.link.sparse.propagation import mostly_zero, propagate, propagate_sparse, propagate_without_own_edge


class BUDDY(SketchModel):
    """Score counts by distance and the product of a linear map of propagated features, ÂX.

    Sketches and ÂX are made once for a graph. Where a pair is an edge of it, both are taken without this edge.

    Args:
        in_channels: features of a node.
        hidden: channels.
        norm: over pairs.
        dropout: share of channels dropped.
        hops: of the neighbourhoods.

    """

    def __init__(
        self, in_channels: int, hidden: int = 1024, norm: str = "batch", dropout: float = 0.0, *, hops: int = 2
    ) -> None:
        super().__init__()
        self.encoder = nn.Linear(in_channels, hidden)
        self.head = SketchHead(hops, hidden, norm, dropout)
        self.last = nn.Linear(self.head.out_channels, 1)

    def encode(self, x: Tensor, messages: Tensor | Adjacency) -> Encoding:
        """Map the propagated features of every node."""
        graph = as_adjacency(messages, x.size(0))
        return Encoding(self.encoder(propagated(graph.base, x)[: x.size(0)]), x, graph)

    def product(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the product of the mapped features of pairs' ends, [edges, hidden]."""
        first, second = (encoding.nodes.index_select(0, end) for end in pairs)
        base = encoding.graph.base
        known = (base.rows.find(pairs[0] * base.num_nodes + pairs[1]) >= 0).nonzero().flatten()
        if known.numel():
            own = self.encoder(propagate_without_own_edge(base, propagated(base, encoding.x), pairs[:, known]))
            first = first.index_put((known,), own[: known.numel()])
            second = second.index_put((known,), own[known.numel() :])
        return first * second

    def forward(self, x: Tensor, edge_index: Tensor | Adjacency, pairs: Tensor) -> Tensor:
        """Score pairs; in training only the ends of the batch are mapped."""
        graph = as_adjacency(edge_index, x.size(0))
        if not self.training or pairs.numel() > 2 * x.size(0):
            return super().forward(x, graph, pairs)
        ends = self.encoder(propagate_without_own_edge(graph.base, propagated(graph.base, x), pairs))
        return self.join(graph, pairs, _Halves.apply(ends))  # pyright: ignore[reportArgumentType]


class _Halves(Function):
    # The product of both halves of the rows. Torch would make a tensor of zeros for the gradient of each half.
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        first, second = x.chunk(2)
        return first * second

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        found = torch.empty_like(x)
        for half, other in zip(found.chunk(2), reversed(x.chunk(2)), strict=True):
            torch.mul(gradients[0], other, out=half)
        return found


def propagated(graph: Adjacency, x: Tensor) -> Tensor:
    """Return ÂX above X, made once for a graph and features: [2 · nodes, features]."""
    return graph.remember("propagated", lambda: _stacked(graph, x), x)


def _stacked(graph: Adjacency, x: Tensor) -> Tensor:
    both = x.new_empty(2 * x.size(0), x.size(1))
    smooth, same = both.chunk(2)
    same.copy_(x)
    if mostly_zero(x):
        propagate_sparse(graph, x, smooth)
    else:
        smooth.copy_(propagate(graph, x))
    return both
