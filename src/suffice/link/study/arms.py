"""Arms of a study: ways of training, which are compared on the same splits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from suffice.link.batches.composition import Composition, Fixed, Random, Separate, parse_composition
from suffice.link.models import ModelSettings
from suffice.link.models.norms import NORMS
from suffice.link.names import OWN_NORM, check_arm
from suffice.link.train.config import TrainConfig


@dataclass(frozen=True)
class Arm:
    """One way of training: composition, loss and norms.

    Args:
        name: `fixed`, `random`, `random+balanced`, `separate`, or any other name for a custom arm.
        composition: how many positives a mini-batch contains.
        balanced: whether both classes have the same total weight in the loss of each batch.
        encoder_norm: `batch`, `layer`, `graph` or `none`, or `own` (`OWN_NORM`) for that of the model's settings.
        decoder_norm: the same choice for the decoder.
        learning_rate: learning rate of Adam; None for the learning rate of the study.

    """

    name: str
    composition: Composition
    balanced: bool = False
    encoder_norm: str = "batch"
    decoder_norm: str = "batch"
    learning_rate: float | None = None

    @property
    def key(self) -> str:
        """Name and norms: `fixed/batch`, or `fixed/batch-none` if the norms of encoder and decoder differ."""
        has_one_norm = self.encoder_norm == self.decoder_norm
        return f"{self.name}/{self.encoder_norm}" + ("" if has_one_norm else f"-{self.decoder_norm}")

    def apply_to_model(self, model: ModelSettings) -> ModelSettings:
        """Return the settings of a model with the norms of this arm."""
        return model.with_norms(self.encoder_norm, self.decoder_norm)

    def apply_to_training(self, config: TrainConfig, seed: int) -> TrainConfig:
        """Return the settings of a training with the composition, loss and learning rate of this arm."""
        return replace(
            config,
            composition=self.composition,
            balanced=self.balanced,
            learning_rate=self.learning_rate or config.learning_rate,
            seed=seed,
        )

    def resolve_norms(self, model: ModelSettings) -> Arm:
        """Return the arm with the model's norms in place of `own`; `own` is appended to its name, as in `fixed own`."""
        if OWN_NORM not in (self.encoder_norm, self.decoder_norm):
            return self
        norms = {"encoder_norm": "none", **model.norms}
        return replace(
            self,
            name=f"{self.name} {OWN_NORM}",
            encoder_norm=norms["encoder_norm"] if self.encoder_norm == OWN_NORM else self.encoder_norm,
            decoder_norm=norms["decoder_norm"] if self.decoder_norm == OWN_NORM else self.decoder_norm,
        )

    def to_setting(self) -> str | dict[str, Any]:
        """Return the arm as a JSON-serializable setting: its key, or all its fields if `parse_arm` does not know it.

        Raises:
            ValueError: `parse_composition` does not restore the composition from its text.

        """
        try:
            if parse_arm(self.key) == self:
                return self.key
        except ValueError:
            pass
        if parse_composition(str(self.composition)) != self.composition:
            raise ValueError(
                f"composition must be one that parse_composition restores from its text, got {self.composition!r}"
            )
        return {**asdict(self), "composition": str(self.composition)}

    @classmethod
    def from_setting(cls, setting: Any) -> Arm:
        """Return the arm that `to_setting` described.

        Raises:
            ValueError: the setting describes no arm.

        """
        if isinstance(setting, str):
            return parse_arm(setting)
        try:
            return replace(cls(**setting), composition=parse_composition(setting["composition"]))
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"arm must be a key such as fixed/batch, or a mapping of the fields of an arm, got {setting!r}"
            ) from error


_COMPOSITIONS: dict[str, tuple[Composition, bool]] = {
    "fixed": (Fixed(), False),
    "random": (Random(), False),
    "random+balanced": (Random(), True),
    "separate": (Separate(), False),
}


def parse_arm(key: str) -> Arm:
    """Return the arm with a key: `fixed/batch`, `random+balanced/layer`, `random/none-batch` or `fixed/own`.

    Arms with LayerNorm train with a learning rate of 1e-3: with the learning rate of BatchNorm, trainings with
    LayerNorm collapse under random fractions.

    Raises:
        ValueError: the key names an unknown composition or norm.

    Example:
        >>> parse_arm("random/none-batch").decoder_norm
        'batch'

    """
    name, _, norms = key.partition("/")
    encoder_norm, _, decoder_norm = norms.partition("-")
    decoder_norm = decoder_norm or encoder_norm
    if name not in _COMPOSITIONS:
        check_arm("arm", key)
    for option, norm in (("encoder_norm", encoder_norm), ("decoder_norm", decoder_norm)):
        if norm != OWN_NORM:
            NORMS.check(option, norm)
    composition, balanced = _COMPOSITIONS[name]
    learning_rate = 1e-3 if "layer" in (encoder_norm, decoder_norm) else None
    return Arm(name, composition, balanced, encoder_norm, decoder_norm, learning_rate)


ARMS = tuple(
    parse_arm(key)
    for key in (
        "fixed/batch",
        "random+balanced/batch",
        "random/batch",
        "separate/batch",
        "fixed/layer",
        "random+balanced/layer",
        "random/layer",
        "fixed/none",
    )
)
"""The arms that `correct` compares by default: the usual training, the correction, and others to compare it with."""

COMPARISONS = (
    ("random+balanced/batch", "fixed/batch"),
    ("random/batch", "fixed/batch"),
    ("separate/batch", "fixed/batch"),
    ("fixed/layer", "fixed/batch"),
    ("random+balanced/layer", "fixed/layer"),
    ("random/layer", "fixed/layer"),
)
"""Each arm with its baseline. LayerNorm, whose output does not depend on the batch, is the control."""
