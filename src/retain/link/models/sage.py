"""GraphSAGE encoder."""

from __future__ import annotations

from torch import nn
from torch_geometric.nn import SAGEConv

from retain.link.models.encoder import Encoder


class GraphSAGE(Encoder):
    """GraphSAGE on PyG's `SAGEConv` with mean aggregation."""

    def convolution(self, first: int, second: int) -> nn.Module:
        """Return a `SAGEConv`."""
        return SAGEConv(first, second)
