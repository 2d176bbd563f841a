"""Link prediction metrics: Hits@K as OGB defines it, AUC, average precision, MRR."""

from __future__ import annotations

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from sklearn.metrics import average_precision_score
from torch import Tensor


def hits_at_k(positives: Tensor, negatives: Tensor, k: int = 100) -> float:
    """Share of positives scored strictly above the k-th best negative (OGB's Hits@K).

    Args:
        positives: scores, [positives].
        negatives: scores, [negatives].
        k: rank of the negative to beat; 1.0 is returned if there are fewer negatives.

    Raises:
        ValueError: an input is empty, not one-dimensional or NaN; k is not above 0.

    Example:
        >>> hits_at_k(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]), k=1)
        0.5

    """
    _check(positives, negatives)
    if k < 1:
        raise ValueError(f"k is {k}; accepted: at least 1")
    if negatives.numel() < k:
        return 1.0
    threshold = negatives.topk(k).values[-1]
    return float((positives > threshold).double().mean())


def auc(positives: Tensor, negatives: Tensor) -> float:
    """Area under the ROC curve: chance that a positive outranks a negative, ties half (Mann and Whitney's U)."""
    _check(positives, negatives)
    first, second = (scores.detach().double().cpu().numpy() for scores in (positives, negatives))
    wins = float(mannwhitneyu(first, second, method="asymptotic").statistic)
    return wins / (first.size * second.size)


def average_precision(positives: Tensor, negatives: Tensor) -> float:
    """Average precision (scikit-learn's)."""
    _check(positives, negatives)
    labels = np.repeat([1, 0], [positives.numel(), negatives.numel()])
    scores = torch.cat([positives, negatives]).detach().double().cpu().numpy()
    return float(average_precision_score(labels, scores))


def mean_reciprocal_rank(positives: Tensor, negatives: Tensor) -> float:
    """Mean reciprocal rank of each positive among fixed negatives; ties count half, as in OGB.

    Args:
        positives: scores, [positives].
        negatives: scores of the same negatives for all positives, [negatives], or of a positive's own,
            [positives, negatives].

    Raises:
        ValueError: an input is empty or NaN, or shapes do not fit.

    """
    if negatives.ndim == 2:
        if negatives.size(0) != positives.numel() or negatives.numel() == 0:
            raise ValueError(
                f"negatives has shape {tuple(negatives.shape)}; accepted: [{positives.numel()}, negatives]"
            )
        _check(positives, negatives.flatten())
        above = (negatives > positives[:, None]).sum(dim=1)
        tied = (negatives == positives[:, None]).sum(dim=1)
    else:
        _check(positives, negatives)
        ranked = negatives.sort().values
        above = ranked.numel() - torch.searchsorted(ranked, positives.contiguous(), right=True)
        tied = ranked.numel() - torch.searchsorted(ranked, positives.contiguous()) - above
    return float((1 / (1 + above + tied / 2).double()).mean())


def evaluate(positives: Tensor, negatives: Tensor, k: int = 100) -> dict[str, float]:
    """Return every metric by name: `hits@K`, `auc`, `ap`, `mrr`."""
    return {
        f"hits@{k}": hits_at_k(positives, negatives, k),
        "auc": auc(positives, negatives),
        "ap": average_precision(positives, negatives),
        "mrr": mean_reciprocal_rank(positives, negatives),
    }


def _check(positives: Tensor, negatives: Tensor) -> None:
    for name, scores in (("positives", positives), ("negatives", negatives)):
        if scores.ndim != 1 or scores.numel() == 0:
            raise ValueError(f"{name} has shape {tuple(scores.shape)}; accepted: [scores], at least one")
        if bool(scores.isnan().any()):
            raise ValueError(f"{name} hold {int(scores.isnan().sum())} NaN; accepted: numbers")
