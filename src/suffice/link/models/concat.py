"""Decoder over the concatenated node embeddings of a pair."""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.link.models.decoder import DECODERS, DecoderMLP


@DECODERS.register("concat")
class ConcatMLP(DecoderMLP):
    """Score the concatenation (z_i, z_j) by a two-layer perceptron.

    The score depends on the order of the two nodes. Everywhere in this package, the smaller node id comes first.
    """

    def in_channels(self, channels: int) -> int:
        """Return the number of channels of the concatenation."""
        return 2 * channels

    def combine(self, first: Tensor, second: Tensor) -> Tensor:
        """Return (z_i, z_j), [pairs, 2·channels]."""
        return torch.cat([first, second], dim=-1)
