"""Scores of edges in batches of varying composition: the first step of an audit.

f denotes the fraction of positives in a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from suffice.link.auditing.module_state import norm_mode, preserve_state

Score = Callable[[Tensor], Tensor]

FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MIXED_FRACTIONS = FRACTIONS[1:-1]
MIN_EDGES = 16


@dataclass(frozen=True)
class EdgeSet:
    """Edges to audit a model on.

    Args:
        positives: edges of the graph, long [2, positives]; at least 16.
        negatives: pairs of nodes without an edge, long [2, negatives]; at least 16.
        score: scoring function for these edges; None for the scoring function of the audit. Training edges, for
            example, must be scored on a graph without them.

    Raises:
        ValueError: a tensor has a wrong shape or too few edges.

    """

    positives: Tensor
    negatives: Tensor
    score: Score | None = None

    def __post_init__(self) -> None:
        for name, edges in (("positives", self.positives), ("negatives", self.negatives)):
            if edges.ndim != 2 or edges.size(0) != 2 or edges.size(1) < MIN_EDGES:
                raise ValueError(
                    f"{name} must have shape [2, edges] with at least {MIN_EDGES} edges, got {tuple(edges.shape)}"
                )


@dataclass(frozen=True)
class BatchScores:
    """Scores of one batch, positives first.

    Args:
        scores: float32 [edges].
        num_positives: number of leading scores that belong to positives.

    """

    scores: Tensor
    num_positives: int

    @property
    def positives(self) -> Tensor:
        """Scores of the positives, [num_positives]."""
        return self.scores[: self.num_positives]

    @property
    def negatives(self) -> Tensor:
        """Scores of the negatives, [edges - num_positives]."""
        return self.scores[self.num_positives :]

    def predicted_positive(self, threshold: float) -> float:
        """Return the fraction of edges that are predicted to be positive."""
        return float((self.scores > threshold).float().mean())

    def accuracy(self, threshold: float) -> float:
        """Return the fraction of edges that are classified correctly."""
        correct = (self.positives > threshold).sum() + (self.negatives <= threshold).sum()
        return float(correct) / self.scores.numel()


@dataclass(frozen=True)
class Repeat:
    """Scores of one random draw of edges.

    Args:
        batches: the batch at each of `FRACTIONS`, scored with the norm layers in training mode.
        probes: scores of the same probe edges, half of them positives, within the batch at each of
            `MIXED_FRACTIONS`.
        eval_batch: the batch at f = 0.5, scored with the whole model in eval mode.

    """

    batches: dict[float, BatchScores]
    probes: dict[float, Tensor]
    eval_batch: BatchScores


@dataclass(frozen=True)
class Sampling:
    """How an audit draws its batches.

    Args:
        batch_size: edges in a batch. Smaller if an edge set has fewer positives or negatives.
        num_probes: number of probe edges, half of them positives.
        repeats: number of random draws.
        seed: seed of all draws.

    Raises:
        ValueError: a number is too small.

    """

    batch_size: int
    num_probes: int
    repeats: int
    seed: int

    def __post_init__(self) -> None:
        for name, minimum in (("batch_size", 20), ("num_probes", 4), ("repeats", 2)):
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}")


def score_repeats(
    score: Score, edges: EdgeSet, module: nn.Module | None, frozen: set[str], sampling: Sampling
) -> list[Repeat]:
    """Draw edges `sampling.repeats` times and score them in batches of every composition.

    Args:
        score: scoring function, pairs [2, edges] -> scores [edges].
        edges: edges to draw from.
        module: module behind `score`, whose norm layers are switched between training and eval mode.
        frozen: names of the norm layers that stay in eval mode.
        sampling: size of a batch, and number of probes and repeats.

    """
    size = min(sampling.batch_size, edges.positives.size(1), edges.negatives.size(1))
    # The batch at f = 0.1 must contain all positive probes.
    probes_per_class = max(1, min(sampling.num_probes // 2, int(0.1 * size)))
    generator = torch.Generator().manual_seed(sampling.seed)
    draws = [_draw_edges(edges, size, generator) for _ in range(sampling.repeats)]
    with norm_mode(module, training=False, frozen=frozen):
        eval_batches = [_score_batch(score, positives, negatives, 0.5) for positives, negatives in draws]
    # Norm layers in training mode update their running statistics, so restore those afterwards.
    with preserve_state(module), norm_mode(module, training=True, frozen=frozen):
        batches = [
            {fraction: _score_batch(score, positives, negatives, fraction) for fraction in FRACTIONS}
            for positives, negatives in draws
        ]
    return [
        Repeat(by_fraction, _probe_scores(by_fraction, probes_per_class), eval_batch)
        for by_fraction, eval_batch in zip(batches, eval_batches, strict=True)
    ]


def _draw_edges(edges: EdgeSet, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return `size` random positives and `size` random negatives, each long [2, size]."""
    device = edges.positives.device
    positives = torch.randperm(edges.positives.size(1), generator=generator)[:size]
    negatives = torch.randperm(edges.negatives.size(1), generator=generator)[:size]
    return edges.positives[:, positives.to(device)], edges.negatives[:, negatives.to(device)]


def _score_batch(score: Score, positives: Tensor, negatives: Tensor, fraction: float) -> BatchScores:
    """Score a batch with the given fraction of positives: the first positives and the first negatives of a draw."""
    size = positives.size(1)
    num_positives = round(fraction * size)
    pairs = torch.cat([positives[:, :num_positives], negatives[:, : size - num_positives]], dim=1)
    return BatchScores(_checked_scores(score, pairs), num_positives)


def _probe_scores(batches: dict[float, BatchScores], probes_per_class: int) -> dict[float, Tensor]:
    """Return the scores of the first edges of each class, which every mixed batch contains."""
    return {
        fraction: torch.cat(
            [batches[fraction].positives[:probes_per_class], batches[fraction].negatives[:probes_per_class]]
        )
        for fraction in MIXED_FRACTIONS
    }


def _checked_scores(score: Score, pairs: Tensor) -> Tensor:
    scores: object = score(pairs)
    if not isinstance(scores, Tensor):
        raise TypeError(f"score must return a tensor of scores [edges], got {type(scores).__name__}")
    scores = scores.detach().float().cpu().reshape(-1)
    if scores.numel() != pairs.size(1):
        raise ValueError(f"score must return one score per pair, got {scores.numel()} scores for {pairs.size(1)} pairs")
    if not bool(scores.isfinite().all()):
        raise ValueError(f"score must return finite scores, got {int((~scores.isfinite()).sum())} NaN or infinite ones")
    return scores
