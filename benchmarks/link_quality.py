"""Whether the faster models are as good: validation Hits@100 of ours and of the direct code after the same batches.

    python benchmarks/link_quality.py [--data Cora --root DATA_FOLDER] [--epochs 10] [--seeds 3] [--json FILE]

Both sides of a pair train on one split, in the same order of batches with the same negatives, with the authors'
settings; only their initial weights and their dropout differ. Prints both means and the paired difference with its
95 % Student t interval; last line: one JSON object.
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


def pair(name: str, graph: Graph, seed: int, epochs: int) -> tuple[float, float]:
    """Return Hits@100 of ours and of the direct code, in percent, after the same batches."""
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
    both = torch.cat([parts.validation, parts.validation_negatives], dim=1)
    found = theirs.scores(both)
    size = parts.validation.size(1)
    sides = score_validation_edges(ours.model, ours.x, ours.adjacency, parts), (found[:size], found[size:])
    one, other = (100 * compute_metrics(*scores, 100)["hits@100"] for scores in sides)
    return one, other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--root", default="data")
    parser.add_argument("--models", default=",".join(MODELS), help="with commas")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to add the data set to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    graph = load_graph(options.data, options.root)
    rows: dict[str, Any] = {}
    for name in options.models.split(","):
        found = [pair(name, graph, seed, options.epochs) for seed in range(options.seeds)]
        gap = mean_interval([one - other for one, other in found])
        rows[name] = {
            "ours": round(fmean(one for one, _ in found), 1),
            "direct": round(fmean(other for _, other in found), 1),
            "difference": [round(value, 1) for value in (gap.mean, gap.low, gap.high)],
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
