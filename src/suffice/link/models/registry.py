"""Models by name, and the base class of their settings: what a new model needs.

A model is one file of this package: a `LinkPredictor`, and a frozen dataclass of its options that subclasses
`ModelSettings`, defines `create` and is registered by `register_model`. `LinkPredictor` (`base.py`) lists the methods
of a model; `ncn.py` is an example. Commands, studies and the conformance tests
find every registered model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch

from suffice.arguments import check_int, check_number
from suffice.link.models.base import LinkPredictor
from suffice.link.models.named_parts import NamedParts, describe_choices
from suffice.link.models.norms import NORMS
from suffice.link.train.memory import explain_out_of_memory

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class ModelSettings(ABC):
    """Options of a link predictor: the base class, with the options that all models share.

    Args:
        hidden: number of channels.
        dropout: probability that a channel is dropped in training.
        decoder_norm: normalization over the edge batch: `batch`, `layer`, `graph` or `none`.

    Raises:
        ValueError: an option is not accepted.

    """

    name: ClassVar[str]  # set by `register_model`

    hidden: int = 64
    dropout: float = 0.0
    decoder_norm: str = "batch"

    def __post_init__(self) -> None:
        check_int("hidden", self.hidden, 1)
        check_number("dropout", self.dropout, minimum=0, below=1)
        NORMS.check("decoder_norm", self.decoder_norm)

    @abstractmethod
    def create(self, in_channels: int) -> LinkPredictor:
        """Return the model for nodes with `in_channels` features; users call `build`."""

    @classmethod
    def published(cls, data: str) -> Preset | None:
        """Return the settings that the model's authors published for a data set; None if they published no settings.

        The settings for Cora are returned for data sets that the authors do not report.
        """
        return None

    def build(self, in_channels: int, seed: int = 0) -> LinkPredictor:
        """Return a freshly initialized model. The state of the global random generators does not change.

        Args:
            in_channels: number of features of a node.
            seed: seed of the initial parameters.

        Raises:
            NotEnoughMemoryError: there is not enough memory for the parameters.
            ValueError: `in_channels` is below 1.

        """
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}. The nodes need features.")
        with torch.random.fork_rng(devices=[]), explain_out_of_memory():
            torch.manual_seed(seed)
            return self.create(in_channels)

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """Return the names of the model's options."""
        return tuple(field.name for field in fields(cls))

    @property
    def norms(self) -> dict[str, str]:
        """The model's norms by option; `encoder_norm` is missing if the model has no encoder."""
        names = ("encoder_norm", "decoder_norm")
        return {name: getattr(self, name) for name in names if name in self.option_names()}

    def with_norms(self, encoder_norm: str, decoder_norm: str) -> Self:
        """Return the settings with other norms; `encoder_norm` is ignored if the model has no encoder."""
        given = {"encoder_norm": encoder_norm, "decoder_norm": decoder_norm}
        return replace(self, **{name: given[name] for name in self.norms})

    def to_dict(self) -> dict[str, Any]:
        """Return the name of the model, as `name`, and all its options as a JSON-serializable dictionary."""
        return {"name": self.name, **asdict(self)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ModelSettings:
        """Return the settings that `to_dict` described; options that are left out take their defaults.

        Raises:
            ValueError: there is no such model, or it has no such option.

        Example:
            >>> ModelSettings.from_dict({"name": "ncn", "hidden": 128}).hidden
            128

        """
        options = dict(values)
        if "name" not in options:
            raise ValueError(f"settings of a model must contain its name, got only {sorted(options)}")
        return _settings(options.pop("name"), options)


@dataclass(frozen=True)
class PublishedTraining:
    """How a model's authors trained it.

    Args:
        learning_rate: learning rate of Adam.
        batch_size: number of positive and negative edges in a batch.
        epochs: number of epochs.
        directions: 1 if an epoch uses every undirected edge once, 2 if once in each direction.
        clip: largest norm of the gradient; None for no clipping.

    """

    learning_rate: float
    batch_size: int
    epochs: int = 100
    directions: int = 1
    clip: float | None = None


class Preset(NamedTuple):
    """Options of a model and of its training that its authors published for a data set."""

    model: ModelSettings
    training: PublishedTraining


MODELS: NamedParts[type[ModelSettings]] = NamedParts("model")
Settings = TypeVar("Settings", bound=ModelSettings)


def register_model(name: str) -> Callable[[type[Settings]], type[Settings]]:
    """Return a decorator that registers the settings of a model under a name.

    Raises:
        ValueError: another model has this name.

    """

    def decorate(settings: type[Settings]) -> type[Settings]:
        settings.name = name
        return MODELS.register(name)(settings)

    return decorate


def models() -> dict[str, type[ModelSettings]]:
    """Return the settings class of every model by name."""
    return MODELS.entries()


def get_model_settings(name: str) -> type[ModelSettings]:
    """Return the settings class of a model.

    Raises:
        ValueError: there is no such model; the message lists the models.

    """
    return MODELS.find(name)


def build_model(name: str, in_channels: int, *, seed: int = 0, **options: Any) -> LinkPredictor:
    """Return a freshly initialized model by name.

    Args:
        name: one of `models()`.
        in_channels: number of features of a node.
        seed: seed of the initial parameters.
        options: options of the model (see its settings class) that differ from the defaults.

    Raises:
        ValueError: there is no such model, it has no such option, or a value is not accepted.

    Example:
        >>> type(build_model("ncn", in_channels=16, hidden=32)).__name__
        'NCN'

    """
    return _settings(name, options).build(in_channels, seed)


def preset(name: str, data: str) -> Preset:
    """Return the settings of a model and of its training that its authors published for a data set.

    The settings for Cora are returned for data sets that the authors do not report.

    Args:
        name: a model with published settings: `neognn`, `ncn`, `ncnc`, `elph` or `buddy`.
        data: name of the data set.

    Raises:
        ValueError: there is no such model, or its authors published no settings.

    Example:
        >>> settings, training = preset("buddy", "Cora")
        >>> settings.hidden, training.learning_rate
        (1024, 0.0001)

    """
    found = get_model_settings(name).published(data)
    if found is None:
        accepted = [other for other, settings in models().items() if settings.published(data) is not None]
        raise ValueError(f"model must have published settings ({', '.join(accepted)}), got {name!r}")
    return found


def _settings(name: str, options: Mapping[str, Any]) -> ModelSettings:
    settings = get_model_settings(name)
    for option in options:
        if option not in settings.option_names():
            raise ValueError(f"options of model {name!r} must be {describe_choices(settings.option_names(), option)}")
    return settings(**options)
