"""BUDDY: ELPH on features that are propagated once, before training (Chamberlain et al. 2023, section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from suffice.link.models.base import Encoding
from suffice.link.models.registry import ModelSettings, Preset, register_model
from suffice.link.models.sketched import PUBLISHED_TRAINING, SketchHead, SketchModel, check_hops
from suffice.link.sparse.adjacency import Adjacency, as_adjacency
from suffice.link.sparse.propagation import (
    is_mostly_zero,
    propagate,
    propagate_sparse,
    propagate_without_own_edge,
)


class BUDDY(SketchModel):
    """Score a pair by its counts of nodes by distance and the product of its linearly mapped propagated features ÂX.

    Sketches and ÂX are computed once for a graph. For a pair that is an edge of the graph, both are corrected for the
    removal of this edge.

    Args:
        in_channels: number of features of a node.
        hidden: number of channels.
        norm: normalization over pairs: `batch`, `layer`, `graph` or `none`.
        dropout: probability that a channel is dropped.
        hops: radius of the sketched neighborhoods, 1 to 3.

    """

    def __init__(
        self, in_channels: int, hidden: int = 1024, norm: str = "batch", dropout: float = 0.0, *, hops: int = 2
    ) -> None:
        super().__init__()
        self.encoder = nn.Linear(in_channels, hidden)
        self.head = SketchHead(hops, hidden, norm, dropout)
        self.last = nn.Linear(self.head.out_channels, 1)

    def encode(self, x: Tensor, edge_index: Tensor | Adjacency) -> Encoding:
        """Map the propagated features of every node."""
        adjacency = as_adjacency(edge_index, x.size(0))
        return Encoding(self.encoder(propagated_features(adjacency.base, x)[: x.size(0)]), x, adjacency)

    def product(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return z_i ⊙ z_j, [pairs, hidden]."""
        first, second = (encoding.nodes.index_select(0, end) for end in pairs)
        graph = encoding.adjacency.base
        edges = (graph.csr.find(pairs[0] * graph.num_nodes + pairs[1]) >= 0).nonzero().flatten()
        if edges.numel():
            features = propagated_features(graph, encoding.x)
            z = self.encoder(propagate_without_own_edge(graph, features, pairs[:, edges]))
            first = first.index_put((edges,), z[: edges.numel()])
            second = second.index_put((edges,), z[edges.numel() :])
        return first * second

    def forward(self, x: Tensor, edge_index: Tensor | Adjacency, pairs: Tensor) -> Tensor:
        """Return logits, [pairs]; in training, the linear map is applied only to the nodes of the batch."""
        adjacency = as_adjacency(edge_index, x.size(0))
        if not self.training or pairs.numel() > 2 * x.size(0):
            return super().forward(x, adjacency, pairs)
        features = propagated_features(adjacency.base, x)
        z = self.encoder(propagate_without_own_edge(adjacency.base, features, pairs))
        return self.score_product(adjacency, pairs, _HalvesProduct.apply(z))  # pyright: ignore[reportArgumentType]


class _HalvesProduct(Function):
    # Product of the first half and the second half of the rows. Autograd would allocate a zero tensor for each half.
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        first, second = x.chunk(2)
        return first * second

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result = torch.empty_like(x)
        for half, other in zip(result.chunk(2), reversed(x.chunk(2)), strict=True):
            torch.mul(gradients[0], other, out=half)
        return result


def propagated_features(graph: Adjacency, x: Tensor) -> Tensor:
    """Return ÂX stacked on X, computed once for a graph and its features: [2·nodes, features]."""
    return graph.memoize("propagated features", lambda: _stack_propagated(graph, x), x)


def _stack_propagated(graph: Adjacency, x: Tensor) -> Tensor:
    stacked = x.new_empty(2 * x.size(0), x.size(1))
    propagated, copy = stacked.chunk(2)
    copy.copy_(x)
    if is_mostly_zero(x):
        propagate_sparse(graph, x, propagated)
    else:
        propagated.copy_(propagate(graph, x))
    return stacked


@register_model("buddy")
@dataclass(frozen=True, kw_only=True)
class BUDDYSettings(ModelSettings):
    """Options of `BUDDY`.

    Args:
        hops: radius of the neighborhoods that are counted, 1 to 3.

    """

    hops: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hops(self.hops)

    def create(self, in_channels: int) -> BUDDY:
        """Return the model."""
        return BUDDY(in_channels, self.hidden, self.decoder_norm, self.dropout, hops=self.hops)

    @classmethod
    def published(cls, data: str) -> Preset:
        """Return the authors' settings (melifluos/subgraph-sketching)."""
        hops, dropout = (3, 0.2) if data == "PubMed" else (2, 0.5)
        return Preset(cls(hidden=1024, dropout=dropout, hops=hops, decoder_norm="batch"), PUBLISHED_TRAINING)
