"""ELPH: a GNN beside counts by distance from sketches (Chamberlain et al. 2023, sec. 4)."""

from __future__ import annotations

from torch import Tensor, nn

from suffice.link.models.base import Encoding
from suffice.link.models.encoder import Encoder
from suffice.link.models.sketched import SketchHead, SketchModel
from suffice.link.sparse.adjacency import Adjacency


class ELPH(SketchModel):
    """Score counts by distance and the product of a GNN's embeddings; sketches are made once for a graph.

    Args:
        encoder: of the nodes.
        norm: over pairs.
        dropout: share of channels dropped.
        hops: of the neighbourhoods.

    """

    def __init__(self, encoder: Encoder, norm: str = "batch", dropout: float = 0.0, *, hops: int = 2) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = SketchHead(hops, encoder.out_channels, norm, dropout)
        self.last = nn.Linear(self.head.out_channels, 1)

    def encode(self, x: Tensor, messages: Tensor | Adjacency) -> Encoding:
        """Embed the nodes."""
        graph = Encoding(x, x, messages).graph
        return Encoding(self.encoder(x, graph), x, graph)

    def product(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the product of the embeddings of pairs' ends, [edges, hidden]."""
        h = encoding.nodes
        return h.index_select(0, pairs[0]) * h.index_select(0, pairs[1])
