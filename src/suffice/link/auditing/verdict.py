"""The verdict of an audit: what its statistics mean, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from suffice.link.auditing.couplings import FUNCTION, Coupling
from suffice.link.auditing.norm_layers import NormLayer
from suffice.study.results import Interval

LEVELS = ("unaffected", "no skill", "undecided", "affected", "dominated")
"""Levels of a verdict, from the least to the most severe one."""

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
# A model that reaches neither in pure batches, in balanced ones nor in eval mode has not learned to predict links.
_SKILL_ACCURACY = 0.6
_SKILL_AUC = 0.75
_ADDED_BY_PURE_BATCHES = 0.05  # to accuracy and AUC of balanced ones: some models only learn to recognize pure batches
_RECOGNIZED_AUC = 0.6  # across pure batches: more is not the work of a wrong sign

_HEADLINES = {
    "unaffected": "The score of an edge does not depend on the composition of its batch.",
    "no skill": "The model predicts links hardly better than chance, so that there is nothing to judge.",
    "undecided": "It is not clear whether the score of an edge depends on the composition of its batch.",
    "affected": "The score of an edge depends on the composition of its batch.",
    "dominated": "What the model predicts for an edge depends mostly on the composition of its batch.",
}

_ADVICE = {
    "unaffected": "Nothing needs to be corrected.",
    "no skill": "Train the model, and check the labels and the sign of the scores, before you audit it.",
    "undecided": "Audit the model again with more edges, or after longer training.",
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
        level: `unaffected`, `affected` or `dominated`; or `no skill` or `undecided` if that cannot be judged.
        why: sentences that give the reasons for the level.
        advice: sentences that recommend what to do.

    """

    level: str
    why: str
    advice: str

    @property
    def headline(self) -> str:
        """What the level means, in a sentence."""
        return _HEADLINES[self.level]

    def __str__(self) -> str:
        return f"{self.level}: {self.why} {self.advice}"


@dataclass(frozen=True)
class Evidence:
    """What limits the meaning of the statistics of an audit.

    Args:
        score_gaps: mean score of the positives minus that of the negatives, the unit of κ, by the name of the set.
        noise: `kappa` and `rank_change` that come from random numbers in the model alone, by the name of the set.
        tested: `training mode`, `eval mode` or `as called` (see `AuditReport`).
        in_eval_mode: BatchNorm layers that were in eval mode while the module was in training mode, but were audited
            like all others.
        probabilities: whether scores were taken for probabilities.
        threshold: score above which an edge is predicted to be positive.
        one_sided: names of the sets of which all scores are on one side of the threshold.
        couplings: modules whose output for an edge depends on the other edges of its batch.

    """

    score_gaps: Mapping[str, Interval] = field(default_factory=dict[str, Interval])
    noise: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    tested: str = "training mode"
    in_eval_mode: tuple[str, ...] = ()
    probabilities: bool = False
    threshold: float = 0.0
    one_sided: tuple[str, ...] = ()
    couplings: tuple[Coupling, ...] = ()


def judge(
    parts: Mapping[str, Mapping[str, Interval]], layers: tuple[NormLayer, ...], evidence: Evidence | None = None
) -> Verdict:
    """Return the verdict of an audit, whose level is the most severe one of all edge sets.

    An edge set is **dominated** if at least one of these holds:

    * accuracy drops by 0.1 or more from balanced to pure batches, and at most a quarter of the accuracy above chance
      remains;
    * the model recognizes pure batches: they are classified better than balanced ones by 0.15, or κ ≥ 3, or the AUC
      across pure batches exceeds that in eval mode by 0.2 while the latter is below 0.7, and that of balanced batches
      by 0.05;
    * κ ≤ −1: the median score of the probes falls by the whole gap between positives and negatives.

    It is **affected** if |κ| ≥ 0.05, if 5 % of the probe pairs change their order, or if the accuracy of pure and
    balanced batches differs by 0.1. What noise alone causes is subtracted from |κ| and from the pairs. Otherwise, it is
    **unaffected**.

    If a set is not unaffected, but accuracy is below 0.6 and AUC below 0.75 in pure batches, balanced batches and eval
    mode, the level is **no skill**: the model has not learned what a batch could replace. A model that classifies and
    ranks pure batches better than balanced ones by 0.05 is an exception.

    It is **undecided** if the interval of the score gap, by which κ is divided, contains 0, and the set is dominated
    for no other reason; and if it is unaffected, but `score` switches the model to eval mode, so that only that was
    tested.

    Args:
        parts: statistics of each edge set, by the name of the set.
        layers: normalization layers of the model, named in the explanation if they mix edges.
        evidence: what limits the meaning of the statistics; nothing by default.

    """
    evidence = evidence or Evidence()
    judged = [
        _judge_part(
            name,
            part,
            evidence.score_gaps.get(name),
            evidence.noise.get(name, {}),
        )
        for name, part in parts.items()
    ]
    level = max((level for level, _ in judged), key=LEVELS.index)
    reasons = [reason for _, part_reasons in judged for reason in part_reasons]
    swapped = [sentence for name, part in parts.items() if (sentence := _explain_swap(name, part))]
    reasons += swapped
    advice = _ADVICE[level]
    frozen = [layer.name for layer in layers if layer.frozen and layer.input_rows == "edges"]
    if level == "unaffected":
        if evidence.tested == "eval mode":
            level = "undecided"
            reasons.append("Only eval mode was tested, because score switches the model to eval mode.")
            advice = "Remove eval() from score, so that training mode is tested too."
        else:
            reasons.append("The score of an edge does not depend on the composition of its batch.")
        if evidence.tested == "as called":
            reasons.append("No module was found behind score: the function was tested only as it is.")
            advice = "If score runs a model that is in eval mode, only eval mode was tested: pass the model as module."
    if frozen:
        reasons.append(
            f"Layers with frozen statistics, for which batch statistics were not tested: {', '.join(frozen)}."
        )
        if level == "unaffected":
            advice = (
                "Scores are reproducible. If the model was trained on batch statistics before they were frozen, "
                "freezing did not undo what it has learned: audit the model as it was in training."
            )
    if mixing := [layer.name for layer in layers if layer.mixes_edges]:
        reasons.append(f"Layers that normalize over the edge batch: {', '.join(mixing)}.")
    reasons += _explain_couplings(evidence.couplings)
    if evidence.probabilities:
        reasons.append(
            f"All scores are between 0 and 1, so they are taken for probabilities: the threshold is "
            f"{evidence.threshold:g}, and κ is computed on their logits."
        )
    if evidence.one_sided:
        reasons.append(
            f"On {' and '.join(evidence.one_sided)} edges, all scores are on one side of the threshold "
            f"{evidence.threshold:g}, so that accuracies say nothing."
        )
        advice += " Pass a threshold that separates the classes, and audit again."
    if swapped:
        advice = f"Check the sign of the scores and the labels first, and audit again. {advice}"
    if evidence.in_eval_mode and level not in ("unaffected", "no skill"):
        names = ", ".join(evidence.in_eval_mode)
        advice += f" If {names} kept stored statistics in training too, name these layers in frozen, and audit again."
    return Verdict(level, " ".join(reasons), advice)


def _explain_couplings(couplings: Sequence[Coupling]) -> list[str]:
    """Return sentences on what couples the edges of a batch, apart from the norm layers, which are named anyway."""
    found: list[str] = []
    if modules := [str(each) for each in couplings if not each.is_norm_layer and each.kind != FUNCTION]:
        found.append(
            f"Modules that are no known normalization layers, but whose output for an edge depends on the other edges "
            f"of its batch: {', '.join(modules)}."
        )
    if any(each.kind == FUNCTION for each in couplings):
        found.append(
            "The score of an edge depends on the other edges of its batch, but the output of no module does: what "
            "couples them is in the function score, or in a method that it calls."
        )
    return found


def _judge_part(
    name: str, part: Mapping[str, Interval], score_gap: Interval | None, noise: Mapping[str, float]
) -> tuple[str, list[str]]:
    """Return the level of one edge set and the sentences that explain it."""
    values = {key: value.mean for key, value in part.items()}
    level, reasons = _judge_dependence(name, values, score_gap, noise)
    if level != "unaffected" and (without_skill := _explain_missing_skill(name, values)):
        level, reasons = "no skill", [without_skill]
    return level, reasons


def _explain_swap(name: str, part: Mapping[str, Interval]) -> str:
    """Return a sentence if negatives score above positives, else an empty string.

    A model that recognizes pure batches also does so in eval mode, but separates pure batches correctly.
    """
    aucs = [part[key] for key in ("auc_balanced", "auc_eval") if key in part]
    if max(auc.high if auc.has_bounds else auc.mean for auc in aucs) >= 0.5 or part["auc_pure"].mean > _RECOGNIZED_AUC:
        return ""
    return (
        f"On {name} edges, negatives score above positives (AUC is {max(auc.mean for auc in aucs):.2f}, below 0.5): "
        f"the sign of the scores or the two sets of edges are likely swapped."
    )


def _judge_dependence(
    name: str, values: Mapping[str, float], score_gap: Interval | None, noise: Mapping[str, float]
) -> tuple[str, list[str]]:
    """Return the level of one edge set and the sentences that explain it, whatever the model has learned."""
    has_gap = score_gap is None or not score_gap.low <= 0 <= score_gap.high
    # κ is divided by the gap: if that may be 0, κ has neither a size nor a sign.
    kappa = values["kappa"] if has_gap else 0.0
    pure, balanced = values["a_pure"], values["accuracy_balanced"]
    drop = balanced - pure
    accuracies = f"accuracy is {pure:.2f} in pure batches and {balanced:.2f} in balanced ones"
    reasons: list[str] = []
    if drop >= _NOTICEABLE_DROP and pure - 0.5 <= _REMAINING_ACCURACY * (balanced - 0.5):
        reasons.append(
            f"On {name} edges, predictions depend mostly on the batch: {accuracies} (τ = {values['tau']:.2f})."
        )
    auc_advantage = values["auc_pure"] - values["auc_eval"]
    # Statistics over nodes that eval mode estimates badly also lower the AUC there, but not that of balanced batches.
    added_auc = values["auc_pure"] - values.get("auc_balanced", values["auc_eval"])
    ranks_batches = (
        auc_advantage >= _AUC_ADVANTAGE and values["auc_eval"] < _POOR_EVAL_AUC and added_auc >= _ADDED_BY_PURE_BATCHES
    )
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
    rise = [_explain_rise(kappa)] if kappa >= _NOTICEABLE_KAPPA + noise.get("kappa", 0.0) else []
    if reasons:
        return "dominated", reasons + rise
    is_noticeable = (
        abs(values["kappa"]) >= _NOTICEABLE_KAPPA + noise.get("kappa", 0.0)
        or values["rank_change"] >= _NOTICEABLE_RANK_CHANGE + noise.get("rank_change", 0.0)
        or abs(drop) >= _NOTICEABLE_DROP
    )
    if is_noticeable and not has_gap:
        return "undecided", [
            f"On {name} edges, scores depend on the batch, but it is not clear how much: positives and negatives have "
            f"nearly the same mean score in balanced batches (difference {score_gap}), and κ is divided by that; "
            f"{accuracies}."
        ]
    if is_noticeable:
        return "affected", [
            f"On {name} edges, the scores of the same probe edges depend on the batch (κ = {kappa:.2f}); {accuracies}.",
            *rise,
        ]
    if noise.get("rank_change", 0.0) > 0:
        return "unaffected", [
            f"On {name} edges, scores of the same batch differ from call to call, which changes the order of "
            f"{noise['rank_change']:.0%} of the pairs of probes; other batches do not change more."
        ]
    return "unaffected", []


def _explain_missing_skill(name: str, values: Mapping[str, float]) -> str:
    """Return a sentence if the model predicts links hardly better than chance, else an empty string."""
    accuracies = [values.get(key, 0.0) for key in ("a_pure", "accuracy_balanced", "accuracy_eval")]
    aucs = [values.get(key, 0.0) for key in ("auc_pure", "auc_balanced", "auc_eval")]
    infers_class = min(accuracies[0] - accuracies[1], aucs[0] - aucs[1]) >= _ADDED_BY_PURE_BATCHES
    if max(accuracies) >= _SKILL_ACCURACY or max(aucs) >= _SKILL_AUC or infers_class:
        return ""
    return (
        f"On {name} edges, accuracy is at most {max(accuracies):.2f} and AUC at most {max(aucs):.2f} in pure batches, "
        f"balanced batches and eval mode (needed: {_SKILL_ACCURACY} or {_SKILL_AUC}): there is nothing to judge."
    )


def _explain_rise(kappa: float) -> str:
    return (
        f"κ is positive: the same edges score higher the more positives their batch contains (κ = {kappa:.2f}). So the "
        f"model infers the fraction of positives from the batch and uses it as evidence for each edge. Random "
        f"fractions without the balanced loss teach this, and so do separate batches of positives and negatives: train "
        f"with the balanced loss."
    )
