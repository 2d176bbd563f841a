"""Models of the zoo that score triples (head, relation, tail), and a knowledge graph for them.

A model is called as `model(pairs, graph, relation)`: heads and tails [2, triples], a graph that is not used, and
relations [triples].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from suffice.link.data.synthetic import block_model
from suffice.link.sparse.adjacency import Adjacency


def knowledge_graph(nodes: int = 500, classes: int = 5, degree: float = 40.0) -> tuple[Tensor, Tensor, int]:
    """Return heads and tails [2, triples], relations [triples], and the number of relations.

    A block model whose edges have a random direction; the relation of an edge is given by the classes of both nodes, so
    that only some nodes are plausible heads or tails of a relation, as in other knowledge graphs.
    """
    graph = block_model(nodes, classes, degree, edge_signal=0.5)
    assert graph.y is not None
    swap = torch.rand(graph.edges.size(1), generator=torch.Generator().manual_seed(0)) < 0.5
    pairs = torch.where(swap, graph.edges.flip(0), graph.edges)
    return pairs, graph.y[pairs[0]] * classes + graph.y[pairs[1]], classes**2


def corrupt(pairs: Tensor, num_nodes: int, generator: torch.Generator) -> Tensor:
    """Replace the heads of the first half of triples, and the tails of the second half, by random other entities."""
    count = pairs.size(1)
    replaced = pairs.clone()
    side = (torch.arange(count) >= count // 2).long()
    old = pairs[side, torch.arange(count)]
    new = torch.randint(num_nodes - 1, (count,), generator=generator)
    replaced[side, torch.arange(count)] = new + (new >= old)
    return replaced


class TripleModel(nn.Module):
    """Base class: the product of a function of the embeddings of head and relation with that of the tail.

    Args:
        entities: number of entities.
        relations: number of relations.
        dim: dimension of embeddings.

    """

    def __init__(self, entities: int, relations: int, dim: int = 32) -> None:
        super().__init__()
        self.dim = dim
        self.entities, self.relations = nn.Embedding(entities, dim), nn.Embedding(relations, dim)
        for embedding in (self.entities, self.relations):
            nn.init.xavier_normal_(embedding.weight)

    def forward(self, pairs: Tensor, graph: Adjacency | None, relation: Tensor) -> Tensor:
        """Return logits, [triples]."""
        head, tail = self.entities(pairs[0]), self.entities(pairs[1])
        return (self.predict_tail(head, self.relations(relation)) * tail).sum(dim=1) + self.tail_bias(pairs[1])

    def predict_tail(self, head: Tensor, relation: Tensor) -> Tensor:
        """Return what the embedding of the tail is compared with, [triples, dim]."""
        raise NotImplementedError

    def tail_bias(self, tail: Tensor) -> Tensor | float:
        """Return a term of each tail."""
        return 0.0


class ConvE(TripleModel):
    """ConvE: a convolution over head and relation as an image, with BatchNorm before, after, and after a linear map."""

    def __init__(self, entities: int, relations: int, dim: int = 32, channels: int = 16) -> None:
        super().__init__(entities, relations, dim)
        self.height = 4
        self.bias = nn.Embedding(entities, 1)
        nn.init.zeros_(self.bias.weight)
        self.before, self.convolution = nn.BatchNorm2d(1), nn.Conv2d(1, channels, 3)
        self.after = nn.BatchNorm2d(channels)
        self.drop_input, self.drop_map, self.drop_output = nn.Dropout(0.2), nn.Dropout2d(0.2), nn.Dropout(0.3)
        self.linear = nn.Linear(channels * (2 * self.height - 2) * (dim // self.height - 2), dim)
        self.last_norm = nn.BatchNorm1d(dim)

    def predict_tail(self, head: Tensor, relation: Tensor) -> Tensor:
        image = torch.cat([part.view(-1, 1, self.height, self.dim // self.height) for part in (head, relation)], dim=2)
        h = self.convolution(self.drop_input(self.before(image)))
        h = self.linear(self.drop_map(self.after(h).relu()).flatten(1))
        return self.last_norm(self.drop_output(h)).relu()

    def tail_bias(self, tail: Tensor) -> Tensor:
        return self.bias(tail).squeeze(-1)


class ERMLPE(TripleModel):
    """ER-MLP (E): a perceptron over head and relation with BatchNorm after both of its layers."""

    def __init__(self, entities: int, relations: int, dim: int = 32, hidden: int = 64) -> None:
        super().__init__(entities, relations, dim)
        self.perceptron = nn.Sequential(
            *(nn.Dropout(0.2), nn.Linear(2 * dim, hidden), nn.Dropout(0.2), nn.BatchNorm1d(hidden), nn.ReLU()),
            *(nn.Linear(hidden, dim), nn.Dropout(0.2), nn.BatchNorm1d(dim), nn.ReLU()),
        )

    def predict_tail(self, head: Tensor, relation: Tensor) -> Tensor:
        return self.perceptron(torch.cat([head, relation], dim=1))


class TuckER(TripleModel):
    """TuckER: BatchNorm of the head, a core tensor, and BatchNorm of its product with head and relation."""

    def __init__(self, entities: int, relations: int, dim: int = 32) -> None:
        super().__init__(entities, relations, dim)
        self.core = nn.Parameter(torch.empty(dim, dim, dim).uniform_(-1, 1))
        self.head_norm, self.product_norm = nn.BatchNorm1d(dim), nn.BatchNorm1d(dim)
        self.drop_head, self.drop_core, self.drop_product = nn.Dropout(0.3), nn.Dropout(0.4), nn.Dropout(0.5)

    def predict_tail(self, head: Tensor, relation: Tensor) -> Tensor:
        matrix = self.drop_core(torch.einsum("br,hrt->bht", relation, self.core))
        product = torch.einsum("bh,bht->bt", self.drop_head(self.head_norm(head)), matrix)
        return self.drop_product(self.product_norm(product))
