"""NCNC: NCN with neighbours of one end counted by how likely they are the other's too (Wang et al. 2024, eq. 11)."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from suffice.link.models.base import Encoding
from suffice.link.models.encoder import Encoder
from suffice.link.models.ncn import NCN, fast_scores
from suffice.link.sparse.adjacency import Adjacency
from suffice.link.sparse.neighbors import common_neighbors, pool, residual_neighbors

_CHUNK = 2**12  # rows of 256 channels that stay in a processor's cache


class NCNC(NCN):
    """NCN whose sum runs over residual neighbours too, each weighted by NCN's own probability of the missing edge.

    The weight of k ∈ N(i) − N(j) is α · p·q / (p·q + 1 − q) with q = σ(scale · (score of (j, k) − offset)). Weights
    are found without gradients, in eval mode: no dropout, and no norm learns from pairs that are not in the batch.

    Args:
        encoder: of the nodes.
        norm: over pairs.
        node_norm: over nodes.
        dropout: share of channels dropped in the perceptrons.
        two_layers: whether lin has a second hidden layer.
        alpha: largest weight of a residual neighbour.
        scale: of its logit.
        offset: of its logit.
        prior: p.

    """

    def __init__(
        self,
        encoder: Encoder,
        norm: str = "layer",
        node_norm: str = "layer",
        dropout: float = 0.0,
        *,
        two_layers: bool = False,
        alpha: float = 1.0,
        scale: float = 5.0,
        offset: float = 3.0,
        prior: float = 0.5,
    ) -> None:
        super().__init__(encoder, norm, node_norm, dropout, two_layers=two_layers)
        self.alpha, self.scale, self.offset, self.prior = alpha, scale, offset, prior

    def pooled(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the sum over common and, weighted, residual neighbours, [edges, hidden]."""
        assert encoding.pooled is not None
        total = super().pooled(encoding, pairs)
        sides = residual_neighbors(encoding.graph, pairs)
        missing = [torch.stack([pairs[1 - side][part.owner], part.node]) for side, part in enumerate(sides)]
        weights = self._weights(encoding, torch.cat(missing, dim=1)).split([part.size(1) for part in missing])
        for part, weight in zip(sides, weights, strict=True):
            total = total + pool(encoding.pooled, part, weight)
        return total

    @torch.no_grad()
    def _weights(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        graph: Adjacency = encoding.graph
        assert encoding.pooled is not None
        # The score is symmetric, and hubs bring the same pair many times.
        low, high = pairs.min(dim=0).values, pairs.max(dim=0).values
        codes, place = torch.unique(low * graph.num_nodes + high, return_inverse=True)
        low = torch.div(codes, max(graph.num_nodes, 1), rounding_mode="floor")
        ends = torch.stack([low, codes - low * graph.num_nodes])
        layer = self.common_mlp[0]
        assert isinstance(layer, nn.Linear)
        with _evaluating(self):
            first = encoding.pooled @ layer.weight.T
            parts = [
                fast_scores(self, encoding, first, part, common_neighbors(graph, part))
                for part in ends.split(_CHUNK, dim=1)
            ]
        q = torch.sigmoid(self.scale * (torch.cat(parts) - self.offset)) if parts else first.new_zeros(0)
        return (self.alpha * self.prior * q / (self.prior * q + 1 - q))[place]


@contextmanager
def _evaluating(module: nn.Module) -> Generator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
