"""The study behind `suffice link correct`: train the same model in several ways on the same splits, and compare."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from suffice.arguments import check_instances, check_int
from suffice.link.data.checkpoint import CheckpointError
from suffice.link.data.files import save_graph
from suffice.link.data.graph import Graph, SplitConfig, prepare_graph, split_edges, with_enough_negatives
from suffice.link.models import EncoderDecoderSettings, ModelSettings
from suffice.link.study.arms import ARMS, Arm
from suffice.link.study.results import StudyResults, arm_key, collect_study
from suffice.link.study.run import load_graph_and_split
from suffice.link.study.run_kinds import CORRECT
from suffice.link.study.run_settings import REFERENCES, DataSource, RunSettings
from suffice.link.train.alignment import representations
from suffice.link.train.checkpoint import load_trained
from suffice.link.train.config import TrainConfig
from suffice.study.progress import ProgressCallback, log_progress
from suffice.study.runner import run_study
from suffice.study.spec import PlannedRun
from suffice.study.store import Record, Store, StoreError


def correct(
    graph: Graph,
    *,
    arms: Sequence[Arm] = ARMS,
    model: ModelSettings | None = None,
    train: TrainConfig | None = None,
    split: SplitConfig | None = None,
    seeds: int = 5,
    first_seed: int = 0,
    device: str = "cpu",
    folder: str | Path | None = None,
    workers: int = 0,
    log: Callable[[str], None] | None = None,
    on_progress: ProgressCallback | None = None,
    command: str = "",
) -> StudyResults:
    """Train the same model in several ways on the same splits, audit it, and measure metrics and alignment.

    Args:
        graph: graph whose edges are learned.
        arms: ways of training, including the norms.
        model: all other settings of the model; `encoder-decoder` with its defaults if not given.
        train: all other settings of the training.
        split: settings of the split; more negatives are drawn if Hits@K needs them (see `with_enough_negatives`).
        seeds: number of repetitions, each with its own split, initial parameters and batches.
        first_seed: seed of the first repetition.
        device: Torch device.
        folder: folder in which finished runs and checkpoints are kept; a second call with the same folder resumes the
            study. By default, nothing is kept.
        workers: number of processes to train in; 0 for the current one.
        log: called with a line for each finished run, and with the progress every few seconds.
        on_progress: called with the progress instead of `log`.
        command: command that runs this study, for its reports.

    Returns:
        results of all arms, with the alignment of two references: the node features and an untrained model.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there is no arm or no seed, two arms are the same, or the graph has a single class.
        SufficeError: runs failed. The others are kept in `folder`; a second call tries the failed ones again.

    Example:
        >>> from suffice.link import TrainConfig, load_graph
        >>> from suffice.link.study.arms import parse_arm
        >>> arms = [parse_arm("fixed/batch"), parse_arm("random/batch")]
        >>> results = correct(load_graph("digits"), arms=arms, train=TrainConfig(epochs=1), seeds=1)
        >>> list(results.arms)
        ['fixed/batch', 'random/batch']

    """
    seeds, first_seed = check_int("seeds", seeds, 1), check_int("first_seed", first_seed, 0)
    workers = check_int("workers", workers, 0)
    arms = check_instances("arms", arms, Arm, "parse_arm('fixed/batch')")
    keys = [arm.key for arm in arms]
    if not keys or len(set(keys)) < len(keys):
        raise ValueError(f"arms must contain at least one arm and no arm twice, got {keys}")
    model, train, split = model or EncoderDecoderSettings(), train or TrainConfig(), split or SplitConfig()
    graph = prepare_graph(graph, split)
    if graph.y is not None:
        _ = graph.classes  # raises if there is only one class
    split = with_enough_negatives(split, graph, train.k)
    split_edges(graph, split, first_seed)  # raises if the graph cannot be split
    seed_list = range(first_seed, first_seed + seeds)
    log = log or _ignore
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as home:
        data = save_graph(graph, home)

        def plan_run(arm: Arm | str, seed: int) -> PlannedRun:
            settings = RunSettings(arm, DataSource(data), model, train, split, device)
            return PlannedRun(CORRECT.complete(settings.to_dict()), seed, (data,))

        plan = [plan_run(arm, seed) for seed in seed_list for arm in arms]
        if graph.y is not None:
            raw_features, untrained = REFERENCES
            if graph.features == "given":
                plan.append(plan_run(raw_features, first_seed))
            plan += [plan_run(untrained, seed) for seed in seed_list]
        name = Path(data).stem
        _log_finished_runs(Path(home), name, plan, log)
        run_study(
            home,
            CORRECT,
            plan,
            name=name,
            about={"command": command} if command else {},
            workers=workers,
            retry_failed=True,
            on_progress=on_progress or log_progress(log),
        )
        with Store(home, read_only=True) as store:
            records = list(store.records(name))
    settings = {
        "model": model.to_dict(),
        "train": train.to_dict(),
        "split": asdict(split),
        "seeds": list(seed_list),
        "torch": torch.__version__,
    }
    return collect_study(graph.name, settings, records)


def load_edge_representations(
    graph: Graph, arms: Sequence[Arm], folder: str | Path, *, split: SplitConfig | None = None, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the edge representation of each arm that `correct` trained, with the classes of the nodes, by arm.

    Args:
        graph: graph of the study.
        arms: arms of the study.
        folder: folder of the study.
        split: settings of the split of the study.
        seed: seed of the split and the training.

    Raises:
        CheckpointError: the folder does not contain such a training.
        ValueError: the graph has no classes.

    """
    split = split or SplitConfig()
    graph = prepare_graph(graph, split)
    edges = split_edges(graph, split, seed)
    try:
        with Store(folder, read_only=True) as store:
            study = Path(save_graph(graph, folder)).stem
            records = [r for r in store.records(study, "done", numbers_only=True) if r.seed == seed]
    except StoreError as error:
        raise CheckpointError(str(error)) from error
    run_keys = {arm_key(record): record.key for record in records}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for arm in arms:
        if arm.key not in run_keys:
            raise CheckpointError(
                f"folder must contain a training of arm {arm.key} with seed {seed} on {graph.name}, got {str(folder)!r}"
            )
        model, _ = load_trained(_checkpoint_path(folder, run_keys[arm.key]))
        found[arm.key] = representations(model, graph, edges)["edge"]
    return found


def load_stored_representations(
    records: Sequence[Record], folder: Path, *, max_arms: int = 2
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the edge representations and classes of the first arms whose checkpoints a folder contains, by arm.

    Args:
        records: finished runs of a study.
        folder: folder of the study.
        max_arms: maximum number of arms.

    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for record in records:
        path = _checkpoint_path(folder, record.key)
        if len(found) == max_arms or record.seed != records[0].seed or not path.exists():
            continue
        graph, edges = load_graph_and_split(RunSettings.from_dict(record.settings), record.seed, folder)
        if graph.y is not None:
            found[arm_key(record)] = representations(load_trained(path)[0], graph, edges)["edge"]
    return found


def _checkpoint_path(folder: str | Path, run_key: str) -> Path:
    return Path(folder) / "runs" / f"{run_key}.safetensors"


def _log_finished_runs(folder: Path, study: str, plan: Sequence[PlannedRun], log: Callable[[str], None]) -> None:
    """Log a line for each arm that an earlier call has finished."""
    with Store(folder) as store:
        store.plan(study, CORRECT, plan)
        for record in store.records(study, "done"):
            if record.settings["arm"] not in REFERENCES:
                log(f"arm {arm_key(record)}, seed {record.seed}: {record.result['verdict']}")


def _ignore(line: str) -> None:
    pass
