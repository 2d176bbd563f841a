"""Settings of a run: arm, model, training, split and data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from suffice.link.data.datasets import load_graph
from suffice.link.data.files import GRAPH_SUFFIXES, MADE_FEATURES, read_graph, read_saved_graph
from suffice.link.data.graph import Graph, SplitConfig, prepare_graph
from suffice.link.data.names import DATASET_NAMES
from suffice.link.data.tables import plain_suffix
from suffice.link.models import EncoderDecoderSettings, ModelSettings, get_model_settings
from suffice.link.study.arms import Arm
from suffice.link.train.config import TrainConfig
from suffice.study.run_kind import RunKind

REFERENCES = ("raw features", "untrained")
"""References without training: the alignment of the raw node features and of an untrained model."""

# Options that the arm or the seed of a run determines, so that they are left out of its other settings.
_MODEL_OPTIONS_OF_ARM = ("encoder_norm", "decoder_norm")
_TRAIN_OPTIONS_OF_ARM = ("composition", "balanced", "seed")

_SAVED_GRAPH = ".safetensors"
_OPTIONAL = {"header": None, "ids": None, "bipartite": False}


@dataclass(frozen=True)
class DataSource:
    """Where the graph of a run comes from.

    Args:
        name: name of a data set; a file with the edges (see `read_graph`); or a graph that a study saved in its folder.
        features: file of node features, for a file that holds only edges; or `degree` or `learned`.
        labels: file of node classes, for a file that holds only edges.
        root: folder of downloaded data sets.
        header: whether an unclear first line of a file is a header; None refuses it.
        ids: whether the first column of features and labels holds ids; None to find out.
        bipartite: whether the two columns of an edge list are the sides of a bipartite graph.

    """

    name: str = "digits"
    features: str | None = None
    labels: str | None = None
    root: str = "data"
    header: bool | None = None
    ids: bool | None = None
    bipartite: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON-serializable dictionary.

        The last three are left out if they have their defaults, so that they change no key of a stored run.
        """
        return {
            name: value for name, value in asdict(self).items() if name not in _OPTIONAL or value != _OPTIONAL[name]
        }

    def load(self, folder: Path, config: SplitConfig) -> Graph:
        """Return the graph, prepared for a split.

        Args:
            folder: folder of the study, for a graph that it saved.
            config: settings of the split.

        """
        suffix = plain_suffix(Path(self.name))
        if suffix == _SAVED_GRAPH:
            return read_saved_graph(folder / self.name)  # prepared when it was saved
        if suffix in GRAPH_SUFFIXES:
            options = {name: getattr(self, name) for name in _OPTIONAL}
            graph = read_graph(self.name, self.features, self.labels, **options)
        else:
            graph = load_graph(self.name, self.root)
        return prepare_graph(graph, config)

    def digest(self) -> str:
        """Return a digest of the user's files, so that runs are executed again when they change; empty without files.

        Raises:
            ValueError: a file is missing, or the data set is unknown.

        """
        suffix = plain_suffix(Path(self.name))
        if suffix in GRAPH_SUFFIXES:
            names = (self.name, self.features, self.labels)
            files = [Path(name) for name in names if name is not None and name not in MADE_FEATURES]
            for file in files:
                if not file.is_file():
                    raise ValueError(f"data must be existing files, got {str(file)!r}")
            digests = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
            return hashlib.sha256(digests).hexdigest()[:16]
        if suffix != _SAVED_GRAPH and self.name.lower() not in map(str.lower, DATASET_NAMES):
            raise ValueError(
                f"data must be one of {', '.join(DATASET_NAMES)}, or a file with one of the suffixes "
                f"{', '.join(GRAPH_SUFFIXES)}, got {self.name!r}"
            )
        return ""


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run of the kind `link.correct`.

    Args:
        arm: way of training, or the name of a reference (see `REFERENCES`).
        data: where the graph comes from.
        model: settings of the model; the arm replaces its norms.
        train: settings of the training; arm and seed replace its composition, loss and seed.
        split: settings of the split.
        device: Torch device.

    """

    arm: Arm | str
    data: DataSource = field(default_factory=DataSource)
    model: ModelSettings = field(default_factory=EncoderDecoderSettings)
    train: TrainConfig = field(default_factory=TrainConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    device: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a nested JSON-serializable dictionary."""
        return {
            "arm": self.arm.to_setting() if isinstance(self.arm, Arm) else self.arm,
            "data": self.data.to_dict(),
            "model": _without(self.model.to_dict(), _MODEL_OPTIONS_OF_ARM),
            "train": _without(self.train.to_dict(), _TRAIN_OPTIONS_OF_ARM),
            "split": asdict(self.split),
            "device": self.device,
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> RunSettings:
        """Return the settings that `to_dict` described; options of the model that are left out take their defaults.

        Raises:
            ValueError: a setting is not accepted.

        """
        arm, data = settings["arm"], settings["data"]
        return cls(
            arm=arm if arm in REFERENCES else Arm.from_setting(arm),
            data=DataSource(**{name: data[name] for name in DataSource.__dataclass_fields__ if name in data}),
            model=_read_model(settings["model"]),
            train=TrainConfig.from_dict(settings["train"]),
            split=SplitConfig(**settings["split"]),
            device=settings["device"],
        )


def default_settings() -> dict[str, Any]:
    """Return the default settings of the kind `link.correct`.

    The arm has no default. The group `model` is open, because the options of a model depend on its name.
    """
    settings = RunSettings("untrained").to_dict()
    return {**settings, "arm": None, "model": {}, "data": asdict(DataSource())}


def _read_model(options: Mapping[str, Any]) -> ModelSettings:
    """Return the settings of the model that `options["name"]` names, after checking names and types of its options."""
    name = options.get("name", EncoderDecoderSettings.name)
    defaults = _without(get_model_settings(name)().to_dict(), _MODEL_OPTIONS_OF_ARM)
    checked = RunKind(f"model {name}", "", {"model": defaults}).complete({"model": options})
    return ModelSettings.from_dict(checked["model"])


def _without(settings: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}
