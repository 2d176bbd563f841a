"""Decoder over the element-wise product of a pair's embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from suffice.link.models.dropout import ByteDropout
from suffice.link.models.norms import make_norm


class HadamardMLP(nn.Module):
    """Score z_i ⊙ z_j by a two-layer perceptron whose hidden layer is normalised.

    Args:
        channels: of an embedding.
        hidden: channels of the hidden layer.
        norm: `batch`, `layer`, `graph` or `none`, over the edge batch.
        dropout: share of hidden channels dropped in training.

    """

    def __init__(self, channels: int, hidden: int = 64, norm: str = "batch", dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(self.inputs(channels), hidden)
        self.norm = make_norm(norm, hidden)
        self.dropout = ByteDropout(dropout)
        self.last = nn.Linear(hidden, 1)

    def inputs(self, channels: int) -> int:
        """Return the width of the first layer."""
        return channels

    def combine(self, first: Tensor, second: Tensor) -> Tensor:
        """Return what the perceptron sees of a pair's embeddings, [edges, inputs]."""
        return first * second

    def hidden(self, z: Tensor, pairs: Tensor) -> Tensor:
        """Edge embeddings: the hidden layer, normalised and rectified, [edges, hidden]."""
        return torch.relu(self.norm(self.first(self.combine(z.index_select(0, pairs[0]), z.index_select(0, pairs[1])))))

    def forward(self, z: Tensor, pairs: Tensor) -> Tensor:
        """Logits of the pairs, [edges]."""
        return self.last(self.dropout(self.hidden(z, pairs))).squeeze(-1)
