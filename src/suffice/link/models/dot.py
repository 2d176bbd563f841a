"""Dot-product decoder."""

from __future__ import annotations

from torch import Tensor

from suffice.link.models.decoder import DECODERS, Decoder


@DECODERS.register("dot")
class Dot(Decoder):
    """Score a pair by the dot product z_i · z_j of its node embeddings.

    The decoder has no parameters; `hidden`, `norm` and `dropout` have no effect.

    Args:
        channels: number of channels of a node embedding.

    """

    def __init__(self, channels: int, hidden: int = 64, norm: str = "none", dropout: float = 0.0) -> None:
        super().__init__(channels, hidden, norm, dropout)

    def edge_embedding(self, z: Tensor, pairs: Tensor) -> Tensor:
        """Return z_i ⊙ z_j, [pairs, channels]."""
        return z[pairs[0]] * z[pairs[1]]

    def forward(self, z: Tensor, pairs: Tensor) -> Tensor:
        """Return logits, [pairs]."""
        return self.edge_embedding(z, pairs).sum(dim=-1)
