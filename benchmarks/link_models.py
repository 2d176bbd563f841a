"""Time of epochs, preprocessing and evaluation of the models, compared with direct code, and growth with the graph.

    python benchmarks/link_models.py [--data Photo --root DATA_FOLDER] [--batches 6] [--threads 1] [--json FILE]

The authors' own code needs compiled companion packages of PyG, which do not install everywhere. We therefore compare
with `link_direct.py`, which implements the same mathematics directly in scipy and PyG. Both train on the same batches,
alternating in one process, with the authors' settings (`preset`) on a 70/10/20 split. The time of an epoch is the
median time of a step, times the number of steps of one pass over the positives. Our code draws fresh negatives and
removes the edge of each positive from sketches and features, which the direct BUDDY does not. Times are seconds of
processor time, because machines are shared. Growth is measured on block models of degree 8 with batches of 1/50 of the
edges, each in its own process. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import link_direct as direct
from machine import status
from suffice.link.batches.composition import Fixed
from suffice.link.batches.sampler import EdgeBatch, EdgeBatches
from suffice.link.data.datasets import load_graph
from suffice.link.data.graph import Graph, Split, SplitConfig, split_edges
from suffice.link.data.synthetic import block_model
from suffice.link.models import LinkPredictor, ModelSettings, Preset, preset
from suffice.link.models.base import score_in_chunks
from suffice.link.models.buddy import propagated_features
from suffice.link.models.sketched import count_cache
from suffice.link.sparse.adjacency import Adjacency, as_adjacency, remove_edges
from suffice.link.train.config import TrainConfig
from suffice.link.train.inputs import message_edges, node_features
from suffice.link.train.memory import reuse_freed_memory
from suffice.link.train.trainer import batch_loss, make_optimizer

MODELS = ("neognn", "elph", "ncn", "ncnc", "buddy")
SIZES = (10_000, 100_000, 1_000_000)  # numbers of edges
# Seconds per epoch of the authors' code, measured separately on one thread of a machine with two cores.
TABLE = {
    "Photo": {"buddy": 20.6, "elph": 845.0, "ncn": 37.0, "ncnc": 219.0, "neognn": 605.0},
    "CS": {"buddy": 55.0, "ncn": 154.0},
}


def authors(name: str, data: str) -> Preset:
    """Return the authors' settings; for Neo-GNN with their three layers."""
    found = preset(name, data)
    return found._replace(model=replace(found.model, layers=3)) if name == "neognn" else found


class Ours:
    """One of our models, its optimizer, and the step of the trainer."""

    def __init__(self, settings: ModelSettings, rate: float, graph: Graph, parts: Split) -> None:
        self.model: LinkPredictor = settings.build(graph.x.size(1)).train()
        self.x = node_features(graph, self.model, parts)
        self.parts = parts
        self.adjacency = as_adjacency(message_edges(self.model, parts, graph.num_nodes), graph.num_nodes)
        self.optimizer = make_optimizer(self.model, TrainConfig(learning_rate=rate))

    def step(self, batch: EdgeBatch) -> None:
        rest = remove_edges(self.adjacency, self.parts.train[:, batch.positive_index], self.x.size(0))
        scores = self.model.training_logits(self.x, rest, batch.pairs)
        torch.autograd.backward(torch.stack([batch_loss(part, batch) for part in scores]).sum())
        self.optimizer.step()
        self.optimizer.zero_grad()


class Theirs:
    """The direct implementation of a model, its optimizer, and a training step as its authors write it."""

    def __init__(self, name: str, settings: ModelSettings, rate: float, graph: Graph, parts: Split) -> None:
        self.model = direct_model(name, settings, graph.x.size(1)).train()
        self.x, self.train = graph.x, parts.train
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=rate)
        self.smooth, self.tables = None, None
        if name == "buddy":
            # The authors compute this before training; `preprocessing` measures its time.
            self.smooth = direct.smooth_features(graph.x, parts.train)
            self.tables = direct.Tables(graph.num_nodes, parts.train)

    def counts(self, pairs: Tensor) -> Tensor | None:
        """Return the counts of pairs that BUDDY computes before training; None for the other models."""
        return None if self.tables is None else self.tables.features(pairs)

    def step(self, batch: EdgeBatch, counts: Tensor | None) -> None:
        if counts is not None:
            loss = self.model.step(self.smooth, counts, batch.pairs, batch.labels)
        else:
            keep = torch.ones(self.train.size(1), dtype=torch.bool)
            keep[batch.positive_index] = False
            own = batch.positive_index.numel()
            loss = self.model.step(self.x, self.train[:, keep], batch.pairs[:, :own], batch.pairs[:, own:])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def scores(self, pairs: Tensor) -> Tensor:
        """Return logits, or scores with the same order, in eval mode."""
        self.model.eval()
        found = (
            self.model.scores(self.x, self.train, pairs)
            if self.tables is None
            else self.model.score(self.smooth, self.tables.features(pairs), pairs)
        )
        self.model.train()
        return found


def direct_model(name: str, settings: ModelSettings, features: int) -> nn.Module:
    if name in ("ncn", "ncnc"):
        kind = direct.DirectNCN if name == "ncn" else direct.DirectNCNC
        outer = settings.encoder_dropout or 0.0
        return kind(features, settings.hidden, settings.dropout, settings.input_dropout, outer)
    if name == "neognn":
        return direct.DirectNeoGNN(features, settings.hidden, settings.layers)
    if name == "elph":
        return direct.DirectELPH(features, settings.hidden, settings.dropout)
    return direct.DirectBUDDY(features, settings.hidden, settings.dropout)


def clock(function: Any, *arguments: Any) -> float:
    # Seconds of processor time, because the machine is shared.
    start = time.process_time()
    function(*arguments)
    return time.process_time() - start


def steps(name: str, graph: Graph, parts: Split, batches: int) -> dict[str, float]:
    """Measure training steps of our code and of the direct code, alternating, on the same batches."""
    settings, training = authors(name, graph.name)
    made = EdgeBatches(parts.train, graph.num_nodes, Fixed(), batch_size=training.batch_size, known=parts.known)
    start = time.process_time()
    drawn = list(made)
    sampling = (time.process_time() - start) / len(drawn)
    ours = Ours(settings, training.learning_rate, graph, parts)
    theirs = Theirs(name, settings, training.learning_rate, graph, parts)
    if name in ("elph", "buddy"):
        # Results that are constant over epochs are computed before, like the counts of the direct code.
        count_cache(ours.adjacency, 2).counts(parts.train)
    taken: dict[str, list[float]] = {"ours": [], "direct": []}
    for batch in drawn[: batches + 1]:
        counts = theirs.counts(batch.pairs)
        taken["ours"].append(clock(ours.step, batch))
        taken["direct"].append(clock(theirs.step, batch, counts))
    # The first step is left out: it fills the caches of the graph.
    middle = {side: statistics.median(each[1:]) for side, each in taken.items()}
    found = {f"{side}_epoch_seconds": value * len(drawn) for side, value in middle.items()}
    found["sampling_percent"] = 100 * sampling / (middle["ours"] + sampling)
    found["spread"] = (max(taken["ours"][1:]) - min(taken["ours"][1:])) / middle["ours"]
    return {**found, "speedup": middle["direct"] / middle["ours"], "steps": len(drawn)}


def preprocessing(graph: Graph, parts: Split, rounds: int) -> tuple[list[float], list[float]]:
    """Measure what BUDDY computes before training: sketches, counts of all links, propagated features."""
    negatives = torch.randint(graph.num_nodes, parts.train.shape, generator=torch.Generator().manual_seed(0))
    links = torch.cat([parts.known, negatives], dim=1)

    def ours() -> None:
        adjacency = Adjacency(parts.message_edges(), graph.num_nodes)
        propagated_features(adjacency, graph.x)
        count_cache(adjacency, 2).counts(links)

    def theirs() -> None:
        direct.smooth_features(graph.x, parts.train)
        tables = direct.Tables(graph.num_nodes, parts.train)
        for part in links.split(2**15, dim=1):
            tables.features(part)

    taken = [(clock(ours), clock(theirs)) for _ in range(rounds)]
    return [one for one, _ in taken], [other for _, other in taken]


@torch.no_grad()
def evaluation(graph: Graph, parts: Split, rounds: int) -> tuple[list[float], list[float]]:
    """Measure BUDDY's scores of validation and test pairs; both implementations have computed the counts before."""
    settings, training = preset("buddy", graph.name)
    ours = Ours(settings, training.learning_rate, graph, parts)
    model, pairs = ours.model.eval(), parts.known[:, parts.train.size(1) :]
    theirs = direct.DirectBUDDY(graph.x.size(1), settings.hidden, settings.dropout).eval()
    smooth = direct.smooth_features(graph.x, parts.train)
    counts = direct.Tables(graph.num_nodes, parts.train).features(pairs)
    model.encode(ours.x, ours.adjacency)
    score_in_chunks(model, model.encode(ours.x, ours.adjacency), pairs)  # computes the counts

    def their_scores() -> list[Tensor]:
        parts_of = zip(pairs.split(2**13, dim=1), counts.split(2**13), strict=True)
        return [theirs.score(smooth, count, part) for part, count in parts_of]

    taken: list[tuple[float, float]] = []
    for _ in range(rounds):
        one = clock(lambda: score_in_chunks(model, model.encode(ours.x, ours.adjacency), pairs))
        taken.append((one, clock(their_scores)))
    return [one for one, _ in taken], [other for _, other in taken]


def grown(name: str, edges: int) -> dict[str, float]:
    """Measure a model on a block model: construction and first step, which fills the caches, and further steps."""
    graph = block_model(nodes=edges // 4, classes=5, degree=8, features=64)
    reuse_freed_memory(graph.num_nodes, 64)  # as `suffice link train` does
    parts = split_edges(graph, SplitConfig(), 0)
    encoder = {"encoder": "pure"} if name in ("ncn", "ncnc") else {}
    settings = ModelSettings.from_dict({"name": name, "hidden": 64, **encoder}).with_norms("none", "batch")
    size = max(256, parts.train.size(1) // 50)
    start = time.process_time()
    ours = Ours(settings, 1e-3, graph, parts)
    batches = iter(EdgeBatches(parts.train, graph.num_nodes, Fixed(), batch_size=size, known=parts.known))
    ours.step(next(batches))
    first = time.process_time() - start
    each = statistics.median(clock(ours.step, next(batches)) for _ in range(3))
    return {
        "edges": graph.edges.size(1),
        "first": first,
        "epoch": each * (2 * parts.train.size(1) / size),
        # Not `ru_maxrss`: a process inherits the peak of its parent process there.
        "peak_gib": status("VmHWM") / 2**30,
    }


def growth(threads: int, sizes: tuple[int, ...]) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {}
    for name in MODELS:
        for edges in sizes:
            command = [sys.executable, "-W", "ignore", __file__, "--grown", name, str(edges), "--threads", str(threads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.setdefault(name, []).append(json.loads(done.splitlines()[-1]))
            print(f"{name}, block model: {found[name][-1]}", flush=True)
    return found


def draw(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for name, points in found.items():
        edges = [point["edges"] for point in points]
        axes[0].loglog(edges, [point["epoch"] for point in points], marker="o", label=name)
        axes[1].loglog(edges, [point["peak_gib"] for point in points], marker="o", label=name)
    for one, title in zip(axes, ("seconds an epoch", "peak memory of the process, GiB"), strict=True):
        one.set(xlabel="edges", title=title)
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def load_data(data: str, root: str) -> tuple[Graph, Split]:
    graph = load_graph(data, root)
    return graph, split_edges(graph, SplitConfig(0.1, 0.2), 0)


def measure_models(data: str, root: str, batches: int) -> dict[str, Any]:
    """Return the times of epochs on a data set."""
    graph, parts = load_data(data, root)
    models: dict[str, dict[str, float]] = {}
    for name in MODELS:
        # Some of the direct implementations take many seconds per step.
        models[name] = steps(name, graph, parts, batches if name in ("buddy", "ncn") else max(2, batches // 2))
        print(f"{name}, {data}: { ({key: round(value, 3) for key, value in models[name].items()}) }", flush=True)
    result = {
        "models_data": graph.name,
        "epoch_speedup": {name: round(each["speedup"], 2) for name, each in models.items()},
        "epoch_model_seconds": {name: round(each["ours_epoch_seconds"], 2) for name, each in models.items()},
        "epoch_direct_seconds": {name: round(each["direct_epoch_seconds"], 2) for name, each in models.items()},
        "sampling_percent_by_model": {name: round(each["sampling_percent"], 2) for name, each in models.items()},
        "step_spread": {name: round(each["spread"], 2) for name, each in models.items()},
    }
    table = {name: seconds / models[name]["ours_epoch_seconds"] for name, seconds in TABLE.get(graph.name, {}).items()}
    return result | ({"epoch_speedup_against_table": {k: round(v, 2) for k, v in table.items()}} if table else {})


def measure_once(data: str, root: str, rounds: int) -> dict[str, Any]:
    """Return the times of BUDDY's preprocessing and evaluation on a data set."""
    graph, parts = load_data(data, root)
    before, evaluated = preprocessing(graph, parts, rounds), evaluation(graph, parts, rounds)
    return {
        "preprocessing_seconds": round(statistics.median(before[0]), 3),
        "preprocessing_direct_seconds": round(statistics.median(before[1]), 3),
        "preprocessing_speedup": round(statistics.median(before[1]) / statistics.median(before[0]), 2),
        "evaluation_seconds": round(statistics.median(evaluated[0]), 3),
        "evaluation_speedup": round(statistics.median(evaluated[1]) / statistics.median(evaluated[0]), 2),
    }


def measure_growth(threads: int, figure: Path | None) -> dict[str, Any]:
    """Return how time and memory grow with the graph."""
    found = growth(threads, SIZES)
    if figure is not None:
        draw(found, figure)
    return {
        "growth": found,
        "largest_graph_edges": int(max(points[-1]["edges"] for points in found.values())),
        "largest_graph_peak_gib": round(max(points[-1]["peak_gib"] for points in found.values()), 2),
    }


def shares(data: str, root: str) -> dict[str, dict[str, float]]:
    """Return which percentage of one of our steps is spent in dense products and in sums over neighbors."""
    from torch.profiler import ProfilerActivity, profile

    graph, parts = load_data(data, root)
    found: dict[str, dict[str, float]] = {}
    for name in ("neognn", "ncn", "buddy"):
        settings, training = authors(name, graph.name)
        made = EdgeBatches(parts.train, graph.num_nodes, Fixed(), batch_size=training.batch_size, known=parts.known)
        ours = Ours(settings, training.learning_rate, graph, parts)
        drawn = [batch for batch, _ in zip(made, range(4), strict=False)]
        for batch in drawn[:2]:
            ours.step(batch)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for batch in drawn[2:]:
                ours.step(batch)
        taken = {str(event.key): float(event.self_cpu_time_total) for event in profiled.key_averages()}
        kinds = {"dense products": ("aten::mm", "aten::addmm"), "sums over neighbors": ("embedding_bag",)}
        sums = {
            kind: sum(taken[key] for key in taken if any(name in key for name in names))
            for kind, names in kinds.items()
        }
        found[name] = {kind: round(100 * value / sum(taken.values()), 1) for kind, value in sums.items()}
        print(name, found[name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--root", default="data")
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--part",
        choices=("models", "once", "growth", "shares", "all"),
        default="all",
        help="measure epochs (models), preprocessing and evaluation (once), growth, what a step consists of (shares), "
        "or all; the file keeps the rest",
    )
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--grown", nargs=2, metavar=("MODEL", "EDGES"), help="measure one model on one block model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.grown:
        print(json.dumps(grown(options.grown[0], int(options.grown[1]))))
        return
    result: dict[str, Any] = {}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text(encoding="utf-8"))
    if options.part in ("models", "all"):
        result |= measure_models(options.data, options.root, options.batches)
    if options.part in ("once", "all"):
        result |= measure_once(options.data, options.root, options.rounds)
    if options.part in ("growth", "all"):
        result |= measure_growth(options.threads, options.figure)
    if options.part in ("shares", "all"):
        result["step_shares"] = shares(options.data, options.root)
    result |= {"threads": options.threads, "machine": platform.machine(), "torch": torch.__version__}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
