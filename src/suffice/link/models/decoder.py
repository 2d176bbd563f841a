"""Base classes of all decoders, which compute logits and embeddings of node pairs from node embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from suffice.link.models.dropout import ByteDropout
from suffice.link.models.named_parts import NamedParts
from suffice.link.models.norms import make_norm


class Decoder(nn.Module, ABC):
    """Base class of all decoders; a decoder is registered by `DECODERS.register`.

    Args:
        channels: number of channels of a node embedding.
        hidden: number of channels of the hidden layer.
        norm: normalization over the edge batch: `batch`, `layer`, `graph` or `none`.
        dropout: probability that a hidden channel is dropped in training.

    """

    @abstractmethod
    def __init__(self, channels: int, hidden: int = 64, norm: str = "batch", dropout: float = 0.0) -> None:
        super().__init__()

    @abstractmethod
    def edge_embedding(self, z: Tensor, pairs: Tensor) -> Tensor:
        """Return the input of the last layer for each pair.

        Args:
            z: node embeddings, [nodes, channels].
            pairs: long [2, pairs].

        Returns:
            [pairs, edge channels].

        """

    @abstractmethod
    def forward(self, z: Tensor, pairs: Tensor) -> Tensor:
        """Return logits, [pairs].

        Args:
            z: node embeddings, [nodes, channels].
            pairs: long [2, pairs].

        """


class DecoderMLP(Decoder):
    """Base class of decoders that are a two-layer perceptron whose hidden layer is normalized.

    A subclass defines `combine`, and `in_channels` if the combination is wider than one node embedding.
    """

    def __init__(self, channels: int, hidden: int = 64, norm: str = "batch", dropout: float = 0.0) -> None:
        super().__init__(channels, hidden, norm, dropout)
        self.first = nn.Linear(self.in_channels(channels), hidden)
        self.norm = make_norm(norm, hidden)
        self.dropout = ByteDropout(dropout)
        self.last = nn.Linear(hidden, 1)

    def in_channels(self, channels: int) -> int:
        """Return the number of channels that `combine` returns."""
        return channels

    @abstractmethod
    def combine(self, first: Tensor, second: Tensor) -> Tensor:
        """Combine the node embeddings of pairs.

        Args:
            first: embeddings of the first nodes, [pairs, channels].
            second: embeddings of the second nodes, [pairs, channels].

        Returns:
            Input of the perceptron, [pairs, in_channels].

        """

    def edge_embedding(self, z: Tensor, pairs: Tensor) -> Tensor:
        """Return the hidden layer after normalization and ReLU, [pairs, hidden]."""
        return torch.relu(self.norm(self.first(self.combine(z.index_select(0, pairs[0]), z.index_select(0, pairs[1])))))

    def forward(self, z: Tensor, pairs: Tensor) -> Tensor:
        """Return logits, [pairs]."""
        return self.last(self.dropout(self.edge_embedding(z, pairs))).squeeze(-1)


DECODERS: NamedParts[type[Decoder]] = NamedParts("decoder")


def decoders() -> dict[str, type[Decoder]]:
    """Return every decoder by name."""
    return DECODERS.entries()
