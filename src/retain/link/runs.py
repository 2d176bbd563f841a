"""The side-by-side study: the same model trained on biased and on corrected batches, and what each keeps."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retain.link.arms import ARMS, Arm
from retain.link.embeddings import alignment, embeddings, raw_alignment
from retain.link.graph import Graph, Protocol, Split, prepare, split
from retain.link.models import ModelSettings
from retain.link.study import Run, Study
from retain.link.trained import audit_trained, held_out_scores, load_trained
from retain.link.training import Epoch, TrainSettings, fit

_AUDITED = (
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
Progress = Callable[[str], None]


def correct(
    graph: Graph,
    *,
    arms: Sequence[Arm] = ARMS,
    model: ModelSettings | None = None,
    train: TrainSettings | None = None,
    protocol: Protocol | None = None,
    seeds: int = 5,
    seed: int = 0,
    device: str = "cpu",
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Study:
    """Train every arm on the same splits, audit it, and measure metrics and alignment.

    Args:
        graph: what to learn.
        arms: ways of training, norms included.
        model: everything else of the model.
        train: everything else of the training.
        protocol: the split.
        seeds: repetitions, each with its own split, initialisation and batches.
        seed: the first of them.
        device: where to train.
        folder: a file for each finished run and a checkpoint for each model, to go on from.
        progress: called with a line for each finished run, and every few seconds within one.

    Raises:
        ValueError: there is no arm or no seed, or two arms are the same.

    """
    if seeds < 1 or not arms or len({arm.key for arm in arms}) < len(arms):
        raise ValueError(f"seeds, arms are {seeds}, {[arm.key for arm in arms]}; accepted: 1 or more, distinct")
    model, train, protocol = model or ModelSettings(), train or TrainSettings(), protocol or Protocol()
    say = progress or (lambda _: None)
    graph = prepare(graph, protocol)
    numbers = range(seed, seed + seeds)
    settings = {
        "model": asdict(model),
        "train": train.describe(),
        "protocol": asdict(protocol),
        "seeds": list(numbers),
        "torch": torch.__version__,
    }
    runs: dict[str, list[Run]] = {arm.key: [] for arm in arms}
    for number in numbers:
        parts = split(graph, protocol, number)
        for arm in arms:
            path = None if folder is None else _path(folder, graph, arm, number)
            own = arm.model(model), arm.train(train, number)
            run = _run(graph, parts, *own, protocol, device, path, say, f"seed {number} {arm.key}")
            runs[arm.key].append(run)
            say(f"seed {number} {arm.key}: {run['verdict']}")
    references: dict[str, list[Run]] = {}
    if graph.y is not None:
        raw = _raw(graph, folder)
        fresh = [(model.build(graph.x.size(1), n), split(graph, protocol, n)) for n in numbers]
        references["raw features"] = [raw] * seeds
        references["untrained"] = [{"values": alignment(net, graph, parts)} for net, parts in fresh]
    return Study(graph.name, settings, runs, references)


def edge_maps(
    graph: Graph, arms: Sequence[Arm], folder: str | Path, *, protocol: Protocol | None = None, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return incident-edge means and classes of arms that `correct` trained in a folder.

    Args:
        graph: the study's.
        arms: which of the study's.
        folder: the study's.
        protocol: the study's.
        seed: of the split and the training.

    Raises:
        CheckpointError: the folder holds no such training.
        ValueError: the data set has no labels.

    """
    protocol = protocol or Protocol()
    graph = prepare(graph, protocol)
    parts = split(graph, protocol, seed)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for arm in arms:
        net, _ = load_trained(_beside(_path(folder, graph, arm, seed), ".safetensors"))
        found[arm.key] = embeddings(net, graph, parts)["edge"]
    return found


def _run(
    graph: Graph,
    parts: Split,
    model: ModelSettings,
    train: TrainSettings,
    protocol: Protocol,
    device: str,
    path: Path | None,
    say: Progress,
    name: str,
) -> Run:
    described = {"train": train.describe(), "model": asdict(model), "protocol": asdict(protocol), "of": _size(graph)}
    if (run := _cached(path, described)) is not None:
        return run
    net = model.build(graph.x.size(1), train.seed).to(device)
    done = fit(
        net,
        graph,
        parts,
        train,
        checkpoint=None if path is None else _beside(path, ".safetensors"),
        facts={"model": asdict(model), "protocol": asdict(protocol), "graph": graph.name, "in": graph.x.size(1)},
        progress=_paced(say, name, train),
    )
    report = audit_trained(net, graph, parts, batch_size=train.batch_size, seed=train.seed)
    values = {**held_out_scores(net, graph, parts, protocol, train.k), "loss": done.epochs[-1].loss}
    for part, found in report.parts.items():
        values |= {f"{metric}:{part}": found.statistics[metric].mean for metric in _AUDITED}
    if graph.y is not None:
        values |= alignment(net, graph, parts)
    curve = [[point.fraction, point.predicted.mean, point.accuracy.mean] for point in report.parts["heldout"].curve]
    verdict = report.verdict
    run = {"facts": described, "values": values, "verdict": verdict.level, "why": str(verdict), "curve": curve}
    _write(path, run)
    return run


def _paced(say: Progress, name: str, train: TrainSettings, seconds: float = 5.0) -> Callable[[Epoch], None]:
    last = time.monotonic()

    def show(epoch: Epoch) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            say(
                f"{name}: epoch {epoch.number + 1} of {train.epochs}, loss {epoch.loss:.4f}, "
                f"{train.metric} {epoch.metric:.3f}"
            )

    return show


def _raw(graph: Graph, folder: str | Path | None) -> Run:
    path = None if folder is None else Path(folder) / f"{graph.name}-raw"
    run = _cached(path, _size(graph))
    if run is None:
        values = {name.replace("raw_", "node_"): value for name, value in raw_alignment(graph).items()}
        run = {"values": values, "facts": _size(graph)}
        _write(path, run)
    return run


def _size(graph: Graph) -> dict[str, Any]:
    return {"graph": graph.name, "nodes": graph.num_nodes, "edges": graph.edges.size(1), "in": graph.x.size(1)}


def _path(folder: str | Path, graph: Graph, arm: Arm, seed: int) -> Path:
    return Path(folder) / f"{graph.name}-{arm.key}-{seed}".replace("/", "-").replace("+", "-")


def _cached(path: Path | None, facts: Mapping[str, Any]) -> Run | None:
    if path is None or not _beside(path, ".json").exists():
        return None
    run = json.loads(_beside(path, ".json").read_text(encoding="utf-8"))
    return run if run["facts"] == json.loads(json.dumps(facts)) else None


def _write(path: Path | None, content: Run) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    half = _beside(path, ".part")
    half.write_text(json.dumps(content), encoding="utf-8")
    os.replace(half, _beside(path, ".json"))


def _beside(path: Path, ending: str) -> Path:
    # Not `with_suffix`: names of data sets may hold dots.
    return path.with_name(path.name + ending)
