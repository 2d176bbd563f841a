"""Scoring of pairs on a fixed graph, and masking of the pairs that are to be scored."""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.link.models.base import Encoding, PairModel
from suffice.link.sparse.adjacency import MessageGraph, as_messages


class PairScorer:
    """Score pairs on a fixed graph with nothing but the pairs as argument, as an audit wants it.

    Nodes are embedded when the mode of what embeds them changes, since they don't depend on the pairs; one embedding
    is kept. Make a new scorer after the parameters changed.

    Args:
        model: what to score with.
        x: features, [nodes, features].
        edge_index: edges that messages pass over, [2, edges].

    """

    def __init__(self, model: PairModel, x: Tensor, edge_index: Tensor | MessageGraph) -> None:
        self.model = model
        self.x = x
        self.edge_index = as_messages(edge_index, x.size(0)) if model.structural else edge_index
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


def mask_targets(edge_index: Tensor, pairs: Tensor, num_nodes: int) -> Tensor:
    """Return the message edges without the pairs that are to be scored, in either direction.

    Args:
        edge_index: [2, edges].
        pairs: [2, targets].
        num_nodes: nodes of the graph.

    """
    targets = torch.cat([pairs[0] * num_nodes + pairs[1], pairs[1] * num_nodes + pairs[0]])
    return edge_index[:, ~torch.isin(edge_index[0] * num_nodes + edge_index[1], targets)]
