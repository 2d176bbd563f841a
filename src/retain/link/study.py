"""The side-by-side study: the same model trained on biased and on corrected batches, and what each keeps."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from retain.link.composition import Composition, Fixed, Random, Separate
from retain.link.embeddings import alignment, raw_alignment
from retain.link.graph import Graph, Protocol, Split, prepare, split
from retain.link.intervals import Interval, over_seeds
from retain.link.models import ModelSettings
from retain.link.trained import audit_trained, held_out_scores
from retain.link.training import TrainSettings, fit

_AUDITED = ("a_pure", "tau", "kappa", "rank_change", "eval_gap", "auc_eval", "auc_pure", "accuracy_balanced")
_MEASURES = ("nmi", "trace_ratio", "probe", "class_information")
_VERDICTS = ("unaffected", "affected", "dominated")


@dataclass(frozen=True)
class Arm:
    """One way of training: composition, loss and norms.

    Args:
        name: `fixed`, `random`, `random+balanced` or `separate`.
        composition: positives in a mini-batch.
        balanced: weight both classes the same.
        norm: of encoder and decoder.
        learning_rate: Adam's; None for that of the study.

    """

    name: str
    composition: Composition
    balanced: bool = False
    norm: str = "batch"
    learning_rate: float | None = None

    @property
    def key(self) -> str:
        """Name and norm."""
        return f"{self.name}/{self.norm}"


# LayerNorm under random fractions collapses at the rate that suits BatchNorm, so that its arms share a lower.
ARMS = (
    Arm("fixed", Fixed()),
    Arm("random", Random()),
    Arm("random+balanced", Random(), balanced=True),
    Arm("separate", Separate()),
    Arm("fixed", Fixed(), norm="layer", learning_rate=1e-3),
    Arm("random", Random(), norm="layer", learning_rate=1e-3),
    Arm("random+balanced", Random(), balanced=True, norm="layer", learning_rate=1e-3),
    Arm("fixed", Fixed(), norm="none"),
)
PAIRS = (
    ("random/batch", "fixed/batch"),
    ("random+balanced/batch", "fixed/batch"),
    ("separate/batch", "fixed/batch"),
    ("fixed/layer", "fixed/batch"),
    ("random/layer", "fixed/layer"),
    ("random+balanced/layer", "fixed/layer"),
)


@dataclass(frozen=True)
class Study:
    """What a study measured: for each arm and seed, metrics by (name, split); and how."""

    graph: str
    settings: dict[str, Any]
    runs: dict[str, list[dict[str, Any]]]  # by arm, in the order of the seeds

    def rows(self) -> list[dict[str, Any]]:
        """Return mean and interval over seeds of every arm and metric; 95 %, Student's t."""
        rows: list[dict[str, Any]] = []
        for key, runs in self.runs.items():
            for metric in runs[0]["values"]:
                values = [run["values"][metric] for run in runs]
                rows.append({**_names(key, metric), **asdict(over_seeds(values))})
        return rows

    def differences(self) -> list[dict[str, Any]]:
        """Return paired differences between arms, seed by seed, with 95 % t intervals."""
        rows: list[dict[str, Any]] = []
        for one, other in PAIRS:
            if one in self.runs and other in self.runs:
                for metric in self.runs[one][0]["values"]:
                    rows.append(
                        {
                            "of": one,
                            "minus": other,
                            **{k: v for k, v in _names(one, metric).items() if k in ("metric", "split")},
                            **asdict(self.difference(one, other, metric)),
                        }
                    )
        return rows

    def values(self, arm: str, metric: str) -> list[float]:
        """Return a metric's value for each seed; `kappa:heldout` names metric and split."""
        return [run["values"][metric] for run in self.runs[arm]]

    def difference(self, one: str, other: str, metric: str) -> Interval:
        """Return the paired difference of two arms."""
        pairs = zip(self.values(one, metric), self.values(other, metric), strict=True)
        return over_seeds([first - second for first, second in pairs])

    def to_dict(self) -> dict[str, Any]:
        """Return the study as JSON holds it: `rows`, `differences`, verdicts, settings."""
        return {
            "graph": self.graph,
            "settings": self.settings,
            "rows": self.rows(),
            "differences": self.differences(),
            "verdicts": {key: [run["verdict"] for run in runs] for key, runs in self.runs.items()},
            "curves": {key: runs[0]["curve"] for key, runs in self.runs.items()},
        }


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
    progress: Callable[[str], None] | None = None,
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
        folder: a file for each finished run, and for runs under way, to go on from.
        progress: called with a line for each finished run.

    Raises:
        ValueError: there is no arm or no seed, or two arms are the same.

    """
    if seeds < 1 or not arms or len({arm.key for arm in arms}) < len(arms):
        raise ValueError(f"seeds, arms are {seeds}, {[arm.key for arm in arms]}; accepted: 1 or more, distinct")
    model, train, protocol = model or ModelSettings(), train or TrainSettings(), protocol or Protocol()
    graph = prepare(graph, protocol)
    settings = {
        "model": asdict(model),
        "train": train.describe(),
        "protocol": asdict(protocol),
        "seeds": list(range(seed, seed + seeds)),
        "torch": torch.__version__,
    }
    runs: dict[str, list[dict[str, Any]]] = {arm.key: [] for arm in arms}
    if graph.y is not None:
        runs["raw features"] = []
        runs["untrained"] = []
    for number in range(seed, seed + seeds):
        parts = split(graph, protocol, number)
        for arm in arms:
            path = (
                None
                if folder is None
                else Path(folder) / f"{graph.name}-{arm.key}-{number}".replace("/", "-").replace("+", "-")
            )
            own = replace(
                train,
                composition=arm.composition,
                balanced=arm.balanced,
                learning_rate=arm.learning_rate or train.learning_rate,
                seed=number,
            )
            layers = replace(model, encoder_norm=arm.norm, decoder_norm=arm.norm)
            run = _cached(path, {"train": own.describe(), "model": asdict(layers), "protocol": asdict(protocol)})
            if run is None:
                run = _run(graph, parts, layers, own, protocol, device, path)
                if path is not None:
                    _write(path.with_suffix(".json"), run)
            runs[arm.key].append(run)
            if progress is not None:
                progress(f"seed {number} {arm.key}: {run['verdict']}")
        if graph.y is not None:
            if not runs["raw features"]:  # the same for every seed
                runs["raw features"] = [_raw(graph, folder)] * seeds
            fresh = model.build(graph.x.size(1), number)
            runs["untrained"].append(_reference(alignment(fresh, graph, parts, measures=_MEASURES)))
    return Study(graph.name, settings, runs)


def _run(
    graph: Graph,
    parts: Split,
    model: ModelSettings,
    train: TrainSettings,
    protocol: Protocol,
    device: str,
    path: Path | None,
) -> dict[str, Any]:
    net = model.build(graph.x.size(1), train.seed).to(device)
    checkpoint = None if path is None else path.with_suffix(".safetensors")
    facts = {"model": asdict(model), "protocol": asdict(protocol), "graph": graph.name, "in": graph.x.size(1)}
    done = fit(net, graph, parts, train, checkpoint=checkpoint, facts=facts)
    report = audit_trained(net, graph, parts, batch_size=train.batch_size, seed=train.seed)
    values = {**held_out_scores(net, graph, parts, protocol, train.k), "loss": done.epochs[-1].loss}
    for name, part in report.parts.items():
        values |= {f"{metric}:{name}": part.statistics[metric].mean for metric in _AUDITED}
    if graph.y is not None:
        values |= alignment(net, graph, parts, measures=_MEASURES)
    curve = [[point.fraction, point.predicted.mean, point.accuracy.mean] for point in report.parts["heldout"].curve]
    return {
        "facts": {"train": train.describe(), "model": asdict(model), "protocol": asdict(protocol)},
        "values": values,
        "verdict": report.verdict.level,
        "why": str(report.verdict),
        "curve": curve,
    }


def _raw(graph: Graph, folder: str | Path | None) -> dict[str, Any]:
    path = None if folder is None else Path(folder) / f"{graph.name}-raw.json"
    facts = {"nodes": graph.num_nodes, "edges": graph.edges.size(1), "features": graph.x.size(1)}
    run = _cached(path, facts)
    if run is None:
        run = {**_reference(raw_alignment(graph, measures=_MEASURES)), "facts": facts}
        if path is not None:
            _write(path, run)
    return run


def _reference(values: Mapping[str, float]) -> dict[str, Any]:
    kept = {name.replace("raw_", "node_"): value for name, value in values.items()}
    return {"values": kept, "verdict": "unaffected", "why": "", "curve": []}


def _names(key: str, metric: str) -> dict[str, Any]:
    arm, _, norm = key.partition("/")
    name, _, part = metric.partition(":")
    row = {"arm": arm, "encoder_norm": norm or "none", "decoder_norm": norm or "none", "metric": name}
    return {**row, "split": part} if part else row


def _cached(path: Path | None, facts: dict[str, Any]) -> dict[str, Any] | None:
    if path is None or not path.with_suffix(".json").exists():
        return None
    run = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return run if run["facts"] == json.loads(json.dumps(facts)) else None


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    half.write_text(json.dumps(content), encoding="utf-8")
    os.replace(half, path)
