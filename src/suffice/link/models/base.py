"""Base class of all link predictors, which encode the nodes once, and then embed and score any pairs of nodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from suffice.link.sparse.adjacency import Adjacency, as_adjacency


@dataclass(frozen=True)
class Encoding:
    """What a model computes once for a graph and then uses for every pair.

    Args:
        nodes: node embeddings, [nodes, hidden].
        x: features, [nodes, features].
        edge_index: message-passing edges, long [2, edges], or an adjacency.
        pooled: values of the nodes that NCN sums over common neighbors, [nodes, hidden]; None for other models.

    """

    nodes: Tensor
    x: Tensor
    edge_index: Tensor | Adjacency
    pooled: Tensor | None = None

    @property
    def adjacency(self) -> Adjacency:
        """The message-passing edges as an adjacency."""
        return as_adjacency(self.edge_index, self.x.size(0))


class LinkPredictor(nn.Module, ABC):
    """Base class of all link predictors; a model defines `encode` and `edge_embedding`.

    A score depends neither on the order of the two nodes nor on how the nodes are numbered. In eval mode it does not
    depend on the other pairs of the batch, except with GraphNorm, which always mixes rows.
    """

    # Whether the model compares neighborhoods. Training then passes it an `Adjacency`, which caches constant results.
    uses_adjacency: ClassVar[bool] = True
    chunk_size: ClassVar[int] = 2**16  # number of pairs that `score_in_chunks` scores at a time
    encoder: nn.Module
    last: nn.Module

    @property
    def node_modules(self) -> tuple[nn.Module, ...]:
        """The modules that `encode` runs."""
        return (self.encoder,)

    @abstractmethod
    def encode(self, x: Tensor, edge_index: Tensor | Adjacency) -> Encoding:
        """Embed the nodes.

        Args:
            x: features, [nodes, features].
            edge_index: message-passing edges without the pairs that will be scored, long [2, edges], or an adjacency.

        """

    @abstractmethod
    def edge_embedding(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the input of the last layer for each pair.

        Args:
            encoding: what `encode` returned.
            pairs: long [2, pairs].

        Returns:
            [pairs, edge channels].

        """

    def score(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return logits, [pairs].

        Args:
            encoding: what `encode` returned.
            pairs: long [2, pairs].

        """
        return self.last(self.edge_embedding(encoding, pairs)).squeeze(-1)

    def forward(self, x: Tensor, edge_index: Tensor | Adjacency, pairs: Tensor) -> Tensor:
        """Return logits of pairs, [pairs].

        Args:
            x: features, [nodes, features].
            edge_index: message-passing edges without the pairs (see `remove_edges`), long [2, edges], or an adjacency.
            pairs: long [2, pairs].

        """
        return self.score(self.encode(x, edge_index), pairs)

    def training_logits(self, x: Tensor, edge_index: Tensor | Adjacency, pairs: Tensor) -> tuple[Tensor, ...]:
        """Return the logits whose losses are summed in training, each [pairs]; the first tensor holds the scores."""
        return (self(x, edge_index, pairs),)


def check_link_predictor(model: object, otherwise: str) -> None:
    """Raise unless a model is a `LinkPredictor`.

    Args:
        model: what a user passed as model.
        otherwise: what to do with other models.

    Raises:
        TypeError: it is something else.

    """
    if not isinstance(model, LinkPredictor):
        raise TypeError(f"model must be a LinkPredictor of suffice.link, got {type(model).__name__}. {otherwise}")


def mlp_block(in_channels: int, out_channels: int, norm: nn.Module, dropout: nn.Module) -> nn.Sequential:
    """Return a linear layer followed by norm, dropout and ReLU, of which the perceptrons of NCN are made."""
    return nn.Sequential(nn.Linear(in_channels, out_channels), norm, dropout, nn.ReLU())


def score_in_chunks(model: LinkPredictor, encoding: Encoding, pairs: Tensor) -> Tensor:
    """Return logits [pairs] of any number of pairs [2, pairs], `model.chunk_size` pairs at a time."""
    if pairs.size(1) <= model.chunk_size:
        return model.score(encoding, pairs)
    return torch.cat([model.score(encoding, part) for part in pairs.split(model.chunk_size, dim=1)])
