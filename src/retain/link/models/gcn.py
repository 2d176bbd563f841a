"""GCN encoder."""

from __future__ import annotations

from torch import nn
from torch_geometric.nn import GCNConv

from retain.link.models.encoder import Encoder


class GCN(Encoder):
    """Graph convolutional network on PyG's `GCNConv`; takes sparse features (CSR) too."""

    def convolution(self, first: int, second: int) -> nn.Module:
        """Return a `GCNConv`."""
        return GCNConv(first, second)
