"""Decoder over a pair's embeddings side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.link.models.hadamard import HadamardMLP


class ConcatMLP(HadamardMLP):
    """Score (z_i, z_j) by a two-layer perceptron; smaller id first, as everywhere in this package."""

    def inputs(self, channels: int) -> int:
        """Return the width of the first layer."""
        return 2 * channels

    def combine(self, first: Tensor, second: Tensor) -> Tensor:
        """Return both embeddings, [edges, 2·channels]."""
        return torch.cat([first, second], dim=-1)
