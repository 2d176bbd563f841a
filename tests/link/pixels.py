"""Decoders of pairs of digits, trained with one negative for each positive: with BatchNorm, they look at the batch."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from suffice.link import EdgeSet, SplitConfig, load_graph, split_edges

GRAPH = load_graph("digits")
SPLIT = split_edges(GRAPH, SplitConfig(), seed=0)
EDGES = EdgeSet(SPLIT.test, SPLIT.test_negatives)


class PixelDecoder(nn.Module):
    """A perceptron over the product of the pixels of two digits."""

    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("x", GRAPH.x)
        self.first, self.norm, self.last = nn.Linear(GRAPH.x.size(1), 32), norm(32), nn.Linear(32, 1)

    def forward(self, pairs):
        hidden = self.norm(self.first(self.x[pairs[0]] * self.x[pairs[1]]))
        return self.last(hidden.relu()).squeeze(-1)


def train_steps(model, steps=40, seed=0):
    """Train in place, and yield after each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(512) < 256).float()
    for step in range(steps):
        chosen = torch.randint(SPLIT.train.size(1), (256,), generator=generator)
        negatives = torch.randint(GRAPH.num_nodes, (2, 256), generator=generator)
        logits = model(torch.cat([SPLIT.train[:, chosen], negatives], 1))
        optimizer.zero_grad()
        functional.binary_cross_entropy_with_logits(logits, labels).backward()
        optimizer.step()
        yield step


def trained(norm=nn.BatchNorm1d):
    model = PixelDecoder(norm)
    for _ in train_steps(model):
        pass
    return model
