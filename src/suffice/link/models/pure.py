"""Encoder of one linear layer and weightless propagation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suffice.link.models.dropout import ByteDropout, drop_features
from suffice.link.models.encoder import Encoder
from suffice.link.models.norms import make_norm
from suffice.link.sparse.adjacency import Adjacency, as_adjacency
from suffice.link.sparse.propagation import propagate


class PureGCN(Encoder):
    """A linear layer, then normalised propagation without weights, its steps added up (as NCN's authors train it).

    Args:
        in_channels: features of a node.
        hidden: channels of every layer, and of the embedding.
        layers: steps of propagation.
        norm: `batch`, `layer`, `graph` or `none`, over nodes, after every step.
        dropout: share of channels dropped in training.
        input_dropout: share of features dropped in training.
        output_dropout: share of the embedding's channels dropped in training.

    """

    def __init__(
        self,
        in_channels: int,
        hidden: int = 64,
        layers: int = 1,
        norm: str = "none",
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        output_dropout: float = 0.0,
    ) -> None:
        nn.Module.__init__(self)
        if layers < 1:
            raise ValueError(f"layers is {layers}; accepted: at least 1")
        self.out_channels = hidden
        self.input_dropout = ByteDropout(input_dropout)
        self.linear = nn.Linear(in_channels, hidden)
        self.dropout = ByteDropout(dropout)
        self.output_dropout = ByteDropout(output_dropout)
        self.norms = nn.ModuleList(make_norm(norm, hidden) for _ in range(layers))
        self.weights = nn.Parameter(torch.ones(layers))

    def convolution(self, first: int, second: int) -> nn.Module:
        """There are no weights between steps."""
        return nn.Identity()

    def forward(self, x: Tensor, edge_index: Tensor | Adjacency) -> Tensor:
        """Embed the nodes: [nodes, hidden]."""
        graph = as_adjacency(edge_index, x.size(0))
        h = self.dropout(F.linear(drop_features(self.input_dropout, x), self.linear.weight, self.linear.bias))
        total = torch.zeros_like(h)
        for norm, weight in zip(self.norms, self.weights, strict=True):
            h = norm(propagate(graph, h))
            total = total + weight * h
        return self.output_dropout(total)
