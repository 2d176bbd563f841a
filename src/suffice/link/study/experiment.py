"""One way of training, repeated with several seeds: test each model, audit it, or measure its alignment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from suffice.link.auditing.audit import AuditReport
from suffice.link.auditing.trained import audit_trained
from suffice.link.data.graph import Graph, Split, SplitConfig, prepare_graph, split_edges, with_enough_negatives
from suffice.link.models import LinkPredictor, ModelSettings
from suffice.link.study.checkpoint_files import CheckpointFiles, file_of_seed
from suffice.link.study.results import limit_interval
from suffice.link.study.training import train_model
from suffice.link.train.alignment import alignment, feature_alignment
from suffice.link.train.checkpoint import check_data, load_trained
from suffice.link.train.config import TrainConfig
from suffice.link.train.evaluate import evaluate
from suffice.link.train.state import EpochResult
from suffice.study.results import mean_interval

OnEpoch = Callable[[EpochResult], None]


@dataclass(frozen=True)
class Experiment:
    """A graph, a model and its training; everything but the seed.

    If the split has fewer negatives than Hits@K needs, more are drawn (see `with_enough_negatives`).

    Args:
        graph: graph to learn.
        model: settings of the model.
        train: settings of the training; its seed is replaced by that of each repetition.
        split: settings of the split.
        device: device to train on.

    """

    graph: Graph
    model: ModelSettings
    train: TrainConfig = field(default_factory=TrainConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    device: str = "cpu"

    def fit(
        self, seed: int, *, checkpoint: Path | None = None, on_epoch: OnEpoch | None = None
    ) -> tuple[LinkPredictor, Graph, Split]:
        """Train a model, and return it with its graph and split.

        Args:
            seed: seed of the split, the initial parameters and the batches.
            checkpoint: file to write after each epoch. If it exists, the training resumes from it.
            on_epoch: called with the result of each epoch.

        """
        graph = prepare_graph(self.graph, self.split)
        config = with_enough_negatives(self.split, graph, self.train.k)
        split = split_edges(graph, config, seed)
        model, _ = train_model(
            graph,
            split,
            config,
            self.model,
            replace(self.train, seed=seed),
            device=self.device,
            checkpoint=checkpoint,
            on_epoch=on_epoch,
        )
        return model, graph, split


def evaluate_seeds(
    experiment: Experiment,
    seeds: Sequence[int],
    *,
    save: Path | None = None,
    resume: Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> list[dict[str, float]]:
    """Train a model with each seed, and return its metrics on the test edges, see `evaluate`.

    Args:
        experiment: what to train.
        seeds: seed of each repetition.
        save: new file to write after each epoch, see `CheckpointFiles`.
        resume: checkpoint of a training that goes on.
        on_epoch: called with the result of each epoch.

    Raises:
        ValueError: the file to save exists, or the checkpoint to resume is missing.

    """
    files = CheckpointFiles(save=save, resume=resume)
    files.check(seeds)
    metrics: list[dict[str, float]] = []
    for seed in seeds:
        path = files.training(seed, seeds)
        model, graph, split = experiment.fit(seed, checkpoint=path, on_epoch=on_epoch)
        metrics.append(evaluate(model, graph, split, experiment.split, experiment.train.k))
    return metrics


def audit_seeds(
    experiment: Experiment,
    seeds: Sequence[int],
    *,
    checkpoint: Path | None = None,
    save: Path | None = None,
    resume: Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> list[AuditReport]:
    """Audit one model for each seed, and compare its metrics in batches of several compositions.

    Args:
        experiment: what to train. Only its graph matters if there is a checkpoint.
        seeds: seed of each repetition.
        checkpoint: checkpoint of a trained model, see `CheckpointFiles`; None trains a model first.
        save: new file to write after each epoch of this training.
        resume: checkpoint of a training that goes on before the audit.
        on_epoch: called with the result of each epoch.

    Raises:
        ValueError: more than one file is given, the checkpoint or the file to resume is missing, the file to save
            exists, or a checkpoint is of a model that was trained on another graph.

    """
    files = CheckpointFiles(checkpoint, save, resume)
    files.check(seeds, load="checkpoint")
    reports: list[AuditReport] = []
    for seed in seeds:
        if files.load is not None:
            path = file_of_seed(files.load, seed, seeds)
            reports.append(audit_checkpoint(path, experiment.graph, device=experiment.device, seed=seed))
        else:
            model, graph, split = experiment.fit(seed, checkpoint=files.training(seed, seeds), on_epoch=on_epoch)
            batch_size = experiment.train.batch_size
            reports.append(audit_trained(model, graph, split, batch_size=batch_size, metrics=True, seed=seed))
    return reports


def audit_checkpoint(path: Path, graph: Graph, *, device: str = "cpu", seed: int = 0) -> AuditReport:
    """Audit the model of a checkpoint, with metrics, on the split that it was trained with.

    Args:
        path: checkpoint that `suffice link` or a study wrote.
        graph: graph that the model was trained on.
        device: device to audit on.
        seed: seed of the audit.

    Raises:
        CheckpointError: the file is not a checkpoint of a trained model, or its model was trained on another graph.
        ValueError: the model was trained on a graph with another name.

    """
    model, metadata = load_trained(path, device)
    config, train = SplitConfig(**metadata["split"]), metadata["settings"]
    graph = prepare_graph(graph, config)
    if metadata["graph"] != graph.name:
        raise ValueError(f"data must be {metadata['graph']} for checkpoint {path}, got {graph.name}")
    split = split_edges(graph, config, train["seed"])
    check_data(path, metadata, graph, split)
    return audit_trained(model, graph, split, batch_size=train["batch_size"], metrics=True, seed=seed)


def align_seeds(
    experiment: Experiment,
    seeds: Sequence[int],
    *,
    on_epoch: OnEpoch | None = None,
    log: Callable[[str], None] | None = None,
) -> dict[str, list[dict[str, float]]]:
    """Measure the alignment with the node classes of a trained model, an untrained model and the features.

    Args:
        experiment: what to train.
        seeds: seed of each repetition.
        on_epoch: called with the result of each epoch.
        log: called before each measure is computed, which may take minutes.

    Returns:
        The measures of each repetition, under `trained`, `untrained` and, if the graph has features, `raw features`.

    Raises:
        ValueError: the graph has no classes, or only one.

    """
    _ = prepare_graph(experiment.graph, experiment.split).classes  # raises before any training
    measures: dict[str, list[dict[str, float]]] = {"trained": [], "untrained": [], "raw features": []}
    for seed in seeds:
        model, graph, split = experiment.fit(seed, on_epoch=on_epoch)
        untrained = experiment.model.build(graph.num_features, seed).to(experiment.device)
        measures["trained"].append(alignment(model, graph, split, seed=seed, log=_named(log, "trained")))
        measures["untrained"].append(alignment(untrained, graph, split, seed=seed, log=_named(log, "untrained")))
        if graph.features == "given":
            log_features = _named(log, "raw features")
            measures["raw features"].append(feature_alignment(graph, seed=seed, log=log_features))
    return {name: values for name, values in measures.items() if values}


def _named(log: Callable[[str], None] | None, name: str) -> Callable[[str], None] | None:
    """Return a function that logs a line behind a name."""
    return None if log is None else lambda line: log(f"{name}: {line}")


def mean_rows(repetitions: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """Return one row for each metric: `metric`, and `mean`, `low` and `high` of its 95 % t interval over seeds.

    Intervals are cut at the range of the metric. `low` and `high` are None for a single seed.
    """
    rows: list[dict[str, Any]] = []
    for name in repetitions[0]:
        interval = limit_interval(name, mean_interval([values[name] for values in repetitions]))
        bounds = {"low": interval.low, "high": interval.high} if interval.has_bounds else {"low": None, "high": None}
        rows.append({"metric": name, "mean": interval.mean, **bounds})
    return rows
