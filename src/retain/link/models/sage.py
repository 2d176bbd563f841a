"""GraphSAGE encoder."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch_geometric.nn import SAGEConv

from retain.link.messages import MessageGraph
from retain.link.models.encoder import Encoder
from retain.link.propagation import neighbor_mean


class GraphSAGE(Encoder):
    """GraphSAGE on PyG's `SAGEConv` with mean aggregation."""

    def convolution(self, first: int, second: int) -> nn.Module:
        """Return a `SAGEConv`."""
        return SAGEConv(first, second)

    def convolve(self, convolution: nn.Module, x: Tensor, messages: Tensor | MessageGraph) -> Tensor:
        """Run one layer; over a message graph without PyG's tensor of messages."""
        if not isinstance(messages, MessageGraph):
            return super().convolve(convolution, x, messages)
        layer = cast(SAGEConv, convolution)
        # A mean of rows and a product with each may change places: the narrower side is averaged.
        if layer.lin_l.out_channels < layer.lin_l.in_channels:
            near = neighbor_mean(messages, x @ layer.lin_l.weight.T)
        else:
            near = neighbor_mean(messages, x) @ layer.lin_l.weight.T
        return near + layer.lin_l.bias + layer.lin_r(x)
