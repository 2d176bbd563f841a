"""The kinds of runs of this half: a training that is audited and measured."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from suffice.link.batches.composition import parse_composition
from suffice.link.data.graph import SplitConfig
from suffice.link.models import EncoderDecoderSettings, ModelSettings
from suffice.link.study.arms import Arm, parse_arm
from suffice.link.train.config import TrainConfig
from suffice.study.run_kind import RunKind

# The arm says these.
_OF_ARM = ("encoder_norm", "decoder_norm", "composition", "balanced", "seed")
# Yardsticks beside the arms: no training, only what features and an untrained model keep of the classes.
REFERENCES = ("raw features", "untrained")
_FILES = (".csv", ".parquet", ".npz")


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run, taken apart.

    Args:
        arm: way of training; None for a reference.
        reference: `raw features` or `untrained`, or empty.
        model: the arm's.
        train: the arm's, without its seed.
        protocol: of the split.

    """

    arm: Arm | None
    reference: str
    model: ModelSettings
    train: TrainConfig
    protocol: SplitConfig

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> RunSettings:
        """Take settings apart.

        Raises:
            ValueError: a part refuses its settings.

        """
        model, train = ModelSettings.from_dict(settings["model"]), _make(TrainConfig, settings)
        protocol = _make(SplitConfig, settings)
        if settings["arm"] in REFERENCES:
            return cls(None, settings["arm"], model, train, protocol)
        arm = read_arm(settings["arm"])
        return cls(arm, "", arm.model(model), arm.train(train, 0), protocol)


def describe_arm(arm: Arm) -> Any:
    """Return an arm as settings hold it: its key, or all of it where the key doesn't say all.

    Raises:
        ValueError: its composition can't be read back.

    """
    try:
        if parse_arm(arm.key) == arm:
            return arm.key
    except ValueError:
        pass
    if parse_composition(str(arm.composition)) != arm.composition:
        raise ValueError(f"composition is {arm.composition!r}; accepted: one that its text gives back")
    return {**asdict(arm), "composition": str(arm.composition)}


def read_arm(found: Any) -> Arm:
    """Return the arm that `describe_arm` described.

    Raises:
        ValueError: it describes none.

    """
    if isinstance(found, str):
        return parse_arm(found)
    try:
        return replace(Arm(**found), composition=parse_composition(found["composition"]))
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"arm is {found!r}; accepted: a name as fixed/batch, or a mapping of an arm's parts"
        ) from error


def check(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse what no run could do, before any work; a user's own files enter by their content.

    Raises:
        ValueError: which setting, and what is accepted.

    """
    from suffice.link.data.datasets import DATASET_NAMES

    if given := settings["model"].keys() & set(_OF_ARM):
        raise ValueError(f"model must leave {', '.join(sorted(given))} to the arm, got {settings['model']!r}")
    settings = {**settings, "model": _describe_model(ModelSettings.from_dict(settings["model"]))}
    RunSettings.of(settings)
    data = Path(settings["data"])
    files = [Path(settings[name]) for name in ("data", "features", "labels") if settings[name] is not None]
    if data.suffix in _FILES:
        for file in files:
            if not file.is_file():
                raise ValueError(f"data is {str(file)!r}, which is no file")
        digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files))
        return {**settings, "digest": digest.hexdigest()[:16]}
    if data.suffix != ".safetensors" and settings["data"].lower() not in map(str.lower, DATASET_NAMES):
        raise ValueError(
            f"data is {settings['data']!r}; accepted: {', '.join(DATASET_NAMES)}, or a CSV, Parquet or NPZ file"
        )
    return {**settings, "digest": ""}


def settings_of(model: ModelSettings, train: TrainConfig, protocol: SplitConfig) -> dict[str, Any]:
    """Return the settings that all arms of a study share."""
    parts = {"model": _describe_model(model), **train.to_dict(), **asdict(protocol)}
    return {name: value for name, value in parts.items() if name not in _OF_ARM}


def _describe_model(model: ModelSettings) -> dict[str, Any]:
    return {name: value for name, value in model.to_dict().items() if name not in _OF_ARM}


def _make(kind: Any, settings: Mapping[str, Any]) -> Any:
    names = {field.name for field in fields(kind)} & settings.keys()
    return kind(**{name: settings[name] for name in names})


CORRECT = RunKind(
    name="link.correct",
    function="suffice.link.study.runs:run",
    check="suffice.link.study.run_kinds:check",
    report_sections="suffice.link.study.report_sections:add_records",
    compared_setting="arm",
    settings={
        "arm": None,  # a name, or a mapping of parts
        "data": "digits",
        "features": None,
        "labels": None,
        "root": "data",
        "device": "cpu",
        **settings_of(EncoderDecoderSettings(), TrainConfig(), SplitConfig()),
    },
    description="Train a link predictor one way, audit it, and measure what it keeps of the classes.",
)
KINDS = {CORRECT.name: CORRECT}
