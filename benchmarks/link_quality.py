"""Quality of the fast models: validation Hits@100 of this package and of direct implementations.

    python benchmarks/link_quality.py [--data Cora --root DATA_FOLDER] [--epochs 10] [--seeds 3] [--json FILE]

Both models of a pair are trained on the same split and the same batches with the published settings; they differ in
their initial weights and dropout masks. Prints both means and the paired difference with its 95 % t interval. The last
line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from link_models import MODELS, Ours, Theirs, authors
from machine import machine
from suffice.link.batches.composition import Fixed
from suffice.link.batches.sampler import EdgeBatches
from suffice.link.data.datasets import load_graph
from suffice.link.data.graph import Graph, SplitConfig, split_edges
from suffice.link.metrics import compute_metrics
from suffice.link.train.evaluate import score_validation_edges
from suffice.study.results import mean_interval


def train_pair(name: str, graph: Graph, seed: int, epochs: int) -> tuple[float, float]:
    """Train both implementations on the same batches, and return their validation Hits@100 in percent."""
    parts = split_edges(graph, SplitConfig(0.1, 0.2), seed)
    settings, training = authors(name, graph.name)
    rate = training.learning_rate
    torch.manual_seed(seed)
    ours = Ours(settings, rate, graph, parts)
    theirs = Theirs(name, settings, rate, graph, parts)
    batches = EdgeBatches(
        parts.train, graph.num_nodes, Fixed(), batch_size=training.batch_size, known=parts.known, seed=seed
    )
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for batch in batches:
            ours.step(batch)
            theirs.step(batch, theirs.counts(batch.pairs))
    our_scores = score_validation_edges(ours.model, ours.x, ours.adjacency, parts)
    pairs = torch.cat([parts.validation, parts.validation_negatives], dim=1)
    their_scores = theirs.scores(pairs).split([parts.validation.size(1), parts.validation_negatives.size(1)])
    our_hits, their_hits = (100 * compute_metrics(*scores, 100)["hits@100"] for scores in (our_scores, their_scores))
    return our_hits, their_hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--root", default="data")
    parser.add_argument("--models", default=",".join(MODELS), help="names, separated by commas")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to which the results of the data set are added")
    options = parser.parse_args()
    torch.set_num_threads(1)
    graph = load_graph(options.data, options.root)
    rows: dict[str, Any] = {}
    for name in options.models.split(","):
        hits = [train_pair(name, graph, seed, options.epochs) for seed in range(options.seeds)]
        difference = mean_interval([ours - direct for ours, direct in hits])
        rows[name] = {
            "ours": round(fmean(ours for ours, _ in hits), 1),
            "direct": round(fmean(direct for _, direct in hits), 1),
            "difference": [round(value, 1) for value in (difference.mean, difference.low, difference.high)],
        }
        print(f"{name}, {graph.name}: {rows[name]}", flush=True)
    about = {"epochs": options.epochs, "seeds": options.seeds, "machine": machine()}
    result = {graph.name: {**about, "validation_hits@100": rows}}
    if options.json:
        before = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
        options.json.write_text(json.dumps(before | result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
