"""Scoring of pairs on a fixed graph by a function of the pairs alone."""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.link.models.base import Encoding, LinkPredictor
from suffice.link.sparse.adjacency import Adjacency, as_adjacency


class PairScorer:
    """Score pairs on a fixed graph; a callable whose only argument is the pairs, as `audit` requires.

    The nodes are embedded on the first call, and again after a module that embeds them has changed between training
    and eval mode. Create a new scorer when the parameters of the model have changed.

    Args:
        model: scores the pairs.
        x: features, [nodes, features].
        edge_index: message-passing edges, long [2, edges], or an adjacency.

    """

    def __init__(self, model: LinkPredictor, x: Tensor, edge_index: Tensor | Adjacency) -> None:
        self.model = model
        self.x = x
        self.edge_index = as_adjacency(edge_index, x.size(0)) if model.uses_adjacency else edge_index
        self._cached: tuple[tuple[bool, ...], Encoding] | None = None

    def encode(self) -> Encoding:
        """Return the encoding of the graph in the current mode of the modules that compute it."""
        mode = tuple(module.training for part in self.model.node_modules for module in part.modules())
        if self._cached is None or self._cached[0] != mode:
            self._cached = None  # free the old encoding before the new one is computed
            with torch.no_grad():
                self._cached = mode, self.model.encode(self.x, self.edge_index)
        return self._cached[1]

    def embed(self) -> Tensor:
        """Return the node embeddings in the current mode, [nodes, hidden]."""
        return self.encode().nodes

    def __call__(self, pairs: Tensor) -> Tensor:
        """Return logits [pairs] of pairs [2, pairs]."""
        return self.model.score(self.encode(), pairs)
