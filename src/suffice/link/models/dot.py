"""Dot-product decoder."""

from __future__ import annotations

from torch import Tensor, nn


class Dot(nn.Module):
    """Score a pair by the dot product of its ends' embeddings; there is nothing to normalise.

    Args:
        channels: of an embedding.
        norm: accepted for the sake of one signature for all decoders.

    """

    def __init__(self, channels: int, hidden: int = 64, norm: str = "none", dropout: float = 0.0) -> None:
        super().__init__()
        self.channels = channels

    def hidden(self, z: Tensor, pairs: Tensor) -> Tensor:
        """Edge embeddings z_i ⊙ z_j, [edges, channels]."""
        return z[pairs[0]] * z[pairs[1]]

    def forward(self, z: Tensor, pairs: Tensor) -> Tensor:
        """Logits of the pairs, [edges]."""
        return self.hidden(z, pairs).sum(dim=-1)
