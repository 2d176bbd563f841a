"""What all models of pairs share: encode the nodes once, then embed and score any pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from suffice.link.sparse.adjacency import Adjacency, as_adjacency


@dataclass(frozen=True)
class Encoding:
    """What a model keeps of a graph while it scores pairs on it.

    Args:
        nodes: embeddings, [nodes, hidden].
        x: features, [nodes, features].
        messages: edges that messages pass over.
        pooled: what is summed over neighbours if that is not `nodes`, [nodes, hidden].

    """

    nodes: Tensor
    x: Tensor
    messages: Tensor | Adjacency
    pooled: Tensor | None = None

    @property
    def graph(self) -> Adjacency:
        """The messages in compressed rows."""
        return as_adjacency(self.messages, self.x.size(0))


class LinkPredictor(nn.Module, ABC):
    """Base of all link predictors: `encode`, `edge_embedding` and `score`.

    Scores don't depend on the order of a pair's ends, on how nodes are numbered, or, in eval mode, on what else is
    scored (GraphNorm apart, which always mixes rows).
    """

    # Whether the model looks at neighbourhoods: such a model is given a `Adjacency`, which keeps what is constant.
    uses_adjacency: ClassVar[bool] = True
    chunk: ClassVar[int] = 2**16  # pairs that are scored at a time where there are many
    encoder: nn.Module
    last: nn.Module

    @property
    def node_modules(self) -> tuple[nn.Module, ...]:
        """What `encode` runs."""
        return (self.encoder,)

    @abstractmethod
    def encode(self, x: Tensor, messages: Tensor | Adjacency) -> Encoding:
        """Embed the nodes.

        Args:
            x: features, [nodes, features].
            messages: edges that messages pass over, without the pairs that are to be scored.

        """

    @abstractmethod
    def edge_embedding(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return what the last layer sees of pairs [2, edges]: [edges, channels]."""

    def score(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return logits of pairs [2, edges]: [edges]."""
        return self.last(self.edge_embedding(encoding, pairs)).squeeze(-1)

    def forward(self, x: Tensor, edge_index: Tensor | Adjacency, pairs: Tensor) -> Tensor:
        """Score pairs.

        Args:
            x: features, [nodes, features].
            edge_index: edges that messages pass over, without the pairs themselves (see `remove_edges`).
            pairs: [2, edges].

        Returns:
            Logits, [edges].

        """
        return self.score(self.encode(x, edge_index), pairs)

    def training_logits(self, x: Tensor, edge_index: Tensor | Adjacency, pairs: Tensor) -> tuple[Tensor, ...]:
        """Return logits whose losses are summed in training; the first are the model's scores."""
        return (self(x, edge_index, pairs),)


def dense_block(channels: int, hidden: int, norm: nn.Module, dropout: nn.Module) -> nn.Sequential:
    """Return linear, norm, dropout and ReLU, the step that the perceptrons of NCN and Neo-GNN are made of."""
    return nn.Sequential(nn.Linear(channels, hidden), norm, dropout, nn.ReLU())


def score_in_chunks(model: LinkPredictor, encoding: Encoding, pairs: Tensor) -> Tensor:
    """Score many pairs, as many at a time as suits the model: [edges]."""
    if pairs.size(1) <= model.chunk:
        return model.score(encoding, pairs)
    return torch.cat([model.score(encoding, part) for part in pairs.split(model.chunk, dim=1)])
