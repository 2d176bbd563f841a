"""What ELPH and BUDDY share: counts by distance from sketches, beside the product of the ends' features."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from suffice.link.models.base import Encoding, LinkPredictor
from suffice.link.models.dropout import ByteDropout
from suffice.link.models.norms import make_norm
from suffice.link.sparse.adjacency import Adjacency
from suffice.link.sparse.count_cache import CountMemory


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
        self.product_mlp = nn.Sequential(nn.Linear(hidden, hidden), make_norm(norm, hidden), nn.ReLU(inplace=True))
        self.dropout = ByteDropout(dropout)

    def forward(self, graph: Adjacency, pairs: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden layers, [edges, k(k + 2)] and [edges, hidden].

        Args:
            graph: whose base is sketched, once; a pair's own edge is not counted.
            pairs: long [2, edges].
            product: of the ends' features, [edges, hidden].

        """
        # In eval mode the same pairs are scored after every epoch.
        counts = memory(graph.base, self.hops).counts(pairs, again=not self.training).to(product.dtype)
        return self.dropout(self.count_mlp(counts)), self.dropout(self.product_mlp(product))


class SketchModel(LinkPredictor):
    """Base of models of counts and products; a new one defines `encode` and `product`."""

    head: SketchHead
    chunk = 2**10

    @abstractmethod
    def product(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the product of the features of pairs' ends, [edges, hidden]."""

    def edge_embedding(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the hidden layers side by side, [edges, k(k + 2) + hidden]."""
        return torch.cat(self.head(encoding.graph, pairs, self.product(encoding, pairs)), dim=1)

    def score(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return logits of pairs [2, edges]: [edges]."""
        return self.join(encoding.graph, pairs, self.product(encoding, pairs))

    def join(self, graph: Adjacency, pairs: Tensor, product: Tensor) -> Tensor:
        """Return the logits of pairs from the product of their ends' features, [edges]."""
        counts, products = self.head(graph, pairs, product)
        # The last layer over both hidden ones, which needn't be copied side by side for it.
        assert isinstance(self.last, nn.Linear)
        weight = self.last.weight[0]
        return counts @ weight[: counts.size(1)] + products @ weight[counts.size(1) :] + self.last.bias


def memory(graph: Adjacency, hops: int) -> CountMemory:
    """Return a graph's sketches and the counts made of them so far."""
    return graph.remember(f"counts of {hops} hops", lambda: CountMemory(graph, hops))
