"""Audit link predictors in the shapes in which code exists, each in at most five lines.

python examples/audit_any_shape.py [--shape SHAPE] [--norm batch|layer]

Each function below builds a model with one norm layer, trains it, and audits it; the lines of the audit stand at its
end. With BatchNorm over the edge batch the scores depend on the batch, with LayerNorm they do not. Take the function
that looks like your code. `z`, `h` and `x` are embeddings or features of nodes, [nodes, channels].
"""

import argparse

import torch
from torch import nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader, LinkLoader
from torch_geometric.nn import GCNConv
from torch_geometric.sampler import BaseSampler, SamplerOutput
from torch_geometric.utils import k_hop_subgraph

from suffice.link import EdgeSet, SplitConfig, audit, encode_once, load_graph, split_edges

graph = load_graph("digits")
split = split_edges(graph, SplitConfig(), seed=0)
x, num_nodes = graph.x, graph.num_nodes
edge_index = split.message_edges()  # without the held-out edges
positives, negatives = split.test, split.test_negatives
edges = EdgeSet(positives, negatives)
channels = x.size(1)


def perceptron(norm, in_channels, hidden=32):
    """Return a decoder with a norm layer over the edges of a batch."""
    return nn.Sequential(nn.Linear(in_channels, hidden), norm(hidden), nn.ReLU(), nn.Linear(hidden, 1))


def fit(model, logits, batches):
    """Train on batches of (input of `logits`, labels)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for inputs, labels in batches:
        loss = nn.functional.binary_cross_entropy_with_logits(logits(inputs).view(-1), labels.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def pairs_and_labels(steps=40, size=256):
    """Yield batches with as many positives as negatives: pairs of nodes [2, 2 · size] and labels [2 · size]."""
    for _ in range(steps):
        chosen = split.train[:, torch.randint(split.train.size(1), (size,))]
        yield torch.cat([chosen, torch.randint(num_nodes, (2, size))], dim=1), torch.arange(2 * size) < size


# ---- model(z_i, z_j) -------------------------------------------------------------------------------------------------


class TwoEmbeddings(nn.Module):
    """Scores the embeddings of source and target nodes, as the predictors of the OGB examples do."""

    def __init__(self, norm):
        super().__init__()
        self.layers = perceptron(norm, channels)

    def forward(self, z_i, z_j):
        """Return logits [edges, 1]."""
        return self.layers(z_i * z_j)


def two_embeddings(norm):
    """Audit `model(z_i, z_j)`."""
    model, z = TwoEmbeddings(norm), x
    fit(model, lambda pairs: model(z[pairs[0]], z[pairs[1]]), pairs_and_labels())
    # The audit:
    return audit(lambda pairs: model(z[pairs[0]], z[pairs[1]]), edges, module=model)


# ---- model(h, edge) --------------------------------------------------------------------------------------------------


class EmbeddingsAndEdges(nn.Module):
    """Scores rows of a table of embeddings; edges are [edges, 2]."""

    def __init__(self, norm):
        super().__init__()
        self.layers = perceptron(norm, 32)

    def forward(self, h, edge):
        """Return logits [edges, 1]."""
        return self.layers(h[edge[:, 0]] * h[edge[:, 1]])


def embeddings_and_edges(norm):
    """Audit `model(h, edge)`, where an encoder computes h."""
    model, encoder = EmbeddingsAndEdges(norm), GCNConv(channels, 32)
    fit(nn.ModuleList([model, encoder]), lambda pairs: model(encoder(x, edge_index), pairs.t()), pairs_and_labels())
    # The audit, with embeddings that are computed once in each mode. For edges [2, edges], leave out `.t()`.
    score = encode_once(lambda: encoder(x, edge_index), lambda h, pairs: model(h, pairs.t()))
    return audit(score, edges, module=[model, encoder])


# ---- model(x, adj, edge) ---------------------------------------------------------------------------------------------


class FeaturesAdjacencyEdges(nn.Module):
    """Scores the product of two nodes and the sum of their common neighbors, as NCN does."""

    def __init__(self, norm):
        super().__init__()
        self.encoder, self.layers = nn.Linear(channels, 32), perceptron(norm, 64)

    def forward(self, x, adj, edge):
        """Return logits [edges, 1]."""
        h = self.encoder(x)
        common = (adj[edge[0]] * adj[edge[1]]) @ h
        return self.layers(torch.cat([h[edge[0]] * h[edge[1]], common], dim=1))


def features_adjacency_edges(norm):
    """Audit `model(x, adj, edge)`, with an adjacency that does not contain the audited edges."""
    model, adj = FeaturesAdjacencyEdges(norm), torch.zeros(num_nodes, num_nodes)
    adj[edge_index[0], edge_index[1]] = 1

    def logits(pairs):
        masked = adj.clone()  # without the edges that are to be predicted
        masked[pairs[0], pairs[1]] = masked[pairs[1], pairs[0]] = 0
        return model(x, masked, pairs)

    fit(model, logits, pairs_and_labels())
    # The audit:
    return audit(lambda pairs: model(x, adj, pairs), edges, module=model)


# ---- model(batch) ----------------------------------------------------------------------------------------------------


class PygBatch(nn.Module):
    """Scores `edge_label_index` of a batch of PyG."""

    def __init__(self, norm):
        super().__init__()
        self.encoder, self.layers = GCNConv(channels, 32), perceptron(norm, 32)

    def forward(self, batch):
        """Return logits [edges, 1]."""
        z = self.encoder(batch.x, batch.edge_index)
        return self.layers(z[batch.edge_label_index[0]] * z[batch.edge_label_index[1]])


def pyg_batch(norm):
    """Audit `model(batch)`, where a batch is a graph with `edge_label_index`."""
    model = PygBatch(norm)
    fit(model, lambda pairs: model(Data(x=x, edge_index=edge_index, edge_label_index=pairs)), pairs_and_labels())
    # The audit:
    return audit(lambda pairs: model(Data(x=x, edge_index=edge_index, edge_label_index=pairs)), edges, module=model)


class WholeGraph(BaseSampler):
    """Samples no neighbors but takes all; `LinkNeighborLoader` needs the compiled package pyg-lib."""

    edge_permutation = None

    def sample_from_nodes(self, index, **_):
        """Not needed for edges."""
        raise NotImplementedError

    def sample_from_edges(self, index, neg_sampling=None):
        """Return the whole graph for a batch of edges."""
        metadata = (index.input_id, torch.stack([index.row, index.col]), index.label, None)
        return SamplerOutput(torch.arange(num_nodes), *edge_index, torch.arange(edge_index.size(1)), metadata=metadata)


def link_loader(norm):
    """Audit `model(batch)` with the batches of a `LinkNeighborLoader`."""
    model = PygBatch(norm)
    fit(model, lambda pairs: model(Data(x=x, edge_index=edge_index, edge_label_index=pairs)), pairs_and_labels())
    pairs = torch.cat([positives, negatives], dim=1)
    labels = torch.arange(pairs.size(1)) < positives.size(1)
    data = Data(x=x, edge_index=edge_index)
    # The audit. Yours is LinkNeighborLoader(data, num_neighbors, edge_label_index=pairs, edge_label=labels).
    loader = LinkLoader(data, WholeGraph(), edge_label_index=pairs, edge_label=labels)
    return audit(model, EdgeSet.from_loader(loader, model))


# ---- Enclosing subgraphs ---------------------------------------------------------------------------------------------


class Subgraphs(nn.Module):
    """Scores the two centers of each subgraph of a batch, as SEAL does with center pooling."""

    def __init__(self, norm):
        super().__init__()
        self.encoder, self.layers = GCNConv(channels, 32), perceptron(norm, 32)

    def forward(self, batch):
        """Return logits [subgraphs, 1]."""
        z = self.encoder(batch.x, batch.edge_index)
        source, target = batch.center_index
        return self.layers(z[source] * z[target])


def enclosing_subgraph(pair, label):
    """Return the neighbors of two nodes, without the edge between these."""
    nodes, inner, center, _ = k_hop_subgraph(pair, 1, edge_index, relabel_nodes=True, num_nodes=num_nodes)
    is_target = (inner == center.view(2, 1)).any(0) & (inner == center.flip(0).view(2, 1)).any(0)
    return Data(x=x[nodes], edge_index=inner[:, ~is_target], center_index=center.view(2, 1), y=label)


def subgraphs(norm):
    """Audit `model(batch)`, where a batch consists of enclosing subgraphs."""
    model = Subgraphs(norm)
    pairs, labels = next(pairs_and_labels(steps=1, size=1024))
    train = [enclosing_subgraph(pair, int(label)) for pair, label in zip(pairs.t(), labels, strict=True)]
    fit(model, model, ((batch, batch.y) for _ in range(10) for batch in DataLoader(train, 512, shuffle=True)))
    test = [enclosing_subgraph(pair, 1) for pair in positives[:, :128].t()]
    test += [enclosing_subgraph(pair, 0) for pair in negatives[:, :128].t()]
    # The audit. Yours may be any loader whose items have a label `y`. Few repeats, because collating takes long.
    loader = DataLoader(test, batch_size=32)
    return audit(model, EdgeSet.from_loader(loader, model), repeats=4)


# ---- Triples ---------------------------------------------------------------------------------------------------------


class Triples(nn.Module):
    """Scores triples (head, relation, tail), as models of PyKEEN do."""

    def __init__(self, norm):
        super().__init__()
        self.relations, self.layers = nn.Embedding(2, channels), perceptron(norm, channels)

    def score_hrt(self, hrt_batch):
        """Return logits [triples, 1] of triples [triples, 3]."""
        head, relation, tail = hrt_batch.t()
        return self.layers(x[head] * x[tail] + self.relations(relation))


def triples(norm):
    """Audit `model.score_hrt(triples)`, trained on positives and negatives in separate passes."""
    model = Triples(norm)

    def with_relation(pairs):  # 0 if both nodes are in the same half of the list of nodes, else 1
        return torch.stack([pairs[0], ((pairs < num_nodes // 2).sum(0) == 1).long(), pairs[1]], dim=1)

    def logits(pairs):
        positive, negative = with_relation(pairs).chunk(2)
        return torch.cat([model.score_hrt(positive), model.score_hrt(negative)])

    fit(model, logits, pairs_and_labels())
    positive, negative = with_relation(positives), with_relation(negatives)  # yours: mapped_triples, [triples, 3]
    # The audit:
    relations = {"relation": (positive[:, 1], negative[:, 1])}
    triples = EdgeSet(positive[:, [0, 2]].t(), negative[:, [0, 2]].t(), items=relations)
    score = lambda pairs, relation: model.score_hrt(torch.stack([pairs[0], relation, pairs[1]], dim=1))  # noqa: E731
    return audit(score, triples, module=model)


# ---- Memory ----------------------------------------------------------------------------------------------------------


class Memory(nn.Module):
    """Scores pairs at a time, and writes what it has seen into a memory, as temporal models do."""

    def __init__(self, norm):
        super().__init__()
        self.layers = perceptron(norm, channels + 1)
        self.register_buffer("memory", x.clone())
        self.register_buffer("last_time", torch.zeros(num_nodes))

    def forward(self, source, target, time):
        """Return logits [edges, 1] and update the memory of both nodes."""
        age = (time - self.last_time[source]).tanh().unsqueeze(1)
        logits = self.layers(torch.cat([self.memory[source] * self.memory[target], age], dim=1))
        self.memory[source] = 0.99 * self.memory[source] + 0.01 * self.memory[target]
        self.last_time[source] = time
        return logits


def memory(norm):
    """Audit `model(source, target, time)`, which writes into its memory. The audit restores the memory."""
    model = Memory(norm)
    fit(model, lambda pairs: model(*pairs, torch.rand(pairs.size(1))), pairs_and_labels())
    before = model.memory.clone()
    times = torch.rand(positives.size(1)), torch.rand(negatives.size(1))
    # The audit:
    timed = EdgeSet(positives, negatives, items={"time": times})
    report = audit(lambda pairs, time: model(*pairs, time), timed, module=model)
    assert torch.equal(model.memory, before)
    return report


SHAPES = {
    function.__name__: function
    for function in (
        two_embeddings,
        embeddings_and_edges,
        features_adjacency_edges,
        pyg_batch,
        link_loader,
        subgraphs,
        triples,
        memory,
    )
}
NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


def main():
    """Audit each shape with each norm and print the level of the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--norm", choices=NORMS)
    options = parser.parse_args()
    for shape in [options.shape] if options.shape else SHAPES:
        for norm in [options.norm] if options.norm else NORMS:
            torch.manual_seed(0)
            report = SHAPES[shape](NORMS[norm])
            statistics = report.parts["heldout"].statistics
            kappa, a_pure = statistics["kappa"].mean, statistics["a_pure"].mean
            print(f"{shape} with {norm} norm: {report.verdict.level} (κ = {kappa:.2f}, A_pure = {a_pure:.2f})")


if __name__ == "__main__":
    main()
