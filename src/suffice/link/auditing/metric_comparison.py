"""What the batch changes in the metrics that people report: AUC, Hits@K and MRR in several kinds of batches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from suffice.link.auditing.edge_set import NumberedEdges
from suffice.link.auditing.module_state import Modes
from suffice.link.auditing.scoring import Scorer
from suffice.link.auditing.snapshot import State
from suffice.link.metrics import auc, hits_at_k, mean_reciprocal_rank

WAYS = {
    "eval": "eval mode",
    "balanced": "training mode, 1:1",
    "test_ratio": "training mode, test ratio",
    "separate": "training mode, separate",
}
"""How edges are scored, and a name for people."""

_HITS = (100, 50, 20, 10, 5, 3, 1)


def choose_k(num_negatives: int) -> int:
    """Return K for Hits@K: 100 or the largest smaller number that is at most a tenth of the negatives, at least 1."""
    return next((k for k in _HITS if 10 * k <= num_negatives), 1)


def compare_metrics(
    edges: NumberedEdges, modes: Modes, restore: State, batch_size: int, seed: int
) -> dict[str, dict[str, float]]:
    """Return AUC, Hits@K and MRR of all edges for each way to score them.

    * `eval`: in eval mode.
    * `balanced`: in training mode, in batches with as many positives as negatives. Edges of the smaller class are used
      several times; the first score counts.
    * `test_ratio`: in training mode, in batches with the same ratio of positives and negatives as all edges together.
    * `separate`: in training mode, positives and negatives in batches of their own.

    Edges are shuffled before they are divided into batches of equal size.

    Args:
        edges: all edges that are scored, and the function that scores them.
        modes: how the module behind `score` is run in training and in eval mode.
        restore: restores the state of the module and of the scoring function.
        batch_size: largest number of edges in a batch.
        seed: seed of the order of the edges.

    Returns:
        `auc`, `hits@K` (see `choose_k`) and `mrr`, for each of `WAYS`.

    """
    generator = torch.Generator().manual_seed(seed)
    sides = [side[:, _permutation(side, generator)] for side in (edges.positives, edges.negatives)]
    scorer = Scorer(edges.score, restore)
    num_positives, num_negatives = (side.size(1) for side in sides)
    k = choose_k(num_negatives)
    found: dict[str, dict[str, float]] = {}
    for way in WAYS:
        with modes.evaluation() if way == "eval" else modes.training():
            scorer.test_repetition(torch.cat([side[:, : batch_size // 2] for side in sides], dim=1))
            scores = [torch.full((side.size(1),), math.nan) for side in sides]
            for chosen in _batches(way, num_positives, num_negatives, batch_size):
                pairs = torch.cat(
                    [side[:, index.to(side.device)] for side, index in zip(sides, chosen, strict=True)], dim=1
                )
                of_batch = scorer.score(pairs).split([index.numel() for index in chosen])
                for known, index, new in zip(scores, chosen, of_batch, strict=True):
                    known[index] = torch.where(known[index].isnan(), new, known[index])
        restore()
        positives, negatives = scores
        found[way] = {
            "auc": auc(positives, negatives),
            f"hits@{k}": hits_at_k(positives, negatives, k),
            "mrr": mean_reciprocal_rank(positives, negatives),
        }
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
