"""Arms of a study: ways of training that are compared on the same splits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from suffice.link.batches.composition import Composition, Fixed, Random, Separate
from suffice.link.models import EncoderDecoderSettings, ModelSettings
from suffice.link.train.config import TrainConfig

OWN = "own"  # stands for the norms of the model's own settings


@dataclass(frozen=True)
class Arm:
    """One way of training: composition, loss and norms.

    Args:
        name: `fixed`, `random`, `random+balanced`, `separate`, or one of the caller's own.
        composition: positives in a mini-batch.
        balanced: weight both classes the same.
        encoder_norm: `batch`, `layer`, `graph` or `none`, or `own` for what the model's settings say.
        decoder_norm: the same choice.
        learning_rate: Adam's; None for that of the study.

    """

    name: str
    composition: Composition
    balanced: bool = False
    encoder_norm: str = "batch"
    decoder_norm: str = "batch"
    learning_rate: float | None = None

    @property
    def key(self) -> str:
        """Name and norms: `fixed/batch`, or `fixed/batch-none` where encoder and decoder differ."""
        same = self.encoder_norm == self.decoder_norm
        return f"{self.name}/{self.encoder_norm}" + ("" if same else f"-{self.decoder_norm}")

    def model(self, base: ModelSettings) -> ModelSettings:
        """Return the study's model with this arm's norms."""
        return base.with_norms(self.encoder_norm, self.decoder_norm)

    def resolved(self, base: ModelSettings) -> Arm:
        """Return the arm with a model's own norms where it asks for them; its name then says so: `fixed own/layer`."""
        if OWN not in (self.encoder_norm, self.decoder_norm):
            return self
        return replace(
            self,
            name=f"{self.name} {OWN}",
            encoder_norm=base.norms.get("encoder_norm", "none") if self.encoder_norm == OWN else self.encoder_norm,
            decoder_norm=base.norms.get("decoder_norm", "none") if self.decoder_norm == OWN else self.decoder_norm,
        )

    def train(self, base: TrainConfig, seed: int) -> TrainConfig:
        """Return the study's training with this arm's composition, loss and rate."""
        return replace(
            base,
            composition=self.composition,
            balanced=self.balanced,
            learning_rate=self.learning_rate or base.learning_rate,
            seed=seed,
        )


_NAMED: dict[str, tuple[Composition, bool]] = {
    "fixed": (Fixed(), False),
    "random": (Random(), False),
    "random+balanced": (Random(), True),
    "separate": (Separate(), False),
}


def parse_arm(key: str) -> Arm:
    """Return the arm that a key names: `fixed/batch`, `random+balanced/layer`, `random/none-batch`, `fixed/own`.

    LayerNorm under random fractions collapses at the rate that suits BatchNorm, so that arms with LayerNorm in
    the decoder train at 1e-3.

    Raises:
        ValueError: the key names no composition or norm.

    Example:
        >>> parse_arm("random/none-batch").decoder_norm
        'batch'

    """
    name, _, norms = key.partition("/")
    encoder, _, decoder = norms.partition("-")
    if name not in _NAMED:
        raise ValueError(f"arm is {key!r}; accepted: one of {', '.join(_NAMED)}, a slash and a norm")
    composition, balanced = _NAMED[name]
    rate = 1e-3 if "layer" in (encoder, decoder) else None
    arm = Arm(name, composition, balanced, encoder, decoder or encoder, rate)
    arm.resolved(EncoderDecoderSettings()).model(EncoderDecoderSettings())  # refuses what is no norm
    return arm


ARMS = tuple(
    parse_arm(key)
    for key in (
        "fixed/batch",
        "random/batch",
        "random+balanced/batch",
        "separate/batch",
        "fixed/layer",
        "random/layer",
        "random+balanced/layer",
        "fixed/none",
    )
)
# Each arm and the one it is compared with, seed by seed; under LayerNorm they are the attribution control.
PAIRS = (
    ("random/batch", "fixed/batch"),
    ("random+balanced/batch", "fixed/batch"),
    ("separate/batch", "fixed/batch"),
    ("fixed/layer", "fixed/batch"),
    ("random/layer", "fixed/layer"),
    ("random+balanced/layer", "fixed/layer"),
)
