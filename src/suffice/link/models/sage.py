"""GraphSAGE encoder."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import SAGEConv

from suffice.link.models.encoder import Encoder
from suffice.link.sparse.adjacency import Adjacency, as_adjacency
from suffice.link.sparse.propagation import neighbor_mean


class GraphSAGE(Encoder):
    """GraphSAGE on PyG's `SAGEConv` with mean aggregation; takes sparse features (CSR) too."""

    def convolution(self, first: int, second: int) -> nn.Module:
        """Return a `SAGEConv`."""
        return SAGEConv(first, second)

    def convolve(self, convolution: nn.Module, x: Tensor, messages: Tensor | Adjacency) -> Tensor:
        """Run one layer; over a message graph, or of sparse features, without PyG's tensor of messages."""
        sparse = x.layout == torch.sparse_csr
        if not (sparse or isinstance(messages, Adjacency)):
            return super().convolve(convolution, x, messages)
        layer = cast(SAGEConv, convolution)
        graph = as_adjacency(messages, x.size(0))
        # A mean of rows and a product with each may change places: the narrower side is averaged.
        if sparse or layer.lin_l.out_channels < layer.lin_l.in_channels:
            near, own = F.linear(x, torch.cat([layer.lin_l.weight, layer.lin_r.weight])).chunk(2, dim=1)
            near = neighbor_mean(graph, near.contiguous())
        else:
            near, own = neighbor_mean(graph, x) @ layer.lin_l.weight.T, layer.lin_r(x)
        return near + layer.lin_l.bias + own
