"""What the batch changes in the metrics that people report: AUC, Hits@K and MRR in several kinds of batches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from suffice.link.auditing.edge_set import NumberedEdges
from suffice.link.auditing.module_state import Modes
from suffice.link.auditing.scoring import Scorer
from suffice.link.auditing.snapshot import State
from suffice.link.metrics import auc, hits_at_k, mean_reciprocal_rank
from suffice.study.results import Interval

WAYS = {
    "eval": "eval mode",
    "balanced": "training mode, 1:1",
    "test_ratio": "training mode, test ratio",
    "separate": "training mode, separate",
}
"""How edges are scored, and a name for people."""

MetricsByWay = dict[str, dict[str, Interval]]
"""Metrics by name, for each of `WAYS`."""

_RESAMPLES = 200  # of the edges, for the intervals

_HITS = (100, 50, 20, 10, 5, 3, 1)


def choose_k(num_negatives: int) -> int:
    """Return K for Hits@K: 100 or the largest smaller number that is at most a tenth of the negatives, at least 1."""
    return next((k for k in _HITS if 10 * k <= num_negatives), 1)


def compare_metrics(edges: NumberedEdges, modes: Modes, restore: State, batch_size: int, seed: int) -> MetricsByWay:
    """Return AUC, Hits@K and MRR of all edges for each way to score them, with 95 % intervals.

    * `eval`: in eval mode.
    * `balanced`: in training mode, in batches with as many positives as negatives. Edges of the smaller class are used
      several times; the first score counts.
    * `test_ratio`: in training mode, in batches with the same ratio of positives and negatives as all edges together.
    * `separate`: in training mode, positives and negatives in batches of their own.

    Edges are shuffled before they are divided into batches of equal size. The intervals are bootstrapped over the edges
    of each class, whose scores stay the same. They therefore say how the metrics vary with the choice of the edges, and
    not with that of their batches or of the seed of a training.

    Args:
        edges: all edges that are scored, and the function that scores them.
        modes: how the module behind `score` is run in training and in eval mode.
        restore: restores the state of the module and of the scoring function.
        batch_size: largest number of edges in a batch.
        seed: seed of the order of the edges, and of the intervals.

    Returns:
        `auc`, `hits@K` (see `choose_k`) and `mrr`, for each of `WAYS`.

    """
    generator = torch.Generator().manual_seed(seed)
    sides = [side[:, _permutation(side, generator)] for side in (edges.positives, edges.negatives)]
    scorer = Scorer(edges.score, restore)
    num_positives, num_negatives = (side.size(1) for side in sides)
    k = choose_k(num_negatives)
    found: MetricsByWay = {}
    for way in WAYS:
        with modes.evaluation() if way == "eval" else modes.training():
            scorer.test_repetition(torch.cat([side[:, : batch_size // 2] for side in sides], dim=1))
            scores = [torch.full((side.size(1),), math.nan, dtype=torch.float64) for side in sides]
            for chosen in _batches(way, num_positives, num_negatives, batch_size):
                pairs = torch.cat(
                    [side[:, index.to(side.device)] for side, index in zip(sides, chosen, strict=True)], dim=1
                )
                of_batch = scorer.score(pairs).split([index.numel() for index in chosen])
                for known, index, new in zip(scores, chosen, of_batch, strict=True):
                    known[index] = torch.where(known[index].isnan(), new, known[index])
        restore()
        found[way] = _metric_intervals(scores[0], scores[1], k, seed)
    return found


def _metric_intervals(positives: Tensor, negatives: Tensor, k: int, seed: int) -> dict[str, Interval]:
    """Return AUC, Hits@K and MRR of scores with bootstrap intervals over both classes."""
    values = {
        "auc": auc(positives, negatives),
        f"hits@{k}": hits_at_k(positives, negatives, k),
        "mrr": mean_reciprocal_rank(positives, negatives),
    }
    resampled = resample_metrics(positives, negatives, k, seed)
    bounds = np.quantile(resampled, (0.025, 0.975), axis=0).T
    return {
        name: Interval(value, min(value, float(low)), max(value, float(high)))
        for (name, value), (low, high) in zip(values.items(), bounds, strict=True)
    }


def resample_metrics(
    positives: Tensor, negatives: Tensor, k: int, seed: int, count: int = _RESAMPLES
) -> NDArray[np.float64]:
    """Return AUC, Hits@K and MRR of positives and negatives that are drawn with replacement, [count, 3].

    The scores are ranked only once. How often each negative is drawn then gives the number of negatives below every
    positive as a difference of cumulative sums.

    Args:
        positives: scores of the positives, [positives].
        negatives: scores of the negatives, [negatives]; at least `k`.
        k: K of Hits@K.
        seed: seed of the draws.
        count: number of draws.

    """
    rng = np.random.default_rng(seed)
    ranked = np.sort(negatives.double().numpy())
    scores = positives.double().numpy()
    num_below, num_not_above = (np.searchsorted(ranked, scores, side) for side in ("left", "right"))
    found = np.empty((count, 3))
    for row in found:
        drawn, times = (
            np.bincount(rng.integers(size, size=size), minlength=size) for size in (scores.size, ranked.size)
        )
        cumulative = np.concatenate([[0], np.cumsum(times)])
        below, not_above = cumulative[num_below], cumulative[num_not_above]
        # The K-th best negative is the last one that has at most size - K of the drawn negatives before it.
        threshold = ranked[np.searchsorted(cumulative, ranked.size - k, "right") - 1]
        ranks = 1 + ranked.size - (below + not_above) / 2
        means = np.stack([(below + not_above) / 2 / ranked.size, scores > threshold, 1 / ranks]) @ drawn / scores.size
        row[:] = means
    return found


def _permutation(side: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randperm(side.size(1), generator=generator).to(side.device)


def _batches(way: str, num_positives: int, num_negatives: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the numbers of the positives and of the negatives of each batch."""
    positives, negatives, none = torch.arange(num_positives), torch.arange(num_negatives), torch.arange(0)
    if way == "separate":
        yield from ((part, none) for part in positives.tensor_split(math.ceil(num_positives / batch_size)))
        yield from ((none, part) for part in negatives.tensor_split(math.ceil(num_negatives / batch_size)))
        return
    if way == "balanced":
        size = max(num_positives, num_negatives)
        count = math.ceil(size / (batch_size // 2))
        sides = (torch.arange(size) % num for num in (num_positives, num_negatives))
        yield from zip(*(side.tensor_split(count) for side in sides), strict=True)
        return
    count = math.ceil((num_positives + num_negatives) / batch_size)
    # The first batches get the positives that are left over, the last ones the negatives.
    yield from zip(positives.tensor_split(count), negatives.flip(0).tensor_split(count)[::-1], strict=True)
