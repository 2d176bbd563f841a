"""Metrics of link prediction: Hits@K as in OGB, AUC, average precision and mean reciprocal rank."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from suffice.arguments import check_int


def hits_at_k(positives: Tensor, negatives: Tensor, k: int = 100) -> float:
    """Return Hits@K: the fraction of positives with a score strictly above that of the K-th best negative (OGB).

    Args:
        positives: scores of the positives, [positives].
        negatives: scores of the negatives, [negatives].
        k: rank of the negative to beat. With fewer negatives, the result is 1.0 as in OGB, with a warning.

    Raises:
        ValueError: an input is empty, not one-dimensional or contains NaN, or `k` is below 1.

    Example:
        >>> hits_at_k(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]), k=1)
        0.5

    """
    _check_scores(positives, negatives)
    k = check_int("k", k, 1)
    if negatives.numel() < k:
        warnings.warn(
            f"negatives must be at least k={k} for Hits@{k} to have a meaning, got {negatives.numel()}: the result is "
            f"1.0 for any scores. Use more negatives or a smaller k",
            stacklevel=2,
        )
        return 1.0
    threshold = negatives.topk(k).values[-1]
    return float((positives > threshold).double().mean())


def auc(positives: Tensor, negatives: Tensor) -> float:
    """Return the area under the ROC curve: P(positive scores above negative), with ties counted half (Mann-Whitney U).

    Args:
        positives: scores of the positives, [positives].
        negatives: scores of the negatives, [negatives].

    Raises:
        ValueError: an input is empty, not one-dimensional or contains NaN.

    """
    _check_scores(positives, negatives)
    positive_scores, negative_scores = (scores.detach().double().cpu().numpy() for scores in (positives, negatives))
    negative_scores.sort()
    below, not_above = (negative_scores.searchsorted(positive_scores, side) for side in ("left", "right"))
    return float(below.sum() + not_above.sum()) / 2 / (positive_scores.size * negative_scores.size)


def average_precision(positives: Tensor, negatives: Tensor) -> float:
    """Return the average precision (`sklearn.metrics.average_precision_score`).

    Args:
        positives: scores of the positives, [positives].
        negatives: scores of the negatives, [negatives].

    Raises:
        ValueError: an input is empty, not one-dimensional or contains NaN.

    """
    _check_scores(positives, negatives)
    labels = np.repeat([1, 0], [positives.numel(), negatives.numel()])
    scores = torch.cat([positives, negatives]).detach().double().cpu().numpy()
    return float(average_precision_score(labels, scores))


def mean_reciprocal_rank(positives: Tensor, negatives: Tensor) -> float:
    """Return the mean reciprocal rank of each positive among negatives; ties count half, as in OGB.

    Args:
        positives: scores of the positives, [positives].
        negatives: scores of negatives shared by all positives, [negatives], or of each positive's own negatives,
            [positives, negatives].

    Raises:
        ValueError: an input is empty or contains NaN, or the shapes do not match.

    """
    if negatives.ndim == 2:
        if negatives.size(0) != positives.numel() or negatives.numel() == 0:
            raise ValueError(
                f"negatives must have shape [{positives.numel()}, negatives] with one row per positive, "
                f"got {tuple(negatives.shape)}"
            )
        _check_scores(positives, negatives.flatten())
        num_above = (negatives > positives[:, None]).sum(dim=1)
        num_tied = (negatives == positives[:, None]).sum(dim=1)
    else:
        _check_scores(positives, negatives)
        ranked = negatives.sort().values
        num_above = ranked.numel() - torch.searchsorted(ranked, positives.contiguous(), right=True)
        num_tied = ranked.numel() - torch.searchsorted(ranked, positives.contiguous()) - num_above
    return float((1 / (1 + num_above + num_tied / 2).double()).mean())


def compute_metrics(positives: Tensor, negatives: Tensor, k: int = 100) -> dict[str, float]:
    """Return all metrics by name: `hits@K`, `auc`, `ap` and `mrr`.

    Args:
        positives: scores of the positives, [positives].
        negatives: scores of the negatives, [negatives].
        k: K of Hits@K.

    Raises:
        ValueError: an input is empty, not one-dimensional or contains NaN, or `k` is below 1.

    """
    return {
        f"hits@{k}": hits_at_k(positives, negatives, k),
        "auc": auc(positives, negatives),
        "ap": average_precision(positives, negatives),
        "mrr": mean_reciprocal_rank(positives, negatives),
    }


def compute_metric(name: str, positives: Tensor, negatives: Tensor) -> float:
    """Return one metric.

    Args:
        name: `hits@K` (with a number for K), `auc`, `ap` or `mrr`.
        positives: scores of the positives, [positives].
        negatives: scores of the negatives, [negatives].

    Raises:
        ValueError: the metric is unknown, or an input is empty, not one-dimensional or contains NaN.

    """
    if name.removeprefix("hits@").isdigit():
        return hits_at_k(positives, negatives, int(name.removeprefix("hits@")))
    metrics = {"auc": auc, "ap": average_precision, "mrr": mean_reciprocal_rank}
    if name not in metrics:
        raise ValueError(f"metric must be hits@K, auc, ap or mrr, got {name!r}")
    return metrics[name](positives, negatives)


def _check_scores(positives: Tensor, negatives: Tensor) -> None:
    for name, scores in (("positives", positives), ("negatives", negatives)):
        if scores.ndim != 1 or scores.numel() == 0:
            raise ValueError(f"{name} must have shape [scores] with at least one score, got {tuple(scores.shape)}")
        if bool(scores.isnan().any()):
            raise ValueError(f"{name} must not contain NaN, got {int(scores.isnan().sum())} NaN scores")
