"""The paper's study (arXiv 2604.25978): models × data sets × ways of training, on the store of `suffice.study`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from suffice.link.data.datasets import load_graph
from suffice.link.data.files import save_graph
from suffice.link.data.graph import SplitConfig, prepare_graph
from suffice.link.models import EncoderDecoderSettings, ModelSettings, get_model_settings, preset
from suffice.link.study.arms import Arm, parse_arm
from suffice.link.study.run_kinds import CORRECT, describe_arm, read_arm, settings_of
from suffice.link.train.config import TrainConfig
from suffice.study.nested_settings import nest
from suffice.study.progress import ProgressCallback
from suffice.study.results import Group, group_records
from suffice.study.runner import run_study
from suffice.study.spec import PlannedRun
from suffice.study.store import Store

MODELS = ("gcn", "sage", "neognn", "elph", "buddy", "ncn", "ncnc")
ARMS = tuple(parse_arm(f"{name}/batch") for name in ("fixed", "random", "random+balanced", "separate"))
STUDY = "reproduction"


@dataclass(frozen=True)
class Cell:
    """One data set, model and way of training, over seeds.

    Args:
        data: name of the data set.
        model: name of the model.
        arm: key of the way of training.
        group: its values.
        verdicts: how often each was given.

    """

    data: str
    model: str
    arm: str
    group: Group
    verdicts: dict[str, int]


def settings_for(name: str, *, hidden: int = 64, published: str = "") -> tuple[ModelSettings, dict[str, Any]]:
    """Return a model of the study, with what of the training comes with it.

    Args:
        name: one of `MODELS`.
        hidden: channels.
        published: name of a data set for which to take the authors' settings instead, all but their epochs; of GCN and
            GraphSAGE, which have none, only that they have no norms.

    Raises:
        ValueError: there is no such model.

    """
    if name not in MODELS:
        raise ValueError(f"models hold {name!r}; accepted: {', '.join(MODELS)}")
    if name in ("gcn", "sage"):
        norm = "none" if published else "batch"
        return EncoderDecoderSettings(encoder=name, hidden=hidden, encoder_norm=norm, decoder_norm=norm), {}
    if not published:
        return get_model_settings(name)(hidden=hidden), {}
    made, training = preset(name, published)
    return made, {key: value for key, value in asdict(training).items() if key != "epochs"}


def reproduce(
    data: Sequence[str],
    folder: str | Path,
    *,
    models: Sequence[str] = MODELS,
    arms: Sequence[Arm] = ARMS,
    seeds: int = 5,
    train: TrainConfig | None = None,
    protocol: SplitConfig | None = None,
    hidden: int = 64,
    published: bool = False,
    root: str | Path = "data",
    device: str = "cpu",
    workers: int = 0,
    watch: ProgressCallback | None = None,
    command: str = "",
) -> list[Cell]:
    """Train, audit and measure every model on every data set in every way, and return what is finished.

    A second call goes on where the first stopped; runs that failed are tried again.

    Args:
        data: names of data sets.
        folder: of the store.
        models: of `MODELS`.
        arms: ways of training, norms included.
        seeds: repetitions, each with its own split.
        train: everything else of the training.
        protocol: the split.
        hidden: channels of every model.
        published: take each model's published settings, as far as there are any; norms stay the arms'.
        root: folder of downloaded data sets.
        device: where to train.
        workers: processes to train in; 0 for this one.
        watch: shows progress.
        command: what to type for this study.

    Raises:
        ValueError: a name is unknown, or nothing is asked for.

    """
    if not data or not models or not arms or seeds < 1:
        raise ValueError(f"data, models, arms, seeds are {data}, {models}, {arms}, {seeds}; accepted: one or more")
    train, protocol = train or TrainConfig(), protocol or SplitConfig()
    plan: list[PlannedRun] = []
    for name in data:
        file = save_graph(prepare_graph(load_graph(name, root), protocol), folder)
        for seed in range(seeds):
            for model in models:
                made, own = settings_for(model, hidden=hidden, published=name if published else "")
                chosen = TrainConfig(**{**_fields(train), **own})
                shared = {**settings_of(made, chosen, protocol), "data": file, "device": device}
                for arm in arms:
                    described = describe_arm(arm.resolved(made))
                    plan.append(PlannedRun(CORRECT.complete({**shared, "arm": described}), seed, (file,)))
    about = {"command": command} if command else {}
    run_study(folder, CORRECT, plan, name=STUDY, about=about, workers=workers, retry_failed=True, on_progress=watch)
    return finished(folder)


def finished(folder: str | Path) -> list[Cell]:
    """Return what a folder holds of the study so far, while it runs too.

    Raises:
        StoreError: the folder holds no store.

    """
    with Store(folder, read_only=True) as store:
        records = list(store.records(STUDY, "done"))
    verdicts: dict[tuple[str, str, str], dict[str, int]] = {}
    for record in records:
        found = verdicts.setdefault(_names(record.settings), {})
        found[record.result["verdict"]] = found.get(record.result["verdict"], 0) + 1
    return [
        Cell(*names, one, verdicts[names]) for one in group_records(records) for names in [_names(nest(one.settings))]
    ]


def to_dict(cells: Sequence[Cell]) -> dict[str, Any]:
    """Return cells as JSON holds them: means, intervals, values by seed, verdicts, settings by model."""
    rows = [
        {
            **_named(cell),
            "metric": metric,
            **asdict(cell.group.interval(metric)),
            "values": {str(seed): value for seed, value in values.items()},
        }
        for cell in cells
        for metric, values in cell.group.values.items()
    ]
    settings = {cell.model: {k: v for k, v in nest(cell.group.settings).items() if k not in _OWN} for cell in cells}
    return {"rows": rows, "verdicts": [{**_named(c), "verdicts": c.verdicts} for c in cells], "settings": settings}


_OWN = ("arm", "data", "digest", "features", "labels", "root", "device")


def _named(cell: Cell) -> dict[str, str]:
    return {"data": cell.data, "model": cell.model, "arm": cell.arm}


def _fields(train: TrainConfig) -> dict[str, Any]:
    return {name: getattr(train, name) for name in train.__dataclass_fields__}


def _names(settings: Mapping[str, Any]) -> tuple[str, str, str]:
    arm = settings["arm"]
    model = settings["model"]
    name = model["encoder"] if model["name"] == "encoder-decoder" else model["name"]
    data = Path(settings["data"]).stem.rpartition("-")[0] or settings["data"]
    return data, name, read_arm(arm).key
