"""The side-by-side study: the same model trained on biased and on corrected batches, and what each keeps."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suffice import SufficeError
from suffice.link.data.checkpoint import CheckpointError
from suffice.link.data.files import save_graph
from suffice.link.data.graph import Graph, SplitConfig, prepare_graph, split_edges
from suffice.link.models import EncoderDecoderSettings, ModelSettings
from suffice.link.study.arms import ARMS, Arm
from suffice.link.study.results import Run, Study
from suffice.link.study.run_kinds import CORRECT, REFERENCES, describe_arm, settings_of
from suffice.link.study.runs import graph_and_split
from suffice.link.train.alignment import embeddings
from suffice.link.train.config import TrainConfig
from suffice.study.progress import Progress, ProgressCallback, log_progress
from suffice.study.runner import run_study
from suffice.study.spec import PlannedRun
from suffice.study.store import Record, Store, StoreError


def correct(
    graph: Graph,
    *,
    arms: Sequence[Arm] = ARMS,
    model: ModelSettings | None = None,
    train: TrainConfig | None = None,
    protocol: SplitConfig | None = None,
    seeds: int = 5,
    seed: int = 0,
    device: str = "cpu",
    folder: str | Path | None = None,
    workers: int = 0,
    progress: Callable[[str], None] | None = None,
    watch: ProgressCallback | None = None,
    command: str = "",
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
        folder: a store of finished runs and checkpoints of trainings, to go on from.
        workers: processes to train in; 0 for this one.
        progress: called with a line for each finished run, and every few seconds within one.
        watch: shows progress instead of `progress`.
        command: what to type for this study, for its reports.

    Raises:
        ValueError: there is no arm or no seed, or two arms are the same.
        SufficeError: runs failed; the others are kept, and a second call tries those again.

    """
    if seeds < 1 or not arms or len({arm.key for arm in arms}) < len(arms):
        raise ValueError(f"seeds, arms are {seeds}, {[arm.key for arm in arms]}; accepted: 1 or more, distinct")
    model, train, protocol = model or EncoderDecoderSettings(), train or TrainConfig(), protocol or SplitConfig()
    graph = prepare_graph(graph, protocol)
    numbers = range(seed, seed + seeds)
    split_edges(graph, protocol, seed)  # refuses what can't be split
    say = progress or (lambda _: None)
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as home:
        data = save_graph(graph, home)
        shared = {**settings_of(model, train, protocol), "data": data, "device": device}

        def planned(arm: Any, number: int) -> PlannedRun:
            return PlannedRun(CORRECT.complete({**shared, "arm": arm}), number, (data,))

        plan = [planned(describe_arm(arm), number) for number in numbers for arm in arms]
        if graph.y is not None:
            plan += [planned(REFERENCES[0], seed)] + [planned(REFERENCES[1], number) for number in numbers]
        name = Path(data).stem
        with Store(home) as store:
            store.plan(name, CORRECT, plan)
            for record in store.records(name, "done"):
                if record.settings["arm"] not in REFERENCES:
                    say(f"arm {_key(record)}, seed {record.seed}: {record.result['verdict']}")
        about = {"command": command} if command else {}
        show = watch or _trainings(log_progress(say))
        run_study(home, CORRECT, plan, name=name, about=about, workers=workers, retry_failed=True, on_progress=show)
        with Store(home, read_only=True) as store:
            records = list(store.records(name))
    settings = {
        "model": model.to_dict(),
        "train": train.to_dict(),
        "protocol": asdict(protocol),
        "seeds": list(numbers),
        "torch": torch.__version__,
    }
    return study_of(graph.name, settings, records)


def study_of(graph: str, settings: dict[str, Any], records: Sequence[Record]) -> Study:
    """Return the study that records of the kind `link.correct` make up.

    Args:
        graph: name of the data set.
        settings: what they share, `seeds` among it.
        records: every arm with every seed, and references.

    Raises:
        SufficeError: a run is missing or failed.

    """
    if undone := [record for record in records if record.state != "done"]:
        first = undone[0]
        why = first.error.strip().splitlines()[-1] if first.error else first.state
        raise SufficeError(
            f"{len(undone)} of {len(records)} runs are not done; the first, arm {_key(first)}, seed {first.seed}: {why}"
        )
    runs: dict[str, list[Run]] = {}
    references: dict[str, list[Run]] = {}
    for record in records:
        group = references if record.settings["arm"] in REFERENCES else runs
        group.setdefault(_key(record), []).append(dict(record.result))
    for name, found in references.items():
        # Raw features have no seed: one run stands for all.
        references[name] = found * len(settings["seeds"]) if len(found) == 1 else found
    return Study(graph, settings, runs, references)


def whole_study(records: Sequence[Record]) -> Study | None:
    """Return the study of finished runs, of the seeds that every arm has; None if there is no such seed."""
    of_arms = [record for record in records if record.settings["arm"] not in REFERENCES]
    by_arm: dict[str, set[int]] = {}
    for record in of_arms:
        by_arm.setdefault(_key(record), set()).add(record.seed)
    shared = sorted(set[int].intersection(*by_arm.values())) if by_arm else []
    if not shared:
        return None
    kept = [r for r in records if r.seed in shared or r.settings["arm"] == REFERENCES[0]]
    graph = str(of_arms[0].result["facts"]["of"]["graph"])
    return study_of(graph, {"seeds": shared}, sorted(kept, key=lambda r: r.seed))


def stored_maps(records: Sequence[Record], folder: Path, *, most: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    """Return incident-edge means and classes of the first arms whose checkpoints a store's folder still holds."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for record in records:
        path = folder / "runs" / f"{record.key}.safetensors"
        if len(found) == most or record.seed != records[0].seed or not path.exists():
            continue
        graph, parts = graph_and_split(record.settings, record.seed, folder)
        if graph.y is not None:
            found[_key(record)] = representations(load_trained(path)[0], graph, parts)["edge"]
    return found


def edge_maps(
    graph: Graph, arms: Sequence[Arm], folder: str | Path, *, protocol: SplitConfig | None = None, seed: int = 0
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
    protocol = protocol or SplitConfig()
    graph = prepare_graph(graph, protocol)
    parts = split_edges(graph, protocol, seed)
    wanted = {str(describe_arm(arm)): arm.key for arm in arms}
    keys: dict[str, str] = {}
    try:
        with Store(folder, read_only=True) as store:
            for record in store.records(Path(save_graph(graph, folder)).stem, "done", numbers_only=True):
                if record.seed == seed and str(record.settings["arm"]) in wanted:
                    keys[wanted[str(record.settings["arm"])]] = record.key
    except StoreError as error:
        raise CheckpointError(str(error)) from error
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for arm in arms:
        if arm.key not in keys:
            raise CheckpointError(f"{folder} holds no training of {arm.key}, seed {seed}, on {graph.name}")
        net, _ = load_trained(Path(folder) / "runs" / f"{keys[arm.key]}.safetensors")
        found[arm.key] = representations(net, graph, parts)["edge"]
    return found


def _key(record: Record) -> str:
    from suffice.link.study.run_kinds import read_arm

    arm = record.settings["arm"]
    return arm if arm in REFERENCES else read_arm(arm).key


def _trainings(watch: ProgressCallback) -> ProgressCallback:
    """Leave out the lines of references, which take no time."""

    def show(progress: Progress, line: str) -> None:
        if not line.startswith(tuple(f"arm {name}" for name in REFERENCES)):
            watch(progress, line)

    return show
