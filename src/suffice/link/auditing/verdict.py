"""What an audit's numbers mean, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from suffice.link.auditing.norm_layers import NormLayer
from suffice.study.results import Interval


@dataclass(frozen=True)
class Verdict:
    """How much the make-up of a batch decides the scores.

    Args:
        level: `unaffected`, `affected` or `dominated`.
        why: the numbers that say so.
        advice: what to do.

    """

    level: str
    why: str
    advice: str

    def __str__(self) -> str:
        return f"{self.level}: {self.why} {self.advice}"


# Of the accuracy above chance that balanced batches show, the share that has to be left in pure ones; trained
# at a fixed ratio, models on citation graphs, block models and digits keep less than .2, at a random one more
# than .3.
_SURVIVING = 0.25
_NOTICEABLE = 0.1  # of accuracy
_ADVICE = {
    "unaffected": "Nothing to correct.",
    "affected": (
        "Score in eval mode, or in batches of one composition. Random(0.05, 0.95) with balanced loss lessens it, "
        "longer training under it more so; LayerNorm or no norm in place of the layers over the edge batch ends it."
    ),
    "dominated": (
        "Train again with Random(0.05, 0.95) and balanced loss, or with LayerNorm or no norm in place of the layers "
        "over the edge batch; freezing population statistics makes scores repeatable but leaves what was learned."
    ),
}


def judge(parts: Mapping[str, Mapping[str, Interval]], layers: tuple[NormLayer, ...]) -> Verdict:
    """Return the verdict over all audited parts; the worst one decides.

    Dominated, any of:

    * at most a quarter of the accuracy above chance that balanced batches show is left in pure ones;
    * the class is read off the batch: pure batches are classified better by .15 than balanced ones, or κ ≥ 3,
      or pure passes have an AUC .2 above that of eval mode, which is below .7;
    * a probe moves by the whole gap between positives and negatives: κ ≤ −1.

    Affected: probes move by |κ| ≥ .05, their order changes in 5 % of pairs, or accuracy by .1.
    """
    found = [_judge_part(name, {key: value.mean for key, value in part.items()}) for name, part in parts.items()]
    level = max((level for level, _ in found), key=_LEVELS.index)
    reasons = [reason for _, part in found for reason in part]
    if level == "unaffected":
        reasons.append("Scores of an edge don't depend on the make-up of its batch.")
    guilty = [layer.name for layer in layers if layer.sees == "edge batch" and layer.mixes_rows]
    if guilty:
        reasons.append(f"Normalised over the edge batch: {', '.join(guilty)}.")
    return Verdict(level, " ".join(reasons), _ADVICE[level])


_LEVELS = ("unaffected", "affected", "dominated")


def _judge_part(name: str, values: Mapping[str, float]) -> tuple[str, list[str]]:
    pure, balanced, kappa = values["a_pure"], values["accuracy_balanced"], values["kappa"]
    drop = balanced - pure
    accuracies = f"pure batches are classified with accuracy {pure:.2f}, balanced ones with {balanced:.2f}"
    reasons: list[str] = []
    if drop >= _NOTICEABLE and pure - 0.5 <= _SURVIVING * (balanced - 0.5):
        reasons.append(f"On {name} edges the batch decides: {accuracies} (τ = {values['tau']:.2f}).")
    cheat = values["auc_pure"] - values["auc_eval"] >= 0.2 and values["auc_eval"] < 0.7
    if cheat or drop <= -0.15 or kappa >= 3:
        reasons.append(
            f"On {name} edges the class is read off the batch: {accuracies}; AUC is {values['auc_pure']:.2f} over "
            f"pure batches, {values['auc_eval']:.2f} in eval mode."
        )
    if kappa <= -1:
        reasons.append(
            f"On {name} edges the same probes fall by {-kappa:.2f} times the gap between positives and negatives "
            "as their batch fills with positives (κ)."
        )
    if reasons:
        return "dominated", reasons
    if abs(kappa) >= 0.05 or values["rank_change"] >= 0.05 or abs(drop) >= _NOTICEABLE:
        return "affected", [f"On {name} edges the same probes move by κ = {kappa:.2f} of the gap, and {accuracies}."]
    return "unaffected", []
