"""The study of arXiv 2604.25978: all combinations of models, data sets and arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from suffice.arguments import check_instances, check_int, check_names, did_you_mean
from suffice.link.data.datasets import load_graph
from suffice.link.data.files import save_graph
from suffice.link.data.graph import SplitConfig, prepare_graph
from suffice.link.models import EncoderDecoderSettings, ModelSettings, get_model_settings, preset
from suffice.link.names import REPRODUCED_MODELS
from suffice.link.study.arms import Arm, parse_arm
from suffice.link.study.results import ArmResults, collect_arms
from suffice.link.study.run_kinds import CORRECT
from suffice.link.study.run_settings import DataSource, RunSettings
from suffice.link.train.config import TrainConfig
from suffice.study.progress import ProgressCallback
from suffice.study.runner import run_study
from suffice.study.spec import PlannedRun
from suffice.study.store import Store

REPRODUCED_ARMS = tuple(parse_arm(f"{name}/batch") for name in ("fixed", "random", "random+balanced", "separate"))
"""Arms of the study."""

STUDY_NAME = "reproduction"


def reproduce(
    data: Sequence[str],
    folder: str | Path,
    *,
    models: Sequence[str] = REPRODUCED_MODELS,
    arms: Sequence[Arm] = REPRODUCED_ARMS,
    seeds: int = 5,
    train: TrainConfig | None = None,
    split: SplitConfig | None = None,
    hidden: int = 64,
    published: bool = False,
    root: str | Path = "data",
    device: str = "cpu",
    workers: int = 0,
    on_progress: ProgressCallback | None = None,
    command: str = "",
) -> list[ArmResults]:
    """Train, audit and measure every model on every data set in every arm.

    A second call with the same folder resumes the study and tries failed runs again.

    Args:
        data: names of data sets.
        folder: folder in which the runs are kept.
        models: names from `REPRODUCED_MODELS`.
        arms: ways of training, including the norms.
        seeds: number of repetitions, each with its own split.
        train: all other settings of the training.
        split: settings of the split.
        hidden: number of channels of every model.
        published: whether to use the published settings of each model, if there are any, except for the number of
            epochs. The arm determines the norms.
        root: folder of downloaded data sets.
        device: Torch device.
        workers: number of processes to train in; 0 for the current one.
        on_progress: shows progress.
        command: command that runs this study, for its reports.

    Returns:
        results of all finished runs, one item for each data set, model and arm.

    Raises:
        ValueError: a name is unknown, or an argument is empty.

    """
    data = check_names("data", data, "names of graphs", "['digits']")
    models = check_names("models", models, "names of models", "['gcn', 'buddy']")
    arms = check_instances("arms", arms, Arm, "parse_arm('fixed/batch')")
    for name, values in (("data", data), ("models", models), ("arms", arms)):
        if not values:
            raise ValueError(f"{name} must contain at least one name, got {values!r}")
    seeds, workers = check_int("seeds", seeds, 1), check_int("workers", workers, 0)
    train, split = train or TrainConfig(), split or SplitConfig()
    plan: list[PlannedRun] = []
    for name in data:
        file = save_graph(prepare_graph(load_graph(name, root), split), folder)
        for seed in range(seeds):
            for model_name in models:
                model, training = model_and_training(
                    model_name, hidden=hidden, published_data=name if published else ""
                )
                config = replace(train, **training)
                for arm in arms:
                    settings = RunSettings(arm.resolve_norms(model), DataSource(file), model, config, split, device)
                    plan.append(PlannedRun(CORRECT.complete(settings.to_dict()), seed, (file,)))
    run_study(
        folder,
        CORRECT,
        plan,
        name=STUDY_NAME,
        about={"command": command} if command else {},
        workers=workers,
        retry_failed=True,
        on_progress=on_progress,
    )
    return load_results(folder)


def load_results(folder: str | Path) -> list[ArmResults]:
    """Return the results of the finished runs of `reproduce` in a folder, which may still be running.

    Raises:
        StoreError: the folder contains no study.

    """
    with Store(folder, read_only=True) as store:
        return collect_arms(store.records(STUDY_NAME, "done"))


def model_and_training(
    name: str, *, hidden: int = 64, published_data: str = ""
) -> tuple[ModelSettings, dict[str, Any]]:
    """Return the settings of a model, and the settings of the training that belong to it.

    Args:
        name: one of `REPRODUCED_MODELS`.
        hidden: number of channels.
        published_data: name of the data set whose published settings are used, except for the number of epochs; empty
            for the defaults. The authors of GCN and GraphSAGE published none; these models then have no norms.

    Raises:
        ValueError: the model is unknown.

    """
    if name not in REPRODUCED_MODELS:
        hint = did_you_mean(name, REPRODUCED_MODELS)
        raise ValueError(f"models must be among {', '.join(REPRODUCED_MODELS)}, got {name!r}{hint}")
    if name in ("gcn", "sage"):
        norm = "none" if published_data else "batch"
        return EncoderDecoderSettings(encoder=name, hidden=hidden, encoder_norm=norm, decoder_norm=norm), {}
    if not published_data:
        return get_model_settings(name)(hidden=hidden), {}
    model, training = preset(name, published_data)
    return model, {key: value for key, value in asdict(training).items() if value is not None and key != "epochs"}


def results_to_dict(results: Sequence[ArmResults]) -> dict[str, Any]:
    """Return results as a JSON-serializable dictionary: means, intervals, values by seed, verdicts and settings."""
    rows = [
        {
            **_names(arm),
            "metric": metric,
            **asdict(arm.group.interval(metric)),
            "values": {str(seed): value for seed, value in values.items()},
        }
        for arm in results
        for metric, values in arm.group.values.items()
    ]
    verdicts = [{**_names(arm), "verdicts": arm.verdict_counts()} for arm in results]
    return {"rows": rows, "verdicts": verdicts, "settings": {arm.model: _shared_settings(arm) for arm in results}}


def _names(arm: ArmResults) -> dict[str, str]:
    return {"data": arm.graph, "model": arm.model, "arm": arm.arm}


def _shared_settings(arm: ArmResults) -> dict[str, Any]:
    """Return the settings of model, training and split, by dotted name."""
    groups = ("model.", "train.", "split.")
    return {name: value for name, value in arm.group.settings.items() if name.startswith(groups)}
