"""One run of a study: train an arm, audit it, measure it; or measure a reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from suffice.link.auditing.trained import audit_trained
from suffice.link.data.datasets import load_graph
from suffice.link.data.files import read_graph, read_saved_graph
from suffice.link.data.graph import Graph, Split, SplitConfig, prepare_graph, split_edges
from suffice.link.study.run_kinds import RunSettings
from suffice.link.train.alignment import alignment, feature_alignment
from suffice.link.train.allocator import reuse_freed_memory
from suffice.link.train.config import TrainConfig
from suffice.link.train.state import EpochResult
from suffice.link.train.trainer import fit
from suffice.study.job import RunContext

AUDITED = (
    "a_pure",
    "tau",
    "kappa",
    "rank_change",
    "eval_gap",
    "auc_eval",
    "auc_pure",
    "accuracy_balanced",
    "accuracy_eval",
)


def run(settings: Mapping[str, Any], seed: int, context: RunContext) -> dict[str, Any]:
    """Train, audit and measure; the training goes on from its checkpoint if it was cut off.

    Args:
        settings: of the kind `link.correct`, complete.
        seed: of the split, the initialisation and the batches.
        context: where the checkpoint lies.

    Returns:
        `values` by metric, `facts`, `verdict`, `why` and `curve`; of a reference, the values alone.

    """
    parts = RunSettings.of(settings)
    graph, edges = graph_and_split(settings, seed, context.folder)
    if parts.reference == "raw features":
        values = {f"node_{name}": value for name, value in measure_alignment(graph.x, graph.classes).items()}
        return {"values": values, "facts": _size(graph)}
    if parts.reference:
        return {"values": alignment(parts.model.build(graph.x.size(1), seed), graph, edges), "facts": _size(graph)}
    model, train = parts.model, replace(parts.train, seed=seed)
    reuse_freed_memory(graph.num_nodes, model.hidden)
    net = model.build(graph.x.size(1), seed).to(settings["device"])
    done = fit(
        net,
        graph,
        edges,
        train,
        checkpoint=context.file(".safetensors"),
        metadata={
            "model": model.to_dict(),
            "protocol": asdict(parts.protocol),
            "graph": graph.name,
            "in": graph.x.size(1),
        },
        progress=_paced(context.log, train),
    )
    report = audit_trained(net, graph, edges, batch_size=train.batch_size, seed=seed)
    values = {**evaluate(net, graph, edges, parts.protocol, train.k), "loss": done.epochs[-1].loss}
    for part, found in report.parts.items():
        values |= {f"{metric}:{part}": found.statistics[metric].mean for metric in AUDITED}
    if graph.y is not None:
        values |= alignment(net, graph, edges)
    context.log(report.verdict.level)
    return {
        "facts": {
            "train": train.to_dict(),
            "model": model.to_dict(),
            "protocol": asdict(parts.protocol),
            "of": _size(graph),
        },
        "values": values,
        "verdict": report.verdict.level,
        "why": str(report.verdict),
        "curve": [[p.fraction, p.predicted.mean, p.accuracy.mean] for p in report.parts["heldout"].curve],
    }


def graph_and_split(settings: Mapping[str, Any], seed: int, folder: Path) -> tuple[Graph, Split]:
    """Return the graph that a run learns, prepared for its protocol, and its split."""
    source = tuple(settings[name] for name in ("data", "features", "labels", "root"))
    protocol = RunSettings.of(settings).protocol
    return _graph(folder, *source, protocol), _split(folder, *source, protocol, seed)


@lru_cache(maxsize=1)
def _graph(
    folder: Path, data: str, features: str | None, labels: str | None, root: str, protocol: SplitConfig
) -> Graph:
    suffix = Path(data).suffix
    if suffix == ".safetensors":
        return read_saved_graph(folder / data)
    return prepare_graph(read_graph(data, features, labels) if suffix else load_graph(data, root), protocol)


@lru_cache(maxsize=1)
def _split(
    folder: Path, data: str, features: str | None, labels: str | None, root: str, protocol: SplitConfig, seed: int
) -> Split:
    # The arms of a seed share its split, and come one after the other.
    return split_edges(_graph(folder, data, features, labels, root, protocol), protocol, seed)


def _size(graph: Graph) -> dict[str, Any]:
    return {"graph": graph.name, "nodes": graph.num_nodes, "edges": graph.edges.size(1), "in": graph.x.size(1)}


def _paced(log: Callable[[str], None], train: TrainConfig, seconds: float = 2.0) -> Callable[[Epoch], None]:
    last = time.monotonic()

    def show(epoch: EpochResult) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            log(f"epoch {epoch.number + 1} of {train.epochs}, loss {epoch.loss:.4f}, {train.metric} {epoch.metric:.3f}")

    return show
