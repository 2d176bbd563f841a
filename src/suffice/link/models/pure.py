"""Encoder with one linear layer and propagation without weights (Wang et al. 2024)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suffice.link.models.encoder import ENCODERS, Encoder
from suffice.link.sparse.adjacency import Adjacency, as_adjacency
from suffice.link.sparse.propagation import propagate


@ENCODERS.register("pure")
class PureGCN(Encoder):
    """A linear layer, then normalized propagation without weights: Σ_k w_k h_k with h_k = norm(Â h_{k-1}).

    NCN's authors use it as encoder. `layers` is the number of propagation steps; `dropout` follows the linear layer.
    """

    has_activation: ClassVar[bool] = False
    accepts_sparse_features: ClassVar[bool] = True

    def create_layers(self, in_channels: int, hidden: int, layers: int) -> None:
        """Create the linear layer and one weight for each propagation step."""
        self.linear = nn.Linear(in_channels, hidden)
        self.weights = nn.Parameter(torch.ones(layers))

    def embed(self, x: Tensor, edge_index: Tensor | Adjacency) -> Tensor:
        """Return node embeddings, [nodes, hidden]."""
        adjacency = as_adjacency(edge_index, x.size(0))
        h = self.dropout(F.linear(x, self.linear.weight, self.linear.bias))
        total = torch.zeros_like(h)
        for norm, weight in zip(self.norms, self.weights, strict=True):
            h = norm(propagate(adjacency, h))
            total = total + weight * h
        return total
