"""Decoder over the element-wise product of the node embeddings of a pair."""

from __future__ import annotations

from torch import Tensor

from suffice.link.models.decoder import DECODERS, DecoderMLP


@DECODERS.register("hadamard")
class HadamardMLP(DecoderMLP):
    """Score z_i ⊙ z_j by a two-layer perceptron."""

    def combine(self, first: Tensor, second: Tensor) -> Tensor:
        """Return z_i ⊙ z_j, [pairs, channels]."""
        return first * second
