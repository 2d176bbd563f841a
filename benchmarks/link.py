"""Training speed of `retain.link` against a plain PyG loop, on the same model, graph and batches' size.

    python benchmarks/link.py [--data Cora --root DATA_FOLDER] [--threads 1] [--epochs 5]

The plain loop is written as PyG's link prediction examples are: per step it draws as many negatives as
positives, embeds the graph, scores both at once. Both mask no more than the other: the targets of a batch.
The two alternate epoch by epoch in one process. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch_geometric.utils import negative_sampling

from retain.link.composition import Random
from retain.link.data import load
from retain.link.graph import Graph, Protocol, Split, split
from retain.link.models import LinkPredictor, ModelSettings, mask_targets
from retain.link.sampling import EdgeBatches
from retain.link.training import TrainSettings, fit

BATCH = 512


def plain_epoch(model: LinkPredictor, graph: Graph, parts: Split, optimizer: torch.optim.Optimizer) -> int:
    model.train()
    messages, edges = parts.messages(), 0
    for index in torch.randperm(parts.train.size(1)).split(BATCH // 2):
        positives = parts.train[:, index]
        negatives = negative_sampling(messages, graph.num_nodes, num_neg_samples=index.numel())
        pairs = torch.cat([positives, negatives], dim=1)
        labels = torch.cat([torch.ones(positives.size(1)), torch.zeros(negatives.size(1))])
        optimizer.zero_grad()
        scores = model(graph.x, mask_targets(messages, positives, graph.num_nodes), pairs)
        torch.nn.functional.binary_cross_entropy_with_logits(scores, labels).backward()
        optimizer.step()
        edges += pairs.size(1)
    return edges


def sampler_seconds(graph: Graph, parts: Split, epoch: int) -> float:
    batches = EdgeBatches(parts.train, graph.num_nodes, Random(), batch_size=BATCH, known=parts.known, balanced=True)
    batches.set_epoch(epoch)
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--root", default="data")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    graph = load(options.data, options.root)
    parts = split(graph, Protocol(), 0)
    plain = ModelSettings().build(graph.x.size(1))
    optimizer = torch.optim.Adam(plain.parameters(), lr=5e-3)
    seconds = {"ours": 0.0, "plain": 0.0, "sampler": 0.0}
    edges = {"ours": 0, "plain": 0}
    plain_epoch(plain, graph, parts, optimizer)  # warm-up
    for epoch in range(options.epochs):
        start = time.perf_counter()
        edges["plain"] += plain_epoch(plain, graph, parts, optimizer)
        seconds["plain"] += time.perf_counter() - start
        model = ModelSettings().build(graph.x.size(1))
        settings = TrainSettings(Random(), balanced=True, epochs=1, batch_size=BATCH, seed=epoch)
        start = time.perf_counter()
        done = fit(model, graph, parts, settings)  # with its validation, as users run it
        seconds["ours"] += time.perf_counter() - start
        seconds["sampler"] += sampler_seconds(graph, parts, epoch)
        edges["ours"] += BATCH * len(done.epochs[0].fractions)
        print(f"epoch {epoch}: ours {seconds['ours']:.2f} s, plain {seconds['plain']:.2f} s, in sum")
    print(
        json.dumps(
            {
                "data": graph.name,
                "threads": options.threads,
                "torch": torch.__version__,
                "train_edges_per_second": round(edges["ours"] / seconds["ours"]),
                "plain_pyg_edges_per_second": round(edges["plain"] / seconds["plain"]),
                "sampler_percent_of_step": round(100 * seconds["sampler"] / seconds["ours"], 2),
            }
        )
    )


if __name__ == "__main__":
    main()
