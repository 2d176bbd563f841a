"""Settings of a training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from suffice.arguments import check_flag, check_instance, check_int, check_number, check_optional_int, check_text
from suffice.link.batches.composition import Composition, Fixed, parse_composition


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training.

    Args:
        composition: how many positives a mini-batch contains.
        balanced: whether both classes have the same total weight in the loss of each batch.
        epochs: maximum number of epochs.
        directions: number of times that an epoch uses each undirected edge. With 2, it is used in both directions, as
            in PyG's `edge_index`; with 1, it is used once, and an epoch has half as many steps.
        batch_size: edges in a batch, positives and negatives together.
        learning_rate: learning rate of Adam.
        weight_decay: weight decay of Adam.
        clip: maximum norm of the gradient; None for no clipping.
        patience: stop after this number of epochs without a better validation metric, and keep the parameters of the
            best epoch. None to train all epochs and keep the parameters of the last one.
        metric: validation metric: `hits@K` (with a number for K), `auc`, `ap` or `mrr`.
        seed: seed of batches, negatives and dropout.

    Raises:
        TypeError: a value has the wrong type.
        ValueError: a value is out of range.

    """

    composition: Composition = field(default_factory=Fixed)
    balanced: bool = False
    epochs: int = 30
    directions: int = 2
    batch_size: int = 512
    learning_rate: float = 5e-3
    weight_decay: float = 0.0
    clip: float | None = None
    patience: int | None = None
    metric: str = "hits@100"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, minimum in {"epochs": 1, "batch_size": 2, "seed": 0}.items():
            object.__setattr__(self, name, check_int(name, getattr(self, name), minimum))
        object.__setattr__(self, "learning_rate", check_number("learning_rate", self.learning_rate, above=0))
        object.__setattr__(self, "weight_decay", check_number("weight_decay", self.weight_decay, minimum=0))
        object.__setattr__(self, "directions", check_int("directions", self.directions, 1, 2))
        object.__setattr__(self, "patience", check_optional_int("patience", self.patience, 1))
        if self.clip is not None:
            object.__setattr__(self, "clip", check_number("clip", self.clip, above=0))
        check_flag("balanced", self.balanced)
        check_instance("composition", self.composition, Composition, "Random()")
        check_text("metric", self.metric)
        if self.metric not in ("auc", "ap", "mrr") and not self.metric.removeprefix("hits@").isdigit():
            raise ValueError(f"metric must be hits@K, auc, ap or mrr, got {self.metric!r}")

    @property
    def k(self) -> int:
        """K of Hits@K: that of the validation metric, or 100 if it is another metric."""
        return int(self.metric.removeprefix("hits@")) if self.metric.startswith("hits@") else 100

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON-serializable dictionary."""
        return {**asdict(self), "composition": str(self.composition)}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> TrainConfig:
        """Return the settings that `to_dict` described; settings that are left out take their defaults.

        Raises:
            ValueError: a setting is unknown or out of range.

        """
        if unknown := settings.keys() - cls.__dataclass_fields__.keys():
            raise ValueError(f"train must contain only {sorted(cls.__dataclass_fields__)}, got {sorted(unknown)}")
        arguments = dict(settings)
        if "composition" in arguments:
            arguments["composition"] = parse_composition(arguments["composition"])
        return cls(**arguments)
