"""GCN encoder."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch_geometric.nn import GCNConv

from suffice.link.models.encoder import Encoder
from suffice.link.sparse.adjacency import Adjacency
from suffice.link.sparse.propagation import propagate


class GCN(Encoder):
    """Graph convolutional network on PyG's `GCNConv`; takes sparse features (CSR) too."""

    def convolution(self, first: int, second: int) -> nn.Module:
        """Return a `GCNConv`."""
        return GCNConv(first, second)

    def convolve(self, convolution: nn.Module, x: Tensor, messages: Tensor | Adjacency) -> Tensor:
        """Run one layer; over a message graph without PyG's tensor of messages."""
        if not isinstance(messages, Adjacency):
            return super().convolve(convolution, x, messages)
        layer = cast(GCNConv, convolution)
        return propagate(messages, layer.lin(x)) + layer.bias
