"""Base classes of ELPH and BUDDY, which combine sketched counts of nodes by distance with products of embeddings."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from suffice.link.models.base import Encoding, LinkPredictor
from suffice.link.models.dropout import ByteDropout
from suffice.link.models.norms import make_norm
from suffice.link.models.registry import PublishedTraining
from suffice.link.sparse.adjacency import Adjacency
from suffice.link.sparse.count_cache import CountCache

# From the commands of melifluos/subgraph-sketching. The batch size counts positives and negatives, as here.
PUBLISHED_TRAINING = PublishedTraining(learning_rate=1e-4, batch_size=1024)


class SketchHead(nn.Module):
    """Two hidden layers: one for the counts of nodes by distance, and one for the products of node embeddings.

    Args:
        hops: radius k of the sketched neighborhoods, which have k(k + 2) counts.
        hidden: number of channels of the node embeddings.
        norm: normalization over pairs: `batch`, `layer`, `graph` or `none`.
        dropout: probability that a channel is dropped.

    """

    def __init__(self, hops: int, hidden: int, norm: str, dropout: float) -> None:
        super().__init__()
        self.hops = hops
        counts = hops * (hops + 2)
        self.out_channels = counts + hidden
        self.count_mlp = nn.Sequential(nn.Linear(counts, counts), make_norm(norm, counts), nn.ReLU())
        self.product_mlp = nn.Sequential(nn.Linear(hidden, hidden), make_norm(norm, hidden), nn.ReLU(inplace=True))
        self.dropout = ByteDropout(dropout)

    def forward(self, adjacency: Adjacency, pairs: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden layers, [pairs, k(k + 2)] and [pairs, hidden].

        Args:
            adjacency: graph or a view of it. The base graph is sketched once; a pair that is one of its edges is
                counted without this edge.
            pairs: long [2, pairs].
            product: products of node embeddings, [pairs, hidden].

        """
        # In eval mode the same pairs are scored after every epoch: their counts are cached.
        counts = count_cache(adjacency.base, self.hops).counts(pairs, reuse=not self.training).to(product.dtype)
        return self.dropout(self.count_mlp(counts)), self.dropout(self.product_mlp(product))


class SketchModel(LinkPredictor):
    """Base class of ELPH and BUDDY; a model defines `encode` and `product`."""

    head: SketchHead
    chunk_size: ClassVar[int] = 2**10

    @abstractmethod
    def product(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the products of the node embeddings of pairs [2, pairs]: [pairs, hidden]."""

    def edge_embedding(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the concatenated hidden layers, [pairs, k(k + 2) + hidden]."""
        return torch.cat(self.head(encoding.adjacency, pairs, self.product(encoding, pairs)), dim=1)

    def score(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return logits, [pairs]."""
        return self.score_product(encoding.adjacency, pairs, self.product(encoding, pairs))

    def score_product(self, adjacency: Adjacency, pairs: Tensor, product: Tensor) -> Tensor:
        """Return logits [pairs] of pairs [2, pairs] with products [pairs, hidden]."""
        counts, products = self.head(adjacency, pairs, product)
        # The last layer is applied to each hidden layer, which avoids copying both into one tensor.
        assert isinstance(self.last, nn.Linear)
        weight = self.last.weight[0]
        return counts @ weight[: counts.size(1)] + products @ weight[counts.size(1) :] + self.last.bias


def count_cache(graph: Adjacency, hops: int) -> CountCache:
    """Return the cache of the sketches and counts of a graph, which is created on the first call."""
    return graph.memoize(f"counts of {hops} hops", lambda: CountCache(graph, hops))


def check_hops(hops: int) -> None:
    """Raise unless neighborhoods of this many hops can be sketched.

    Raises:
        ValueError: `hops` is not 1, 2 or 3.

    """
    if not 1 <= hops <= 3:
        raise ValueError(f"hops must be 1, 2 or 3, got {hops!r}")
