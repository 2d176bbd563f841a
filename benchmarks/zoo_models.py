"""Models of the zoo that score pairs of nodes of a whole graph, written from the descriptions in `zoo_entries.py`.

Every model is called as `model(pairs, graph)` and returns what its code base compares with a threshold: logits, or
probabilities where the code base applies a sigmoid in its decoder.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GCNConv, SAGEConv
from torch_geometric.utils import softmax

from suffice.link.models import build_model
from suffice.link.models.base import LinkPredictor
from suffice.link.sparse.adjacency import Adjacency


class PairModel(nn.Module, ABC):
    """Base class of the models of pairs.

    Args:
        x: node features, [nodes, features].

    """

    x: Tensor

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.register_buffer("x", x)

    @abstractmethod
    def forward(self, pairs: Tensor, graph: Adjacency) -> Tensor:
        """Return scores [pairs] of pairs [2, pairs]; messages pass over the edges of `graph`."""


class Own(PairModel):
    """A model of `suffice.link.models` that has the layers of its code base.

    Args:
        x: node features, [nodes, features].
        name: name of the model.
        options: its options.

    """

    def __init__(self, x: Tensor, name: str, **options: Any) -> None:
        super().__init__(x)
        model = build_model(name, x.size(1), **options)
        assert isinstance(model, LinkPredictor)
        self.model = model

    def forward(self, pairs: Tensor, graph: Adjacency) -> Tensor:
        return self.model(self.x, graph, pairs)


def perceptron(sizes: list[int], norm: type[nn.Module] | None = None, *, dropout: float = 0.0) -> nn.Sequential:
    """Return linear layers with norm, ReLU and dropout between them."""
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(before, after))
        if number < len(sizes) - 2:
            layers += [*([norm(after)] if norm else []), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


class MPLP(PairModel):
    """Walk counts estimated from random node vectors, and the product of GCN embeddings, both through BatchNorm.

    Args:
        x: node features, [nodes, features].
        hidden: number of channels.
        vectors: dimension of the random vectors, which are drawn anew in every call.
        dropout: probability that a channel is dropped.

    """

    def __init__(self, x: Tensor, hidden: int = 64, vectors: int = 256, dropout: float = 0.2) -> None:
        super().__init__(x)
        self.vectors = vectors
        self.convolutions = nn.ModuleList([GCNConv(x.size(1), hidden), GCNConv(hidden, hidden)])
        self.count_encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(dropout), nn.ReLU())
        self.product_encoder = nn.Sequential(
            *(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.Dropout(dropout), nn.ReLU()),
            *(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.Dropout(dropout), nn.ReLU()),
        )
        self.last = nn.Linear(hidden + 4, 1)

    def forward(self, pairs: Tensor, graph: Adjacency) -> Tensor:
        h = self.x
        for convolution in self.convolutions:  # no activation between the layers
            h = convolution(h, graph.edge_index)
        hidden = self.count_encoder(self.walk_counts(pairs, graph))
        product = self.product_encoder(h[pairs[0]] * h[pairs[1]])
        return self.last(torch.cat([product, hidden], dim=1)).squeeze(-1)

    @torch.no_grad()
    def walk_counts(self, pairs: Tensor, graph: Adjacency) -> Tensor:
        """Estimate how many nodes walks of one and two steps from both nodes share, [pairs, 4]."""
        signs = torch.randint(0, 2, (graph.num_nodes, self.vectors), device=pairs.device) * 2.0 - 1
        start = signs / math.sqrt(self.vectors)
        ones = torch.ones(graph.csr.col.numel())
        matrix = torch.sparse_csr_tensor(
            graph.csr.rowptr, graph.csr.col, ones, (graph.num_nodes, graph.num_nodes), check_invariants=False
        )
        one = matrix @ start
        two = matrix @ one
        back = two - graph.degree[:, None] * start  # without the walks that return to their first node
        i, j = pairs
        products = [
            one[i] * one[j],
            one[i] * two[j] + two[i] * one[j],
            back[i] * back[j],
            one[i] * two[i] + one[j] * two[j],
        ]
        return torch.stack([product.sum(dim=1) for product in products], dim=1)


class GraphGym(PairModel):
    """GraphGym's layers: a linear map with sum aggregation and BatchNorm over nodes, and one of its edge heads.

    Args:
        x: node features, [nodes, features].
        head: `concat` (a perceptron with BatchNorm over pairs, then a sigmoid) or `dot` (a perceptron with BatchNorm
            over nodes, then an inner product).
        hidden: number of channels.

    """

    def __init__(self, x: Tensor, head: str, hidden: int = 64) -> None:
        super().__init__(x)
        self.head = head
        sizes = [x.size(1), hidden, hidden]
        self.convolutions = nn.ModuleList(
            SAGEConv(before, after, aggr="sum", bias=False) for before, after in pairwise(sizes)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in self.convolutions)
        width = 2 * hidden if head == "concat" else hidden
        self.after = nn.Sequential(
            *(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
            nn.Linear(width, 1 if head == "concat" else hidden),
        )

    def forward(self, pairs: Tensor, graph: Adjacency) -> Tensor:
        h = self.x
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            h = norm(convolution(h, graph.edge_index)).relu()
        h = F.normalize(h, dim=1)
        if self.head == "concat":
            return self.after(torch.cat([h[pairs[0]], h[pairs[1]]], dim=1)).squeeze(-1).sigmoid()
        h = self.after(h)
        return (h[pairs[0]] * h[pairs[1]]).sum(dim=1)


class GraphStorm(PairModel):
    """GraphStorm's edge decoder with features of the edges, with `norm` set to batch.

    Features of a pair are the logarithms of both degrees. The two logits of its softmax over "edge" and "no edge" are
    returned as their difference.
    """

    def __init__(self, x: Tensor, hidden: int = 64, dropout: float = 0.1) -> None:
        super().__init__(x)
        self.convolution = SAGEConv(x.size(1), hidden)
        self.of_nodes = nn.Linear(2 * hidden, hidden, bias=False)
        self.of_features = nn.Linear(2, hidden, bias=False)
        self.combine = nn.Linear(2 * hidden, hidden, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(hidden, 2, bias=False)

    def forward(self, pairs: Tensor, graph: Adjacency) -> Tensor:
        h = self.convolution(self.x, graph.edge_index).relu()
        nodes = self.of_nodes(torch.cat([h[pairs[0]], h[pairs[1]]], dim=1))
        features = self.of_features(graph.degree[pairs].float().log1p().t())
        nodes = self.dropout(self.norms[0](nodes).relu())
        features = self.dropout(self.norms[1](features).relu())
        logits = self.last(self.norms[2](self.combine(torch.cat([nodes, features], dim=1))).relu())
        return logits[:, 1] - logits[:, 0]


class MatrixFactorization(PairModel):
    """Learned node embeddings and a perceptron over their product, which holds BatchNorm layers that it never calls."""

    def __init__(self, x: Tensor, hidden: int = 64) -> None:
        super().__init__(x)
        self.embedding = nn.Embedding(x.size(0), hidden)
        self.layers = nn.ModuleList([nn.Linear(hidden, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)])
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(2))

    def forward(self, pairs: Tensor, graph: Adjacency) -> Tensor:
        h = self.embedding(pairs[0]) * self.embedding(pairs[1])
        for layer in self.layers[:-1]:
            h = layer(h).relu()
        return self.layers[-1](h).squeeze(-1).sigmoid()


class GiGL(PairModel):
    """GraphSAGE without a norm, embeddings of length 1, and their inner product."""

    def __init__(self, x: Tensor, hidden: int = 64) -> None:
        super().__init__(x)
        self.first, self.second = SAGEConv(x.size(1), hidden), SAGEConv(hidden, hidden)

    def encode(self, graph: Adjacency) -> Tensor:
        """Return node embeddings, [nodes, hidden]."""
        h = self.first(self.x, graph.edge_index).relu()
        return F.normalize(self.second(h, graph.edge_index), dim=1)

    def forward(self, pairs: Tensor, graph: Adjacency) -> Tensor:
        h = self.encode(graph)
        return (h[pairs[0]] * h[pairs[1]]).sum(dim=1)

    def retrieval_loss(self, pairs: Tensor, graph: Adjacency, temperature: float = 0.07) -> Tensor:
        """Return the softmax loss over the targets of the batch and as many random nodes.

        Args:
            pairs: positives, [2, pairs].
            graph: edges for message passing.
            temperature: scores are divided by it.

        """
        h = self.encode(graph)
        source, target = pairs
        candidates = torch.cat([target, torch.randint(graph.num_nodes, target.shape)])
        scores = h[source] @ h[candidates].t() / temperature
        number = torch.arange(source.numel())
        # Other positives of the same source, and other occurrences of its target, are no negatives.
        same = candidates[None, :] == target[:, None]
        same[:, : source.numel()] |= source[None, :] == source[:, None]
        same[number, number] = False
        return F.cross_entropy(scores.masked_fill(same, -1e9), number)


class HeartGCN(PairModel):
    """GCN without a norm, and a perceptron with a sigmoid over the product of both embeddings."""

    def __init__(self, x: Tensor, hidden: int = 64, dropout: float = 0.1) -> None:
        super().__init__(x)
        self.convolution = GCNConv(x.size(1), hidden)
        self.decoder = perceptron([hidden, hidden, 1], dropout=dropout)

    def forward(self, pairs: Tensor, graph: Adjacency) -> Tensor:
        h = self.convolution(self.x, graph.edge_index)
        return self.decoder(h[pairs[0]] * h[pairs[1]]).squeeze(-1).sigmoid()


class LPFormer(PairModel):
    """Attention of a pair to the neighbors of both nodes, with encodings of their PageRank, and LayerNorm everywhere.

    Args:
        x: node features, [nodes, features].
        graph: training edges, from which personalized PageRank is computed once.
        hidden: number of channels.
        threshold: PageRank from both nodes that a neighbor of only one of them must have.

    """

    pagerank: Tensor

    def __init__(self, x: Tensor, graph: Adjacency, hidden: int = 64, threshold: float = 1e-3) -> None:
        super().__init__(x)
        self.threshold = threshold
        self.register_buffer("pagerank", personalized_pagerank(graph))
        self.convolution, self.after_convolution = GCNConv(x.size(1), hidden), nn.LayerNorm(hidden)
        self.node_norm = nn.LayerNorm(hidden)
        self.product = perceptron([hidden, hidden, hidden], nn.LayerNorm)
        self.encode_common = perceptron([2, hidden, hidden], nn.LayerNorm)
        self.encode_other = perceptron([2, hidden, hidden], nn.LayerNorm)
        self.of_pair, self.of_node = nn.Linear(hidden, hidden), nn.Linear(2 * hidden, hidden)
        self.attention = nn.Parameter(torch.randn(hidden) / math.sqrt(hidden))
        self.after_attention = nn.LayerNorm(hidden)
        self.pairwise = perceptron([hidden + 3, hidden + 3, hidden], nn.LayerNorm)
        self.score = perceptron([2 * hidden, 2 * hidden, 1], dropout=0.1)

    def forward(self, pairs: Tensor, graph: Adjacency) -> Tensor:
        h = self.after_convolution(self.convolution(self.x, graph.edge_index)).relu()
        h = self.node_norm(h)
        i, j = pairs
        node, owner, is_common = self.neighbors(pairs, graph)
        rank = torch.stack([self.pagerank[i[owner], node], self.pagerank[j[owner], node]], dim=1)
        kept = is_common | (rank.min(dim=1).values >= self.threshold)
        count = pairs.size(1)
        counts = [
            torch.zeros(count).index_add_(0, owner[chosen], torch.ones(int(chosen.sum())))
            for chosen in (is_common, kept & ~is_common, torch.ones_like(kept))
        ]
        node, owner, rank, is_common = node[kept], owner[kept], rank[kept], is_common[kept]
        encoded = torch.where(
            is_common[:, None],
            self.encode_common(rank) + self.encode_common(rank.flip(1)),
            self.encode_other(rank) + self.encode_other(rank.flip(1)),
        )
        value = self.of_node(torch.cat([h[node], encoded], dim=1))
        query = (self.of_pair(h[i]) + self.of_pair(h[j]))[owner]
        weight = softmax(F.leaky_relu(value * query, 0.2) @ self.attention, owner, num_nodes=count)
        attended = torch.zeros(count, value.size(1)).index_add(0, owner, weight[:, None] * value)
        pairwise = self.pairwise(torch.cat([self.after_attention(attended), torch.stack(counts, dim=1)], dim=1))
        return self.score(torch.cat([self.product(h[i] * h[j]), pairwise], dim=1)).squeeze(-1).sigmoid()

    @staticmethod
    def neighbors(pairs: Tensor, graph: Adjacency) -> tuple[Tensor, Tensor, Tensor]:
        """Return the neighbors of both nodes of each pair, the pair that each belongs to, and whether it is common."""
        codes: list[Tensor] = []
        for nodes in pairs:
            node, owner = graph.csr.expand(nodes)
            codes.append(owner * graph.num_nodes + node)
        code, times = torch.unique(torch.cat(codes), return_counts=True)
        return code % graph.num_nodes, code // graph.num_nodes, times == 2


def personalized_pagerank(graph: Adjacency, restart: float = 0.15, steps: int = 30) -> Tensor:
    """Return personalized PageRank from each node to each node, dense, [nodes, nodes]."""
    size = graph.num_nodes
    walk = torch.zeros(size, size)
    row, column = graph.edge_index
    walk[row, column] = 1 / graph.degree[row].float()
    rank = torch.eye(size)
    sparse = walk.t().to_sparse_csr()
    for _ in range(steps):
        rank = restart * torch.eye(size) + (1 - restart) * (sparse @ rank.t()).t()
    return rank
