"""What all encoders share: convolutions over the message edges, each but the last followed by its norm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise

import torch
from torch import Tensor, nn

from suffice.link.models.dropout import ByteDropout, drop_features
from suffice.link.models.norms import make_norm
from suffice.link.sparse.adjacency import Adjacency


class Encoder(nn.Module, ABC):
    """Base of all encoders; a new one defines `convolution`.

    Args:
        in_channels: features of a node.
        hidden: channels of every layer, and of the embedding.
        layers: number of convolutions.
        norm: `batch`, `layer`, `graph` or `none`, over nodes.
        dropout: share of channels dropped in training.
        input_dropout: share of features dropped in training.
        output_dropout: share of the embedding's channels dropped in training.
        linear: leave out the ReLU between layers.

    """

    def __init__(
        self,
        in_channels: int,
        hidden: int = 64,
        layers: int = 2,
        norm: str = "batch",
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        output_dropout: float = 0.0,
        *,
        linear: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers is {layers}; accepted: at least 1")
        sizes = [in_channels] + [hidden] * layers
        self.out_channels = hidden
        self.convolutions = nn.ModuleList(self.convolution(first, second) for first, second in pairwise(sizes))
        self.norms = nn.ModuleList(make_norm(norm, hidden) for _ in range(layers))
        self.dropout = ByteDropout(dropout)
        self.input_dropout = ByteDropout(input_dropout)
        self.output_dropout = ByteDropout(output_dropout)
        self.linear = linear

    @abstractmethod
    def convolution(self, first: int, second: int) -> nn.Module:
        """Return one layer from `first` to `second` channels."""

    def convolve(self, convolution: nn.Module, x: Tensor, messages: Tensor | Adjacency) -> Tensor:
        """Run one layer."""
        return convolution(x, messages.edge_index if isinstance(messages, Adjacency) else messages)

    def forward(self, x: Tensor, edge_index: Tensor | Adjacency) -> Tensor:
        """Embed the nodes.

        Args:
            x: [nodes, in_channels].
            edge_index: edges that messages pass over, both directions, [2, edges], or a message graph.

        Returns:
            [nodes, hidden].

        """
        last = len(self.convolutions) - 1
        x = drop_features(self.input_dropout, x)
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = norm(self.convolve(convolution, x, edge_index))
            if number < last:
                x = self.dropout(x if self.linear else torch.relu(x))
        return self.output_dropout(x)
