"""What an audit's numbers mean, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from retain.link.intervals import Interval
from retain.link.layers import NormLayer


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


def judge(parts: Mapping[str, Mapping[str, Interval]], layers: tuple[NormLayer, ...]) -> Verdict:
    """Return the verdict over all audited parts; the worst one decides.

    Dominated: pure batches are told apart where single edges are not (batch-statistics AUC of pure passes at
    least .2 above eval mode), or probes move by κ ≤ −.85 or κ ≥ 3, or predictions follow the batch neither
    up nor down (τ ≤ .2) at a loss of .15 of accuracy. Affected: probes, accuracy or order move noticeably.
    """
    reasons: list[str] = []
    levels = {"unaffected"}
    for name, values in parts.items():
        a_pure, tau, kappa = values["a_pure"], values["tau"], values["kappa"]
        drop = values["accuracy_balanced"].mean - a_pure.mean
        cheat = values["auc_pure"].mean - values["auc_eval"].mean
        if cheat >= 0.2 and values["auc_eval"].mean < 0.7:
            levels.add("dominated")
            reasons.append(
                f"On {name} edges the model tells pure batches apart (AUC {values['auc_pure'].mean:.2f}) but "
                f"not single edges (AUC in eval mode {values['auc_eval'].mean:.2f})."
            )
        if kappa.mean <= -0.85 or kappa.mean >= 3 or (tau.mean <= 0.2 and drop >= 0.15):
            levels.add("dominated")
            reasons.append(
                f"On {name} edges the same probes move by κ = {kappa.mean:.2f} of the gap between positives "
                f"and negatives as the batch fills with positives; pure batches are classified with accuracy "
                f"{a_pure.mean:.2f}, balanced ones with {values['accuracy_balanced'].mean:.2f} (τ = "
                f"{tau.mean:.2f})."
            )
        elif abs(kappa.mean) >= 0.05 or values["rank_change"].mean >= 0.05 or abs(drop) >= 0.1:
            levels.add("affected")
            reasons.append(
                f"On {name} edges the same probes move by κ = {kappa.mean:.2f}, and accuracy goes from "
                f"{values['accuracy_balanced'].mean:.2f} on balanced to {a_pure.mean:.2f} on pure batches."
            )
    level = next(name for name in ("dominated", "affected", "unaffected") if name in levels)
    guilty = [layer.name for layer in layers if layer.sees == "edge batch" and layer.mixes_rows]
    if guilty:
        reasons.append(f"Normalised over the edge batch: {', '.join(guilty)}.")
    if level == "unaffected":
        return Verdict(
            level,
            " ".join(["Scores of an edge don't depend on the make-up of its batch.", *reasons]),
            "Nothing to correct.",
        )
    advice = (
        "Train again with Random(0.05, 0.95) and balanced loss, or with LayerNorm or no norm in place of "
        "the layers over the edge batch; freezing population statistics makes scores repeatable but leaves "
        "what was learned."
    )
    return Verdict(level, " ".join(dict.fromkeys(reasons)), advice)
