"""Audit your own link predictor, written in plain PyG.

python examples/audit_your_model.py
"""

import torch
from torch import nn
from torch_geometric.nn import GCNConv

from suffice.link import EdgeSet, SplitConfig, audit, load_graph, split_edges


class MyLinkPredictor(nn.Module):
    """A GCN encoder, and a decoder with a LayerNorm over each edge."""

    def __init__(self, in_channels: int, hidden: int = 32) -> None:
        super().__init__()
        self.conv1, self.conv2 = GCNConv(in_channels, hidden), GCNConv(hidden, hidden)
        self.decoder = nn.Sequential(nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, x, edge_index, pairs):
        """Return the logits [pairs] of pairs of nodes [2, pairs]."""
        z = self.conv2(self.conv1(x, edge_index).relu(), edge_index)
        return self.decoder(z[pairs[0]] * z[pairs[1]]).squeeze(-1)


torch.manual_seed(0)
graph = load_graph("digits")
split = split_edges(graph, SplitConfig(), seed=0)
edge_index = split.message_edges()
model = MyLinkPredictor(graph.x.size(1))

# The usual training loop, with as many negatives as positives.
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(30):
    negatives = torch.randint(graph.num_nodes, split.train.shape)
    pairs = torch.cat([split.train, negatives], dim=1)
    labels = torch.cat([torch.ones(split.train.size(1)), torch.zeros(negatives.size(1))])
    loss = nn.functional.binary_cross_entropy_with_logits(model(graph.x, edge_index, pairs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# Does the score of an edge depend on the rest of its batch?
test_edges = EdgeSet(split.test, split.test_negatives)
report = audit(lambda pairs: model(graph.x, edge_index, pairs), test_edges, module=model)
print(report.verdict)
