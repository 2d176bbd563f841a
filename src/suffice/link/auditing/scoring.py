"""Scores of edges in batches of varying composition: the first step of an audit.

f denotes the fraction of positives in a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from suffice.arguments import check_int, check_seed
from suffice.link.auditing.edge_set import NumberedEdges
from suffice.link.auditing.module_state import Modes
from suffice.link.auditing.snapshot import State

FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MIXED_FRACTIONS = FRACTIONS[1:-1]
_ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-14}  # relative to the largest score
_SAME_SCORES = 1e-4  # in standard deviations of the scores: a larger difference is not one of rounding


@dataclass(frozen=True)
class BatchScores:
    """Scores of one batch, positives first.

    Args:
        scores: float32 or float64 [edges].
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
        probes_again: scores of the probes when every batch is scored a second time; None if that changes nothing.

    """

    batches: dict[float, BatchScores]
    probes: dict[float, Tensor]
    eval_batch: BatchScores
    probes_again: dict[float, Tensor] | None = None

    def apply(self, function: Callable[[Tensor], Tensor]) -> Repeat:
        """Return the repeat with a function of all scores."""

        def apply_to_all(probes: dict[float, Tensor]) -> dict[float, Tensor]:
            return {fraction: function(scores) for fraction, scores in probes.items()}

        def apply_to_batch(batch: BatchScores) -> BatchScores:
            return replace(batch, scores=function(batch.scores))

        return Repeat(
            {fraction: apply_to_batch(batch) for fraction, batch in self.batches.items()},
            apply_to_all(self.probes),
            apply_to_batch(self.eval_batch),
            None if self.probes_again is None else apply_to_all(self.probes_again),
        )

    def balanced_only(self) -> Repeat:
        """Return the repeat with its balanced batches only, without probes."""
        return Repeat({0.5: self.batches[0.5]}, {}, self.eval_batch)

    def resample(self, generator: torch.Generator) -> Repeat:
        """Return the repeat with its edges drawn again from themselves, with replacement, from each class.

        An edge is drawn equally often in every batch that contains it.
        """
        counts = torch.poisson(torch.ones(2, self.eval_batch.scores.numel()), generator=generator).long()

        def draw(scores: Tensor, row: int) -> Tensor:
            drawn = scores.repeat_interleave(counts[row, : scores.numel()])
            if not drawn.numel():
                return scores
            return drawn[torch.arange(scores.numel()) * drawn.numel() // scores.numel()]  # as many as before

        def draw_from_batch(batch: BatchScores) -> BatchScores:
            return replace(batch, scores=torch.cat([draw(batch.positives, 0), draw(batch.negatives, 1)]))

        probes = {
            fraction: torch.cat([draw(half, row) for row, half in enumerate(scores.chunk(2))])
            for fraction, scores in self.probes.items()
        }
        batches = {fraction: draw_from_batch(batch) for fraction, batch in self.batches.items()}
        return Repeat(batches, probes, draw_from_batch(self.eval_batch))


@dataclass(frozen=True)
class Sampling:
    """How an audit draws its batches.

    Args:
        batch_size: edges in a batch. Smaller if an edge set has fewer positives or negatives.
        num_probes: number of probe edges, half of them positives.
        repeats: number of random draws.
        seed: seed of all draws.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: a number is too small, or a seed is too large.

    """

    batch_size: int
    num_probes: int
    repeats: int
    seed: int

    def __post_init__(self) -> None:
        for name, minimum in (("batch_size", 20), ("num_probes", 4), ("repeats", 2)):
            object.__setattr__(self, name, check_int(name, getattr(self, name), minimum))
        object.__setattr__(self, "seed", check_seed(self.seed))


def score_repeats(edges: NumberedEdges, modes: Modes, sampling: Sampling, restore: State) -> list[Repeat]:
    """Draw edges `sampling.repeats` times and score them in batches of every composition.

    If scoring a batch twice gives different scores, the state is restored before each batch, so that all batches are
    scored in the same state, such as that of a memory. If the scores still differ, every batch is scored twice.

    Args:
        edges: edges to draw from, and the function that scores them.
        modes: how the module behind `score` is switched between training and eval mode.
        sampling: size of a batch, and number of probes and repeats.
        restore: restores the state of the module, such as running statistics, which change in training mode, and that
            of the scoring function.

    """
    size = actual_batch_size(edges, sampling)
    # The batch at f = 0.1 must contain all positive probes.
    probes_per_class = max(1, min(sampling.num_probes // 2, int(0.1 * size)))
    generator = torch.Generator().manual_seed(sampling.seed)
    draws = [_draw_edges(edges, size, generator) for _ in range(sampling.repeats)]
    scorer = Scorer(edges.score, restore)

    def score(draw: tuple[Tensor, Tensor], fraction: float) -> BatchScores:
        pairs, num_positives = _batch(draw, fraction)
        return BatchScores(scorer.score(pairs), num_positives)

    with modes.evaluation():
        scorer.test_repetition(_batch(draws[0], 0.5)[0])
        eval_batches = [score(draw, 0.5) for draw in draws]
    restore()

    def score_all() -> list[dict[float, BatchScores]]:
        return [{fraction: score(draw, fraction) for fraction in FRACTIONS} for draw in draws]

    with modes.training():
        has_noise = scorer.test_repetition(_batch(draws[0], 0.5)[0])
        batches = score_all()
        again = score_all() if has_noise else None
    restore()
    return [
        Repeat(
            by_fraction,
            _probe_scores(by_fraction, probes_per_class),
            eval_batches[draw],
            _probe_scores(again[draw], probes_per_class) if again else None,
        )
        for draw, by_fraction in enumerate(batches)
    ]


def actual_batch_size(edges: NumberedEdges, sampling: Sampling) -> int:
    """Return the number of edges in a batch, which is limited by the smaller class."""
    return min(sampling.batch_size, edges.positives.size(1), edges.negatives.size(1))


def choose_modes(edges: NumberedEdges, modes: Modes, sampling: Sampling, restore: State) -> Modes:
    """Return the modes with `whole_tree` if the training mode of the norm layers alone gives other scores.

    A model may normalize without a norm layer that the audit knows, for example by `torch.nn.functional.batch_norm`.
    So one batch is scored in both ways. If that fails with the whole tree in training mode, the norm layers remain.
    """
    if modes.module is None:
        return modes
    size = actual_batch_size(edges, sampling)
    pairs = torch.cat([edges.positives[:, : size // 4], edges.negatives[:, : size - size // 4]], dim=1)
    whole_tree = replace(modes, whole_tree=True)

    def scores(chosen: Modes) -> Tensor:
        torch.manual_seed(sampling.seed)
        with chosen.training():
            found = edges.score(pairs)
        restore()
        return found

    of_norms = scores(modes)
    try:
        of_all = scores(whole_tree)
    except Exception:  # whatever a foreign module raises in training mode, such as one that then returns a loss
        restore()
        return modes
    return modes if same_scores(of_norms, of_all) else whole_tree


def is_of_probabilities(repeat: Repeat) -> bool:
    """Return whether all scores of a repeat are from 0 to 1."""
    batches = [*repeat.batches.values(), repeat.eval_batch]
    return all(bool(((batch.scores >= 0) & (batch.scores <= 1)).all()) for batch in batches)


def to_logits(probabilities: Tensor) -> Tensor:
    """Return the logits of probabilities in their dtype; 0 and 1 are moved by the rounding error of that dtype."""
    dtype = probabilities.dtype
    return torch.logit(probabilities.double(), eps=torch.finfo(dtype).eps).to(dtype)


def same_scores(first: Tensor, second: Tensor) -> bool:
    """Return whether scores differ by rounding only."""
    rounding = _ROUNDING[first.dtype] * float(first.abs().max())
    return float((first - second).abs().max()) <= _SAME_SCORES * float(first.std()) + rounding


def _draw_edges(edges: NumberedEdges, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return `size` random positives and `size` random negatives, each long [3, size]."""
    device = edges.positives.device
    positives = torch.randperm(edges.positives.size(1), generator=generator)[:size]
    negatives = torch.randperm(edges.negatives.size(1), generator=generator)[:size]
    return edges.positives[:, positives.to(device)], edges.negatives[:, negatives.to(device)]


class Scorer:
    """Scores batches, and restores the state before each of them if scoring changes what is scored next.

    Args:
        score: function of pairs, [3, edges] -> scores [edges].
        restore: restores the state of modules and scoring functions.

    """

    def __init__(self, score: Callable[[Tensor], Tensor], restore: State) -> None:
        self._score, self._restore = score, restore
        self._restores_state = False

    def test_repetition(self, pairs: Tensor) -> bool:
        """Decide whether the state has to be restored, and return whether scores differ nevertheless: by noise."""
        self._restores_state = False
        if same_scores(self.score(pairs), self.score(pairs)):
            return False
        self._restores_state = True
        return not same_scores(self.score(pairs), self.score(pairs))

    def score(self, pairs: Tensor) -> Tensor:
        """Return the scores of a batch, [edges]."""
        if self._restores_state:
            self._restore(with_scores=True)
        return self._score(pairs)


def _batch(draw: tuple[Tensor, Tensor], fraction: float) -> tuple[Tensor, int]:
    """Return a batch with a fraction of positives, [3, edges], and their number: the first edges of a draw."""
    positives, negatives = draw
    size = positives.size(1)
    num_positives = round(fraction * size)
    return torch.cat([positives[:, :num_positives], negatives[:, : size - num_positives]], dim=1), num_positives


def _probe_scores(batches: dict[float, BatchScores], probes_per_class: int) -> dict[float, Tensor]:
    """Return the scores of the first edges of each class, which every mixed batch contains."""
    return {
        fraction: torch.cat(
            [batches[fraction].positives[:probes_per_class], batches[fraction].negatives[:probes_per_class]]
        )
        for fraction in MIXED_FRACTIONS
    }
