"""Models of the zoo that score the subgraph around each pair of nodes.

The subgraphs of all pairs that are trained on or audited are extracted before. A model is called as `model(pairs,
graph, index)`, where `index` are the numbers of the subgraphs; the other arguments are not used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.sparse.csgraph import shortest_path
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import MLP

from suffice.link.sparse.adjacency import Adjacency

MAX_LABEL = 60  # of distance labels


@dataclass(frozen=True)
class Subgraph:
    """The subgraph of a pair: both nodes and all their neighbors, without the edge between the two.

    Args:
        nodes: numbers in the whole graph, the two nodes of the pair first, long [n].
        edges: edges in both directions, as positions in `nodes`, long [2, edges].
        labels: distance labels of SEAL (double-radius node labeling), long [n].

    """

    nodes: Tensor
    edges: Tensor
    labels: Tensor


@dataclass(frozen=True)
class SubgraphBatch:
    """Several subgraphs as one graph.

    Args:
        nodes: long [total nodes].
        edges: positions in `nodes`, long [2, total edges].
        labels: long [total nodes].
        owner: number of the subgraph of each node, long [total nodes].
        starts: position of the first node of each subgraph, long [subgraphs].

    """

    nodes: Tensor
    edges: Tensor
    labels: Tensor
    owner: Tensor
    starts: Tensor

    @classmethod
    def join(cls, subgraphs: list[Subgraph]) -> SubgraphBatch:
        """Join subgraphs."""
        sizes = torch.tensor([part.nodes.numel() for part in subgraphs])
        starts = sizes.cumsum(0) - sizes
        edges = [part.edges + start for part, start in zip(subgraphs, starts.tolist(), strict=True)]
        return cls(
            torch.cat([part.nodes for part in subgraphs]),
            torch.cat(edges, dim=1),
            torch.cat([part.labels for part in subgraphs]),
            torch.arange(len(subgraphs)).repeat_interleave(sizes),
            starts,
        )


def extract(graph: Adjacency, pairs: Tensor) -> list[Subgraph]:
    """Return the subgraphs of pairs [2, pairs]."""
    size = graph.num_nodes
    dense = np.zeros((size, size), dtype=bool)
    row, column = graph.edge_index.numpy()
    dense[row, column] = True
    found: list[Subgraph] = []
    for i, j in pairs.t().tolist():
        around = dense[i] | dense[j]
        around[[i, j]] = False
        nodes = np.concatenate([[i, j], around.nonzero()[0]])
        inside = dense[np.ix_(nodes, nodes)]
        inside[0, 1] = inside[1, 0] = False
        edges = torch.from_numpy(np.stack(inside.nonzero())).long()
        found.append(Subgraph(torch.from_numpy(nodes).long(), edges, torch.from_numpy(distance_labels(inside))))
    return found


def distance_labels(inside: np.ndarray) -> np.ndarray:
    """Return 1 for the two nodes of the pair, and for others a number for each pair of distances from these.

    Distances from one node are those without the other node. The label is 0 if a node can reach only one of the two.

    Args:
        inside: adjacency matrix of a subgraph, the two nodes first, bool [n, n].

    """
    labels = np.ones(len(inside), dtype=np.int64)
    distances: list[np.ndarray] = []
    for start, other in ((0, 1), (1, 0)):
        kept = np.delete(np.arange(len(inside)), other)
        position = int((kept == start).nonzero()[0][0])
        found = shortest_path(inside[np.ix_(kept, kept)], unweighted=True, directed=False, indices=position)
        distances.append(np.delete(found, position))
    total = distances[0] + distances[1]
    reached = np.isfinite(total)
    half = np.where(reached, total, 0).astype(np.int64)
    nearest = np.where(reached, np.minimum(*distances), 0).astype(np.int64)
    labels[2:] = np.where(reached, 1 + nearest + (half // 2) * (half // 2 + half % 2 - 1), 0)
    return labels.clip(0, MAX_LABEL - 1)


class SubgraphModel(nn.Module):
    """Base class of the models of subgraphs.

    Args:
        x: node features, [nodes, features].
        subgraphs: subgraphs of all pairs.

    """

    x: Tensor

    def __init__(self, x: Tensor, subgraphs: list[Subgraph]) -> None:
        super().__init__()
        self.register_buffer("x", x)
        # Not among the attributes of the module, so that an audit need not copy them.
        self._join = lambda index: SubgraphBatch.join([subgraphs[number] for number in index.tolist()])

    def forward(self, pairs: Tensor, graph: Adjacency, index: Tensor) -> Tensor:
        """Return scores [pairs] of the subgraphs with the numbers `index` [pairs]."""
        return self.score(self._join(index))

    def score(self, batch: SubgraphBatch) -> Tensor:
        """Return scores [subgraphs]."""
        raise NotImplementedError


class SEAL(SubgraphModel):
    """SEAL with GIN, whose perceptrons end in BatchNorm over all nodes of the batch, or with GCN, which has no norm.

    Args:
        x: node features, [nodes, features].
        subgraphs: subgraphs of all pairs.
        kind: `gin` (mean over the nodes of a subgraph) or `gcn` (product of the embeddings of both nodes).
        hidden: number of channels.
        layers: number of layers.

    """

    def __init__(self, x: Tensor, subgraphs: list[Subgraph], kind: str, hidden: int = 32, layers: int = 3) -> None:
        super().__init__(x, subgraphs)
        self.kind = kind
        self.label_embedding = nn.Embedding(MAX_LABEL, hidden)
        sizes = [hidden + x.size(1)] + [hidden] * layers
        gin = kind == "gin"
        self.layers = nn.ModuleList(
            nn.Sequential(
                *(nn.Linear(before, after), nn.ReLU(), nn.Linear(after, after), nn.ReLU(), nn.BatchNorm1d(after))
            )
            if gin
            else nn.Linear(before, after)
            for before, after in pairwise(sizes)
        )
        self.first = nn.Linear(layers * hidden if gin else hidden, hidden)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(hidden, 1)

    def score(self, batch: SubgraphBatch) -> Tensor:
        h = torch.cat([self.label_embedding(batch.labels), self.x[batch.nodes]], dim=1)
        source, target = batch.edges
        if self.kind == "gin":
            outputs: list[Tensor] = []
            for layer in self.layers:
                h = layer(h.index_add(0, target, h[source]))
                outputs.append(h)
            every = torch.cat(outputs, dim=1)
            count = torch.bincount(batch.owner).float()[:, None]
            pooled = torch.zeros(count.numel(), every.size(1)).index_add(0, batch.owner, every) / count
        else:
            degree = 1 + torch.bincount(target, minlength=h.size(0)).float()
            weight = (degree[source] * degree[target]).rsqrt()[:, None]
            for number, layer in enumerate(self.layers):
                h = layer(h)
                h = (h / degree[:, None]).index_add(0, target, weight * h[source])
                h = self.dropout(h.relu()) if number < len(self.layers) - 1 else h
            pooled = h[batch.starts] * h[batch.starts + 1]
        return self.last(self.dropout(self.first(pooled).relu())).squeeze(-1)


def diffused_features(x: Tensor, subgraphs: list[Subgraph], steps: int = 3) -> Tensor:
    """Return the features of both nodes of each pair after 0 to `steps` steps in its subgraph, [pairs, 2, (k+1)·f]."""
    found = torch.empty(len(subgraphs), 2, (steps + 1) * x.size(1))
    for number, part in enumerate(subgraphs):
        size = part.nodes.numel()
        matrix = torch.eye(size)
        matrix[part.edges[0], part.edges[1]] = 1
        scale = matrix.sum(dim=1).rsqrt()
        matrix = scale[:, None] * matrix * scale
        h = x[part.nodes]
        rows = [h[:2]]
        for _ in range(steps):
            h = matrix @ h
            rows.append(h[:2])
        found[number] = torch.cat(rows, dim=1)
    return found


class S3GRL(nn.Module):
    """S3GRL: features diffused in the subgraph, a linear layer and a perceptron, both with BatchNorm.

    Args:
        diffused: `diffused_features` of all pairs.
        hidden: number of channels.

    """

    diffused: Tensor

    def __init__(self, diffused: Tensor, hidden: int = 64) -> None:
        super().__init__()
        self.register_buffer("diffused", diffused)
        self.of_nodes = MLP(
            [diffused.size(2), hidden], plain_last=False, dropout=0.5, act_first=True, norm="batch_norm"
        )
        self.of_pairs = MLP([hidden, hidden, 1], dropout=0.5, act_first=True, norm="batch_norm")

    def forward(self, pairs: Tensor, graph: Adjacency, index: Tensor) -> Tensor:
        """Return logits [pairs] of the pairs with the numbers `index` [pairs]."""
        h = self.of_nodes(self.diffused[index].flatten(0, 1)).view(index.numel(), 2, -1)
        return self.of_pairs(h[:, 0] * h[:, 1]).squeeze(-1)


class WalkPooling(SubgraphModel):
    """WalkPooling: return and transition probabilities of attention walks with and without the edge of the pair.

    BatchNorm normalizes the features of a pair before five linear layers.

    Args:
        x: node features, [nodes, features].
        subgraphs: subgraphs of all pairs.
        hidden: number of channels.
        heads: number of attention heads.
        length: number of walk lengths.

    """

    def __init__(self, x: Tensor, subgraphs: list[Subgraph], hidden: int = 32, heads: int = 2, length: int = 4) -> None:
        super().__init__(x, subgraphs)
        self.heads, self.length = heads, length
        self.convolutions = nn.ModuleList([nn.Linear(x.size(1), hidden), nn.Linear(hidden, hidden)])
        wide = x.size(1) + 2 * hidden
        self.key = nn.Sequential(nn.Linear(wide, hidden), nn.LeakyReLU(0.2), nn.Dropout(0.5))
        self.query = nn.Sequential(nn.Linear(wide, hidden), nn.LeakyReLU(0.2), nn.Dropout(0.5))
        self.heads_of_key, self.heads_of_query = nn.Linear(hidden, heads * hidden), nn.Linear(hidden, heads * hidden)
        features = heads * (5 * length + 1)
        self.norm = nn.BatchNorm1d(features)
        self.classifier = nn.Sequential(
            *(nn.Linear(features, 20 * features), nn.ReLU(), nn.Linear(20 * features, 20 * features), nn.ReLU()),
            *(nn.Linear(20 * features, 10 * features), nn.ReLU(), nn.Linear(10 * features, features), nn.ReLU()),
            *(nn.Dropout(0.5), nn.Linear(features, 1)),
        )

    def score(self, batch: SubgraphBatch) -> Tensor:
        count, width = batch.starts.numel(), int(torch.bincount(batch.owner).max())
        position = torch.arange(batch.nodes.numel()) - batch.starts[batch.owner]
        without = torch.zeros(count, width, width, dtype=torch.bool)
        source, target = batch.edges
        without[batch.owner[source], position[source], position[target]] = True
        with_edge = without.clone()
        with_edge[:, 0, 1] = with_edge[:, 1, 0] = True
        x = torch.zeros(count, width, self.x.size(1))
        x[batch.owner, position] = self.x[batch.nodes]
        looped = with_edge.float() + torch.eye(width)
        scale = looped.sum(dim=2).rsqrt()
        normalized = scale[:, :, None] * looped * scale[:, None, :]
        h, parts = x, [x]
        for number, layer in enumerate(self.convolutions):
            h = normalized @ layer(h)
            parts.append(h)
            h = F.dropout(h.relu(), 0.5, self.training) if number == 0 else h
        return torch.sigmoid(self.classify(torch.cat(parts, dim=2), with_edge, without))

    def classify(self, h: Tensor, with_edge: Tensor, without: Tensor) -> Tensor:
        """Return logits [subgraphs] of node embeddings [subgraphs, n, channels] and two adjacency matrices."""
        count, width, _ = h.shape

        def split(values: Tensor) -> Tensor:
            return values.view(count, width, self.heads, -1).transpose(1, 2)  # [subgraphs, heads, n, hidden]

        key, query = split(self.heads_of_key(self.key(h))), split(self.heads_of_query(self.query(h)))
        weights = query @ key.transpose(2, 3) / math.sqrt(key.size(3))  # from a node (row) to another (column)
        strength = weights[:, :, 0, 1].sigmoid() + weights[:, :, 1, 0].sigmoid()
        features = [strength]
        traces: list[Tensor] = []
        for adjacency in (with_edge, without):
            step = masked_softmax(weights, adjacency[:, None]).transpose(2, 3)
            walk, at_nodes, between, trace = step, [], [], []
            for _ in range(self.length):
                walk = step @ walk
                at_nodes.append(walk[:, :, 0, 0] + walk[:, :, 1, 1])
                between.append(walk[:, :, 0, 1] + walk[:, :, 1, 0])
                trace.append(walk.diagonal(dim1=2, dim2=3).sum(dim=2))
            features += [*at_nodes, *between]
            traces.append(torch.cat(trace, dim=1))
        return self.classifier(self.norm(torch.cat([*features, traces[0] - traces[1]], dim=1))).squeeze(-1)


def masked_softmax(weights: Tensor, adjacency: Tensor) -> Tensor:
    """Return the softmax over the sources (rows) of each target (column), 0 where there is no edge."""
    masked = weights.masked_fill(~adjacency, -torch.inf)
    largest = masked.amax(dim=2, keepdim=True).clamp(min=-1e9)
    powers = (masked - largest).exp()
    return powers / (powers.sum(dim=2, keepdim=True) + 1e-16)
