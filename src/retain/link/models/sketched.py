"""What ELPH and BUDDY share: counts by distance from sketches, beside the product of the ends' features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retain.link.counts import pair_counts
from retain.link.messages import MessageGraph
from retain.link.models.dropout import ByteDropout
from retain.link.models.norms import make_norm
from retain.link.sketches import sketch


class SketchHead(nn.Module):
    """Two hidden layers side by side, over counts by distance and over products of features.

    Args:
        hops: k; there are k(k + 2) counts.
        hidden: channels of the ends' features.
        norm: over pairs: `batch`, `layer`, `graph` or `none`.
        dropout: share of channels dropped.

    """

    def __init__(self, hops: int, hidden: int, norm: str, dropout: float) -> None:
        super().__init__()
        self.hops = hops
        counts = hops * (hops + 2)
        self.out_channels = counts + hidden
        self.count_mlp = nn.Sequential(nn.Linear(counts, counts), make_norm(norm, counts), nn.ReLU())
        self.product_mlp = nn.Sequential(nn.Linear(hidden, hidden), make_norm(norm, hidden), nn.ReLU())
        self.dropout = ByteDropout(dropout)

    def forward(self, graph: MessageGraph, pairs: Tensor, product: Tensor) -> Tensor:
        """Return the hidden layers side by side, [edges, k(k + 2) + hidden].

        Args:
            graph: whose base is sketched, once; a pair's own edge is not counted.
            pairs: long [2, edges].
            product: of the ends' features, [edges, hidden].

        """
        base = graph.base
        sketches = base.remember(f"sketches of {self.hops} hops", lambda: sketch(base, self.hops))
        counts = symmetric(pair_counts(base, sketches, pairs), self.hops).to(product.dtype)
        return self.dropout(torch.cat([self.count_mlp(counts), self.product_mlp(product)], dim=1))


def symmetric(counts: Tensor, hops: int) -> Tensor:
    """Return counts that don't depend on which end comes first: of mirrored ones the larger and the smaller.

    Args:
        counts: as `pair_counts` returns them, [edges, k(k + 2)].
        hops: k.

    """
    grid = counts[:, : hops * hops].reshape(-1, hops, hops)
    large, small = torch.maximum(grid, grid.mT), torch.minimum(grid, grid.mT)
    both = large.triu() + small.tril(-1)
    one, other = counts[:, hops * hops :].chunk(2, dim=1)
    return torch.cat([both.flatten(1), torch.maximum(one, other), torch.minimum(one, other)], dim=1)
