"""Statistics of an audit: how strongly scores depend on the composition of their batch (arXiv 2604.25978).

f denotes the fraction of positives in a batch, s the score (logit) of an edge. Each function takes one `Repeat`; the
audit averages over repeats.

| statistic | meaning | unbiased model |
|---|---|---|
| `a_pure` (A_pure) | accuracy of pure batches | equal to the accuracy of balanced batches |
| `tau` (τ) | slope of the predicted-positive fraction over f | TPR − FPR |
| `kappa` (κ) | slope of the probes' median score over f, in units of the score gap | 0 |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor

from suffice.link.auditing.scoring import FRACTIONS, MIXED_FRACTIONS, Repeat
from suffice.link.metrics import auc

LABELS = {"a_pure": "A_pure", "tau": "τ (tau)", "kappa": "κ (kappa)"}
"""Names of statistics for people; the others have the names of `compute_statistics`."""

MEANINGS = {
    "a_pure": "Accuracy in batches of only positives or only negatives. Without bias: that of balanced batches. A "
    "model that compares an edge with the rest of its batch is at chance, 0.5.",
    "tau": "How fast the fraction of edges that are predicted to be positive rises with the fraction of positives in "
    "the batch. Without bias: the true-positive rate minus the false-positive rate.",
    "kappa": "How far the scores of the same edges move as their batch fills with positives, in units of the gap "
    "between positives and negatives. Without bias: 0.",
    "rank_change": "Fraction of pairs of the same edges whose order changes with the batch. Without bias: 0.",
    "eval_gap": "Difference of the scores in training and in eval mode, in units of the gap between positives and "
    "negatives.",
    "accuracy_balanced": "Accuracy in batches with as many positives as negatives.",
    "accuracy_eval": "Accuracy in eval mode.",
    "auc_pure": "AUC of positives scored in a batch of positives and negatives scored in a batch of negatives.",
    "auc_balanced": "AUC in batches with as many positives as negatives.",
    "auc_eval": "AUC in eval mode.",
}
"""What each statistic means, in a sentence or two."""


def compute_statistics(repeat: Repeat, threshold: float) -> dict[str, float]:
    """Return every statistic of a repeat by name.

    Args:
        repeat: scores of one random draw of edges.
        threshold: score above which an edge is predicted to be positive.

    """
    balanced, eval_batch = repeat.batches[0.5], repeat.eval_batch
    return {
        "a_pure": a_pure(repeat, threshold),
        "tau": tau(repeat, threshold),
        "kappa": kappa(repeat),
        "rank_change": rank_change(repeat),
        "eval_gap": eval_gap(repeat),
        "accuracy_balanced": balanced.accuracy(threshold),
        "accuracy_eval": eval_batch.accuracy(threshold),
        "auc_pure": auc(repeat.batches[1.0].scores, repeat.batches[0.0].scores),
        **balanced_aucs(repeat),
    }


def balanced_aucs(repeat: Repeat) -> dict[str, float]:
    """Return the AUC in balanced batches, in training mode and in eval mode, by name."""
    return {
        f"auc_{name}": auc(batch.positives, batch.negatives)
        for name, batch in (("balanced", repeat.batches[0.5]), ("eval", repeat.eval_batch))
    }


def a_pure(repeat: Repeat, threshold: float) -> float:
    """Return A_pure, the mean accuracy of the two pure batches.

        A_pure = ½ · [ P(s > threshold | f = 1) + P(s ≤ threshold | f = 0) ]

    A model that compares an edge with the rest of its batch classifies pure batches at chance (0.5).
    """
    positives, negatives = repeat.batches[1.0].scores, repeat.batches[0.0].scores
    return (float((positives > threshold).float().mean()) + float((negatives <= threshold).float().mean())) / 2


def tau(repeat: Repeat, threshold: float) -> float:
    """Return τ, the least-squares slope of the predicted-positive fraction over f.

        τ = d/df P(s > threshold | f),   f = 0, 0.1, …, 1

    For a model whose scores do not depend on the batch, τ is its true-positive minus its false-positive rate.
    """
    predicted = [repeat.batches[fraction].predicted_positive(threshold) for fraction in FRACTIONS]
    return float(np.polyfit(FRACTIONS, predicted, 1)[0])


def kappa(repeat: Repeat) -> float:
    """Return κ, the slope of the probes' median score over f in units of the score gap.

        κ = d/df median(s of the probes | f) / (mean s⁺ − mean s⁻ at f = 0.5),   f = 0.1, 0.2, …, 0.9

    κ is 0 if scores do not depend on the batch. κ = −1 means that the median score of the same
    edges falls by the whole score gap as f goes from 0 to 1. The median is used because a few outliers of the minority
    class would dominate a mean. NaN if the score gap is 0.
    """
    gap = score_gap(repeat)
    return _slope_of_medians(repeat.probes) / gap if gap else math.nan


def score_gap(repeat: Repeat) -> float:
    """Return the mean score of the positives minus that of the negatives at f = 0.5."""
    balanced = repeat.batches[0.5]
    return float(balanced.positives.mean() - balanced.negatives.mean())


def rank_change(repeat: Repeat) -> float:
    """Return the fraction of probe pairs whose order differs between f = 0.1 and f = 0.9 (from Kendall's τ)."""
    return _discordance(repeat.probes[0.1], repeat.probes[0.9])


def eval_gap(repeat: Repeat) -> float:
    """Return how much scores differ between training and eval mode at f = 0.5: mean absolute difference over score gap.

    NaN if the gap is 0.
    """
    gap = score_gap(repeat)
    difference = float((repeat.batches[0.5].scores - repeat.eval_batch.scores).abs().mean())
    return difference / abs(gap) if gap else math.nan


def noise(repeats: Sequence[Repeat]) -> dict[str, float]:
    """Return how large κ and the rank change are if only the noise of the model changes, not the composition.

    Both compare two scorings of the same batches. `kappa` is twice the standard error that the noise gives the mean of
    κ over repeats; `rank_change` is the mean rank change. Both are 0 if scoring a batch twice gives the same scores.
    """
    kappas: list[float] = []
    changes: list[float] = []
    for repeat in repeats:
        again = repeat.probes_again
        if again is None:
            return {"kappa": 0.0, "rank_change": 0.0}
        difference = _slope_of_medians(repeat.probes) - _slope_of_medians(again)
        kappas.append(difference / (score_gap(repeat) or math.inf))
        changes += [_discordance(repeat.probes[fraction], again[fraction]) for fraction in (0.1, 0.9)]
    # The difference of two scorings has twice the variance of one.
    error = math.sqrt(float(np.mean(np.square(kappas))) / 2 / len(kappas))
    return {"kappa": 2 * error, "rank_change": float(np.mean(changes))}


def _slope_of_medians(probes: Mapping[float, Tensor]) -> float:
    medians = torch.stack([probes[fraction] for fraction in MIXED_FRACTIONS]).quantile(0.5, dim=1)
    return float(np.polyfit(MIXED_FRACTIONS, medians.tolist(), 1)[0])


def _discordance(first: Tensor, second: Tensor) -> float:
    """Return the fraction of pairs of edges that two lists of scores order differently."""
    correlation = float(kendalltau(first.numpy(), second.numpy())[0])  # pyright: ignore[reportArgumentType]
    return 0.0 if math.isnan(correlation) else (1 - correlation) / 2
