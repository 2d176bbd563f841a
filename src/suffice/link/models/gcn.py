"""GCN encoder (Kipf & Welling 2017)."""

from __future__ import annotations

from typing import ClassVar, cast

from torch import Tensor, nn
from torch_geometric.nn import GCNConv

from suffice.link.models.encoder import ENCODERS, ConvolutionalEncoder
from suffice.link.sparse.adjacency import Adjacency
from suffice.link.sparse.propagation import propagate


@ENCODERS.register("gcn")
class GCN(ConvolutionalEncoder):
    """Graph convolutional network with PyG's `GCNConv`."""

    accepts_sparse_features: ClassVar[bool] = True

    def create_convolution(self, in_channels: int, out_channels: int) -> nn.Module:
        """Return a `GCNConv`."""
        return GCNConv(in_channels, out_channels)

    def convolve(self, convolution: nn.Module, x: Tensor, edge_index: Tensor | Adjacency) -> Tensor:
        """Apply one convolution; given an `Adjacency`, without PyG's tensor of messages [edges, channels]."""
        if not isinstance(edge_index, Adjacency):
            return super().convolve(convolution, x, edge_index)
        layer = cast(GCNConv, convolution)
        return propagate(edge_index, layer.lin(x)) + layer.bias
