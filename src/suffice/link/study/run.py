"""One run of a study: train and audit an arm, and measure its metrics and alignment; or measure a reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from suffice.link.auditing.trained import audit_trained
from suffice.link.data.graph import Graph, Split, SplitConfig, split_edges
from suffice.link.study.arms import Arm
from suffice.link.study.references import measure_raw_features
from suffice.link.study.run_settings import DataSource, RunSettings
from suffice.link.study.training import train_model
from suffice.link.train.alignment import alignment
from suffice.link.train.config import TrainConfig
from suffice.link.train.evaluate import evaluate
from suffice.link.train.state import EpochResult
from suffice.study.job import RunContext

AUDIT_STATISTICS = (
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
"""The statistics of an audit that a run reports, each for held-out and training edges (`kappa:heldout`)."""


def train_and_audit(settings: Mapping[str, Any], seed: int, context: RunContext) -> dict[str, Any]:
    """Train and audit an arm and measure its metrics and alignment, or measure the alignment of a reference.

    An interrupted training is resumed.

    Args:
        settings: complete settings of the kind `link.correct`.
        seed: seed of the split, the initial parameters and the batches.
        context: folder of the checkpoint, and the log.

    Returns:
        `values` by metric and `graph`; of an arm also `verdict`, `why`, `curve` and the `model`, `train` and `split`
        settings that were used.

    """
    run = RunSettings.from_dict(settings)
    graph, split = load_graph_and_split(run, seed, context.folder)
    if graph.y is not None:
        _ = graph.classes  # raises before any training if there is only one class
    if isinstance(run.arm, Arm):
        return _train_arm(run, run.arm, graph, split, seed, context)
    if run.arm == "raw features":
        return {"values": measure_raw_features(graph, context.folder, context.log), "graph": _describe(graph)}
    model = run.model.build(graph.num_features, seed)
    return {"values": alignment(model, graph, split, log=context.log), "graph": _describe(graph)}


def load_graph_and_split(run: RunSettings, seed: int, folder: Path) -> tuple[Graph, Split]:
    """Return the prepared graph of a run and its split.

    Args:
        run: settings of the run.
        seed: seed of the split.
        folder: folder of the study.

    """
    return _load_graph(folder, run.data, run.split), _split(folder, run.data, run.split, seed)


def _train_arm(
    run: RunSettings, arm: Arm, graph: Graph, split: Split, seed: int, context: RunContext
) -> dict[str, Any]:
    model_settings = arm.apply_to_model(run.model)
    config = arm.apply_to_training(run.train, seed)
    model, result = train_model(
        graph,
        split,
        run.split,
        model_settings,
        config,
        device=run.device,
        checkpoint=context.file(".safetensors"),
        on_epoch=_log_epochs(context.log, config),
    )
    report = audit_trained(model, graph, split, batch_size=config.batch_size, seed=seed)
    values = {**evaluate(model, graph, split, run.split, config.k), "loss": result.epochs[-1].loss}
    for part, part_report in report.parts.items():
        values |= {f"{name}:{part}": part_report.statistics[name].mean for name in AUDIT_STATISTICS}
    if graph.y is not None:
        values |= alignment(model, graph, split, log=context.log)
    context.log(report.verdict.level)
    return {
        "values": values,
        "verdict": report.verdict.level,
        "why": str(report.verdict),
        "curve": [[p.fraction, p.predicted.mean, p.accuracy.mean] for p in report.parts["heldout"].curve],
        "model": model_settings.to_dict(),
        "train": config.to_dict(),
        "split": asdict(run.split),
        "graph": _describe(graph),
    }


# The arms of a seed are run one after the other, with the same graph and split.
@lru_cache(maxsize=1)
def _load_graph(folder: Path, data: DataSource, config: SplitConfig) -> Graph:
    return data.load(folder, config)


@lru_cache(maxsize=1)
def _split(folder: Path, data: DataSource, config: SplitConfig, seed: int) -> Split:
    return split_edges(_load_graph(folder, data, config), config, seed)


def _describe(graph: Graph) -> dict[str, Any]:
    sizes = {"nodes": graph.num_nodes, "edges": graph.edges.size(1), "features": graph.num_features}
    return {"name": graph.name, **sizes}


def _log_epochs(log: Callable[[str], None], config: TrainConfig, seconds: float = 2.0) -> Callable[[EpochResult], None]:
    """Return a callback that logs an epoch every few seconds."""
    last = time.monotonic()

    def show(epoch: EpochResult) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            metric = f"{config.metric} {epoch.metric:.3f}"
            log(f"epoch {epoch.number + 1} of {config.epochs}, loss {epoch.loss:.4f}, {metric}")

    return show
