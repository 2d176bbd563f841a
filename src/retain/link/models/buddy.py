"""BUDDY: ELPH on features that are propagated once, before training (Chamberlain et al. 2023, sec. 5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retain.link.messages import MessageGraph, as_messages
from retain.link.models.base import Encoding, PairModel
from retain.link.models.sketched import SketchHead
from retain.link.propagation import propagate, without_own_edge


class BUDDY(PairModel):
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

    def encode(self, x: Tensor, messages: Tensor | MessageGraph) -> Encoding:
        """Map the propagated features of every node."""
        graph = as_messages(messages, x.size(0))
        return Encoding(self.encoder(propagated(graph.base, x)), x, graph)

    def edge_embedding(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the hidden layers side by side, [edges, k(k + 2) + hidden]."""
        first, second = (encoding.nodes.index_select(0, end) for end in pairs)
        known, rows = self._own_edges(encoding.graph.base, encoding.x, pairs)
        if known.numel():
            own = self.encoder(rows)
            first = first.index_put((known,), own[: known.numel()])
            second = second.index_put((known,), own[known.numel() :])
        return self.head(encoding.graph, pairs, first * second)

    def forward(self, x: Tensor, edge_index: Tensor | MessageGraph, pairs: Tensor) -> Tensor:
        """Score pairs; in training only the ends of the batch are mapped."""
        graph = as_messages(edge_index, x.size(0))
        if not self.training or pairs.numel() > 2 * x.size(0):
            return super().forward(x, graph, pairs)
        inputs = propagated(graph.base, x).index_select(0, pairs.flatten())
        known, rows = self._own_edges(graph.base, x, pairs)
        if known.numel():
            inputs[torch.cat([known, known + pairs.size(1)])] = rows
        first, second = self.encoder(inputs).chunk(2)
        return self.last(self.head(graph, pairs, first * second)).squeeze(-1)

    def _own_edges(self, graph: MessageGraph, x: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Return which pairs are edges, and ÂX at their ends, each without its edge, [2 · edges, features]."""
        known = (graph.rows.find(pairs[0] * graph.num_nodes + pairs[1]) >= 0).nonzero().flatten()
        return known, torch.cat(without_own_edge(graph, x, propagated(graph, x), pairs[:, known]))


def propagated(graph: MessageGraph, x: Tensor) -> Tensor:
    """Return ÂX, made once for a graph and features."""
    return graph.remember("propagated", lambda: propagate(graph, x), x)
