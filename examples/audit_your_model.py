"""Audit a link predictor of your own, written in plain PyG.

python examples/audit_your_model.py
"""

import torch
from torch_geometric.nn import GCNConv

from suffice.link import EdgeSet, SplitConfig, audit, load_graph, split_edges


class Mine(torch.nn.Module):
    """A GCN and a perceptron over the product of the ends, with a LayerNorm over each pair."""

    def __init__(self, features: int, hidden: int = 32) -> None:
        super().__init__()
        self.first, self.second = GCNConv(features, hidden), GCNConv(hidden, hidden)
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(hidden, hidden), torch.nn.LayerNorm(hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 1)
        )

    def forward(self, x, edge_index, pairs):
        """Score pairs, [2, pairs], as logits [pairs]."""
        z = self.second(self.first(x, edge_index).relu(), edge_index)
        return self.decoder(z[pairs[0]] * z[pairs[1]]).squeeze(-1)


torch.manual_seed(0)
graph = load_graph("digits")  # or your own edge list, see suffice.link.data.files.read_graph
parts = split_edges(graph, SplitConfig(), seed=0)
model, messages = Mine(graph.x.size(1)), parts.message_edges()
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(30):
    negatives = torch.randint(graph.num_nodes, parts.train.shape)
    pairs = torch.cat([parts.train, negatives], dim=1)
    labels = torch.cat([torch.ones(parts.train.size(1)), torch.zeros(negatives.size(1))])
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(graph.x, messages, pairs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

held_out = EdgeSet(parts.test, parts.test_negatives)
report = audit(lambda pairs: model(graph.x, messages, pairs), held_out, module=model)
print(report.verdict)
