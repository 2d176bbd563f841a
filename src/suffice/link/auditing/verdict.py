"""The verdict of an audit: what its statistics mean, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from suffice.link.auditing.norm_layers import NormLayer
from suffice.study.results import Interval

LEVELS = ("unaffected", "affected", "dominated")

# Thresholds of `judge`, chosen on trainings whose composition is known (see docs/results/link-study.md).
# Share of the accuracy above chance in balanced batches that remains in pure ones. Below 0.2 for models trained at a
# fixed ratio, above 0.3 for models trained at random ratios.
_REMAINING_ACCURACY = 0.25
_NOTICEABLE_DROP = 0.1  # accuracy of balanced minus accuracy of pure batches
_NOTICEABLE_KAPPA = 0.05
_NOTICEABLE_RANK_CHANGE = 0.05
_REVERSAL_KAPPA = -1.0  # the probes fall by the whole gap between positives and negatives
# The model recognizes pure batches if one of three conditions holds.
_PURE_ADVANTAGE = 0.15  # accuracy of pure minus accuracy of balanced batches
_RECOGNIZING_KAPPA = 3.0
_AUC_ADVANTAGE = 0.2  # AUC across pure batches minus AUC in eval mode; counts only if the AUC in eval mode is poor
_POOR_EVAL_AUC = 0.7

_ADVICE = {
    "unaffected": "Nothing needs to be corrected.",
    "affected": (
        "Score edges in eval mode, or always in batches of the same composition. Training with Random(0.05, 0.95) and "
        "the balanced loss reduces the dependence, and longer training with them reduces it further. Replacing the "
        "layers that normalize over the edge batch by LayerNorm or by no norm removes it."
    ),
    "dominated": (
        "Train the model again with Random(0.05, 0.95) and the balanced loss, or replace the layers that normalize "
        "over the edge batch by LayerNorm or by no norm and train again. Freezing the running statistics makes scores "
        "reproducible, but it does not undo what the model has learned."
    ),
}


@dataclass(frozen=True)
class Verdict:
    """How strongly the scores of edges depend on the composition of their batch.

    Args:
        level: `unaffected`, `affected` or `dominated`.
        why: sentences that give the reasons for the level.
        advice: sentences that recommend what to do.

    """

    level: str
    why: str
    advice: str

    def __str__(self) -> str:
        return f"{self.level}: {self.why} {self.advice}"


def judge(parts: Mapping[str, Mapping[str, Interval]], layers: tuple[NormLayer, ...]) -> Verdict:
    """Return the verdict of an audit, whose level is the most severe one of all edge sets.

    An edge set is **dominated** if at least one of these holds:

    * accuracy drops by 0.1 or more from balanced to pure batches, and at most a quarter of the accuracy above chance
      remains;
    * the model recognizes pure batches: they are classified better than balanced ones by 0.15, or κ ≥ 3, or the AUC
      across pure batches exceeds that in eval mode by 0.2 while the latter is below 0.7;
    * κ ≤ −1: the median score of the probes falls by the whole gap between positives and negatives.

    It is **affected** if |κ| ≥ 0.05, if 5 % of the probe pairs change their order, or if the accuracy of pure and
    balanced batches differs by 0.1. Otherwise it is **unaffected**.

    Args:
        parts: statistics of each edge set, by the name of the set.
        layers: normalization layers of the model, named in the explanation if they mix edges.

    """
    judged = [_judge_part(name, {key: value.mean for key, value in part.items()}) for name, part in parts.items()]
    level = max((level for level, _ in judged), key=LEVELS.index)
    reasons = [reason for _, part_reasons in judged for reason in part_reasons]
    if level == "unaffected":
        reasons.append("The score of an edge does not depend on the composition of its batch.")
    if mixing := [layer.name for layer in layers if layer.mixes_edges]:
        reasons.append(f"Layers that normalize over the edge batch: {', '.join(mixing)}.")
    return Verdict(level, " ".join(reasons), _ADVICE[level])


def _judge_part(name: str, values: Mapping[str, float]) -> tuple[str, list[str]]:
    """Return the level of one edge set and the sentences that explain it."""
    pure, balanced, kappa = values["a_pure"], values["accuracy_balanced"], values["kappa"]
    drop = balanced - pure
    accuracies = f"accuracy is {pure:.2f} in pure batches and {balanced:.2f} in balanced ones"
    reasons: list[str] = []
    if drop >= _NOTICEABLE_DROP and pure - 0.5 <= _REMAINING_ACCURACY * (balanced - 0.5):
        reasons.append(
            f"On {name} edges, predictions depend mostly on the batch: {accuracies} (τ = {values['tau']:.2f})."
        )
    auc_advantage = values["auc_pure"] - values["auc_eval"]
    ranks_batches = auc_advantage >= _AUC_ADVANTAGE and values["auc_eval"] < _POOR_EVAL_AUC
    if ranks_batches or drop <= -_PURE_ADVANTAGE or kappa >= _RECOGNIZING_KAPPA:
        reasons.append(
            f"On {name} edges, the model infers the class from the batch: {accuracies}; AUC is "
            f"{values['auc_pure']:.2f} across pure batches and {values['auc_eval']:.2f} in eval mode."
        )
    if kappa <= _REVERSAL_KAPPA:
        reasons.append(
            f"On {name} edges, the median score of the same probe edges falls by {-kappa:.2f} times the gap between "
            f"positives and negatives as the fraction of positives in their batch goes from 0 to 1 (κ = {kappa:.2f})."
        )
    if reasons:
        return "dominated", reasons
    if (
        abs(kappa) >= _NOTICEABLE_KAPPA
        or values["rank_change"] >= _NOTICEABLE_RANK_CHANGE
        or abs(drop) >= _NOTICEABLE_DROP
    ):
        return "affected", [
            f"On {name} edges, the scores of the same probe edges depend on the batch (κ = {kappa:.2f}); {accuracies}."
        ]
    return "unaffected", []
