"""Scoring of pairs on a fixed graph."""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.link.models.base import Encoding, LinkPredictor
from suffice.link.sparse.adjacency import Adjacency, as_adjacency


class PairScorer:
    """Score pairs on a fixed graph with nothing but the pairs as argument, as an audit wants it.

    Nodes are embedded when the mode of what embeds them changes, since they don't depend on the pairs; one embedding
    is kept. Make a new scorer after the parameters changed.

    Args:
        model: what to score with.
        x: features, [nodes, features].
        edge_index: edges that messages pass over, [2, edges].

    """

    def __init__(self, model: LinkPredictor, x: Tensor, edge_index: Tensor | Adjacency) -> None:
        self.model = model
        self.x = x
        self.edge_index = as_adjacency(edge_index, x.size(0)) if model.uses_adjacency else edge_index
        self._kept: tuple[tuple[bool, ...], Encoding] | None = None

    def encode(self) -> Encoding:
        """Return the encoding in the present mode of what makes it."""
        mode = tuple(module.training for part in self.model.node_modules for module in part.modules())
        if self._kept is None or self._kept[0] != mode:
            self._kept = None  # freed before the next is made
            with torch.no_grad():
                self._kept = mode, self.model.encode(self.x, self.edge_index)
        return self._kept[1]

    def embed(self) -> Tensor:
        """Return the node embeddings in the present mode, [nodes, hidden]."""
        return self.encode().nodes

    def __call__(self, pairs: Tensor) -> Tensor:
        """Logits of the pairs, [edges]."""
        return self.model.score(self.encode(), pairs)
