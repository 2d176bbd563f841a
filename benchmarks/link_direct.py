"""Direct implementations of the models in scipy and PyG, which `link_models.py` compares our models with.

The classes share no code with `suffice.link.models`. Like the authors' code they use scipy's adjacency matrices,
`torch.sparse` products, `torch_geometric.utils.scatter` for sketches and torch's dropout, and score positives and
negatives in two passes where the authors do. `step` returns the loss of one batch. The positives of the batch are
removed from the graph for NCN, NCNC, Neo-GNN and ELPH, as in our models; BUDDY's sketches and features keep them, as
in its authors' code.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GCNConv
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.utils import scatter

HOPS, PERMUTATIONS, P = 2, 128, 8


def perceptron(hidden: int, dropout: float, *, norm: bool = True) -> nn.Sequential:
    middle = nn.LayerNorm(hidden) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(hidden, hidden), middle, nn.Dropout(dropout), nn.ReLU())


def csr(edges: Tensor, nodes: int) -> sp.csr_matrix:
    both = torch.cat([edges, edges.flip(0)], dim=1).numpy()
    return sp.csr_matrix((np.ones(both.shape[1], dtype=np.float32), (both[0], both[1])), shape=(nodes, nodes))


def to_torch(matrix: sp.csr_matrix) -> Tensor:
    parts = (torch.from_numpy(part) for part in (matrix.indptr, matrix.indices, matrix.data))
    return torch.sparse_csr_tensor(*parts, matrix.shape)


class DirectNCN(nn.Module):
    """NCN: common neighbors A[i] ∘ A[j] by scipy, summed by a sparse product."""

    def __init__(self, features: int, hidden: int, dropout: float, inner: float, outer: float) -> None:
        super().__init__()
        self.input = nn.Sequential(nn.Dropout(inner), nn.Linear(features, hidden), nn.Dropout(outer))
        self.node_mlp = nn.Sequential(*perceptron(hidden, dropout, norm=False), *perceptron(hidden, dropout))
        self.common_mlp = nn.Sequential(*perceptron(hidden, dropout, norm=False), *perceptron(hidden, dropout))
        self.product_mlp = perceptron(hidden, dropout)
        self.join_mlp = perceptron(hidden, dropout)
        self.last = nn.Linear(hidden, 1)
        self.beta = nn.Parameter(torch.ones(1))

    def encode(self, x: Tensor, matrix: sp.csr_matrix) -> Tensor:
        scale = torch.from_numpy(1 / np.sqrt(1 + np.asarray(matrix.sum(1)))).float()
        h = self.input(x) * scale
        return (to_torch(matrix) @ h + h) * scale

    def join(self, h: Tensor, pairs: Tensor, total: Tensor) -> Tensor:
        product = self.product_mlp(h[pairs[0]] * h[pairs[1]])
        return self.last(self.join_mlp(self.common_mlp(total) * self.beta + product)).squeeze(-1)

    def score(self, h: Tensor, matrix: sp.csr_matrix, pairs: Tensor) -> Tensor:
        first, second = pairs.numpy()
        common = matrix[first].multiply(matrix[second]).tocsr()
        return self.join(h, pairs, to_torch(common) @ (h + self.node_mlp(h)))

    def step(self, x: Tensor, rest: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        matrix = csr(rest, x.size(0))
        h = self.encode(x, matrix)
        ones, zeros = self.score(h, matrix, positives), self.score(h, matrix, negatives)
        return -F.logsigmoid(ones).mean() - F.logsigmoid(-zeros).mean()

    def scores(self, x: Tensor, edges: Tensor, pairs: Tensor) -> Tensor:
        matrix = csr(edges, x.size(0))
        return self.score(self.encode(x, matrix), matrix, pairs)


class DirectNCNC(DirectNCN):
    """NCNC: residual neighbors scored by NCN without gradients but with dropout, as its authors do."""

    completion = (1.0, 4.3, 2.8, 0.75)

    def score(self, h: Tensor, matrix: sp.csr_matrix, pairs: Tensor) -> Tensor:
        first, second = pairs.numpy()
        rows, others = matrix[first], matrix[second]
        common = rows.multiply(others).tocsr()
        pooled = h + self.node_mlp(h)
        total = to_torch(common) @ pooled
        for own, end in ((rows, second), (others, first)):
            left = (own - common).tocsr()
            left.eliminate_zeros()
            owner = np.repeat(np.arange(len(end)), np.diff(left.indptr))
            with torch.no_grad():
                asked = torch.from_numpy(np.stack([end[owner], left.indices]).astype(np.int64))
                alpha, scale, offset, prior = self.completion
                q = torch.sigmoid(scale * (super().score(h, matrix, asked) - offset))
                left.data = (alpha * prior * q / (prior * q + 1 - q)).numpy()
            total = total + to_torch(left) @ pooled
        return self.join(h, pairs, total)


class DirectNeoGNN(nn.Module):
    """Neo-GNN: A² of the graph without the batch's positives, and products of its rows, by scipy."""

    def __init__(self, features: int, hidden: int, layers: int) -> None:
        super().__init__()
        sizes = [features] + [hidden] * layers
        self.convolutions = nn.ModuleList(GCNConv(a, b) for a, b in pairwise(sizes))
        self.decoder = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.edge_mlp = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
        self.node_mlp = nn.Sequential(nn.Linear(1, 128), nn.ReLU(), nn.Linear(128, 1))
        self.overlap_mlp = nn.Sequential(nn.Linear(1, 128), nn.ReLU(), nn.Linear(128, 1))
        self.mixture = nn.Parameter(torch.zeros(2))

    def score(self, h: Tensor, reach: sp.csr_matrix, weight: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second = pairs.numpy()
        both = to_torch(reach[first].multiply(reach[second]).tocsr()) @ weight
        structural = torch.sigmoid(self.overlap_mlp(both)).squeeze(-1)
        gnn = torch.sigmoid(self.decoder(h[pairs[0]] * h[pairs[1]])).squeeze(-1)
        share = torch.softmax(self.mixture, 0)
        return share[0] * structural + share[1] * gnn, structural, gnn

    def encode(self, x: Tensor, rest: Tensor) -> tuple[Tensor, sp.csr_matrix, Tensor]:
        matrix = csr(rest, x.size(0))
        reach = (matrix + 0.1 * (matrix @ matrix)).tocsr()
        edge_index = torch.cat([rest, rest.flip(0)], dim=1)
        h = x
        for number, layer in enumerate(self.convolutions):
            h = layer(torch.relu(h) if number else h, edge_index)
        own = self.edge_mlp(torch.ones(edge_index.size(1), 1))
        return h, reach, self.node_mlp(scatter(own, edge_index[1], dim_size=x.size(0))) ** 2

    def step(self, x: Tensor, rest: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        parts = self.encode(x, rest)
        ones, zeros = (self.score(*parts, pairs) for pairs in (positives, negatives))
        return sum(
            -torch.log(one + 1e-15).mean() - torch.log(1 - zero + 1e-15).mean()
            for one, zero in zip(ones, zeros, strict=True)
        )

    def scores(self, x: Tensor, edges: Tensor, pairs: Tensor) -> Tensor:
        return self.score(*self.encode(x, edges), pairs)[0]


class Tables:
    """MinHash of 64 bits and HyperLogLog of 8 bits, by a scatter over all edges and self-loops for each hop."""

    def __init__(self, nodes: int, edges: Tensor) -> None:
        rng = np.random.RandomState(1)
        prime = (1 << 61) - 1
        a, b = (rng.randint(1, 2**31, PERMUTATIONS).astype(np.uint64) for _ in range(2))
        ids = rng.permutation(nodes).astype(np.uint64)[:, None] + 1
        minhash = torch.from_numpy(((ids * a + b) % prime & 0xFFFFFFFF).astype(np.int64))
        bits = rng.randint(0, 2**31, nodes)
        registers = torch.zeros(nodes, 2**P, dtype=torch.int8)
        rank = 24 - np.floor(np.log2((bits >> P) + 1)).astype(np.int8)
        registers[torch.arange(nodes), torch.from_numpy(bits & (2**P - 1))] = torch.from_numpy(rank)
        loops = torch.arange(nodes).expand(2, -1)
        source, target = torch.cat([edges, edges.flip(0), loops], dim=1)
        self.minhash, self.registers, self.sizes = [minhash], [registers], []
        for _ in range(HOPS):
            self.minhash.append(scatter(self.minhash[-1][source], target, dim_size=nodes, reduce="min"))
            self.registers.append(scatter(self.registers[-1][source], target, dim_size=nodes, reduce="max"))
            self.sizes.append(self.count(self.registers[-1]))

    @staticmethod
    def count(registers: Tensor) -> Tensor:
        m = registers.size(1)
        zeros = m - torch.count_nonzero(registers, dim=1)
        linear = m * torch.log(m / zeros.clamp(min=1).float())
        raw = 0.7213 / (1 + 1.079 / m) * m**2 / (2.0 ** (-registers)).sum(1)
        return torch.where((zeros > 0) & (linear <= 220), linear, raw)

    def features(self, pairs: Tensor) -> Tensor:
        first, second = pairs
        both = {}
        for a in range(1, HOPS + 1):
            for b in range(1, HOPS + 1):
                same = torch.count_nonzero(self.minhash[a][first] == self.minhash[b][second], dim=-1) / PERMUTATIONS
                both[a, b] = same * self.count(torch.maximum(self.registers[a][first], self.registers[b][second]))
        found = [both[1, 1], both[2, 1] - both[1, 1], both[1, 2] - both[1, 1]]
        found.append(both[2, 2] - both[2, 1] - both[1, 2] + both[1, 1])
        for end, near, far in (
            (first, both[1, 2], both[2, 2] - both[1, 2]),
            (second, both[2, 1], both[2, 2] - both[2, 1]),
        ):
            found += [self.sizes[0][end] - near, self.sizes[1][end] - self.sizes[0][end] - far]
        return torch.stack(found, dim=1)


class Head(nn.Module):
    """The decoder of ELPH and BUDDY."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.counts, self.count_norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.product, self.product_norm = nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden)
        self.last = nn.Linear(8 + hidden, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, counts: Tensor, node_features: Tensor) -> Tensor:
        counts = self.dropout(torch.relu(self.count_norm(self.counts(counts))))
        product = node_features[:, 0, :] * node_features[:, 1, :]
        product = self.dropout(torch.relu(self.product_norm(self.product(product))))
        return self.last(torch.cat([counts, product], dim=1)).squeeze(-1)


class DirectELPH(nn.Module):
    """ELPH: sketches are computed again for every batch."""

    def __init__(self, features: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList([GCNConv(features, hidden), GCNConv(hidden, hidden)])
        self.head = Head(hidden, dropout)
        self.dropout = nn.Dropout(dropout)

    def step(self, x: Tensor, rest: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        pairs = torch.cat([positives, negatives], dim=1)
        labels = (torch.arange(pairs.size(1)) < positives.size(1)).float()
        return F.binary_cross_entropy_with_logits(self.scores(x, rest, pairs), labels)

    def scores(self, x: Tensor, edges: Tensor, pairs: Tensor) -> Tensor:
        edge_index = torch.cat([edges, edges.flip(0)], dim=1)
        h = x
        for layer in self.convolutions:
            h = self.dropout(layer(h, edge_index))
        return self.head(Tables(x.size(0), edges).features(pairs), h[pairs.T])


class DirectBUDDY(nn.Module):
    """BUDDY: counts are computed before training; the features of both nodes of every pair are gathered and mapped."""

    def __init__(self, features: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.map = nn.Linear(features, hidden)
        self.head = Head(hidden, dropout)

    def score(self, smooth: Tensor, counts: Tensor, pairs: Tensor) -> Tensor:
        return self.head(counts, self.map(smooth[pairs.T]))

    def step(self, smooth: Tensor, counts: Tensor, pairs: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.score(smooth, counts, pairs), labels)


def smooth_features(x: Tensor, edges: Tensor) -> Tensor:
    edge_index, weight = gcn_norm(torch.cat([edges, edges.flip(0)], dim=1), num_nodes=x.size(0))
    return torch.sparse_coo_tensor(edge_index, weight, (x.size(0),) * 2) @ x
