"""GraphSAGE encoder (Hamilton et al. 2017)."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import SAGEConv

from suffice.link.models.encoder import ENCODERS, ConvolutionalEncoder
from suffice.link.sparse.adjacency import Adjacency, as_adjacency
from suffice.link.sparse.propagation import neighbor_mean


@ENCODERS.register("sage")
class GraphSAGE(ConvolutionalEncoder):
    """GraphSAGE with PyG's `SAGEConv` and mean aggregation."""

    accepts_sparse_features: ClassVar[bool] = True

    def create_convolution(self, in_channels: int, out_channels: int) -> nn.Module:
        """Return a `SAGEConv`."""
        return SAGEConv(in_channels, out_channels)

    def convolve(self, convolution: nn.Module, x: Tensor, edge_index: Tensor | Adjacency) -> Tensor:
        """Apply one convolution; given an `Adjacency` or sparse features, without PyG's tensor of messages."""
        is_sparse = x.layout == torch.sparse_csr
        if not (is_sparse or isinstance(edge_index, Adjacency)):
            return super().convolve(convolution, x, edge_index)
        layer = cast(SAGEConv, convolution)
        adjacency = as_adjacency(edge_index, x.size(0))
        # The mean over neighbors and the linear map commute: average on the side with fewer channels.
        if is_sparse or layer.lin_l.out_channels < layer.lin_l.in_channels:
            neighbors, own = F.linear(x, torch.cat([layer.lin_l.weight, layer.lin_r.weight])).chunk(2, dim=1)
            neighbors = neighbor_mean(adjacency, neighbors.contiguous())
        else:
            neighbors, own = neighbor_mean(adjacency, x) @ layer.lin_l.weight.T, layer.lin_r(x)
        return neighbors + layer.lin_l.bias + own
