"""Audit of composition bias: how much the score of an edge depends on the rest of its batch (arXiv 2604.25978).

The steps of an audit: `prepared` finds the modules behind `score`, `scoring` draws edges and scores them in
batches of every composition, `kappa_tau` computes A_pure, τ and κ from the scores, `couplings` finds the modules that
make scores depend on the batch, and `verdict` judges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from suffice.arguments import check_flag, check_number
from suffice.link.auditing.couplings import Coupling, find_couplings
from suffice.link.auditing.edge_set import MIN_EDGES, EdgeSet, NumberedEdges, Score
from suffice.link.auditing.kappa_tau import balanced_aucs, compute_statistics, noise, score_gap
from suffice.link.auditing.metric_comparison import MetricsByWay, compare_metrics
from suffice.link.auditing.module_state import Modes, runs_in_its_mode
from suffice.link.auditing.norm_layers import NormLayer, batch_norms, describe_norm_layers
from suffice.link.auditing.prepared import check_edges, check_score, prepare
from suffice.link.auditing.scoring import (
    FRACTIONS,
    Repeat,
    Sampling,
    actual_batch_size,
    choose_modes,
    is_of_probabilities,
    score_repeats,
    to_logits,
)
from suffice.link.auditing.verdict import Evidence, Verdict, judge
from suffice.study.results import Interval, bootstrap_interval

_RESAMPLES = 4  # of each repeat, for the intervals of a set that is no larger than a batch


@dataclass(frozen=True)
class ResponsePoint:
    """How the model responds to one composition of the batch.

    Args:
        fraction: fraction of positives in the batch.
        predicted: fraction of edges that are predicted to be positive.
        accuracy: fraction of edges that are classified correctly.
        probe_score: median score of the probe edges, as a logit if scores are probabilities; NaN in pure batches, which
            contain no probes.

    """

    fraction: float
    predicted: Interval
    accuracy: Interval
    probe_score: Interval


@dataclass(frozen=True)
class EdgeSetReport:
    """Result of an audit on one set of edges.

    Args:
        statistics: mean and interval of each statistic by name (see `suffice.link.auditing.kappa_tau`).
        curve: response of the model at each fraction of positives.
        score_gap: mean score of the positives minus that of the negatives at a fraction of 0.5, the unit of κ.
        noise: `kappa` and `rank_change` that come from random numbers in the model alone; 0 if there are none.

    """

    statistics: dict[str, Interval]
    curve: tuple[ResponsePoint, ...]
    score_gap: Interval
    noise: dict[str, float]


@dataclass(frozen=True)
class AuditReport:
    """Result of an audit.

    Args:
        parts: report of each edge set by its name (such as `heldout` and `train`).
        layers: normalization layers of the model.
        verdict: level of composition bias, with reasons and advice.
        batch_size: edges in a batch.
        repeats: number of random draws.
        tested: `training mode`; `eval mode` if `score` switches the model to eval mode itself; or `as called` if there
            is no module.
        probabilities: whether all scores were between 0 and 1, so that κ was computed on their logits.
        threshold: score above which an edge was predicted to be positive.
        couplings: the first modules whose output for an edge depends on the other edges of its batch, found by scoring
            the same edges among different ones; known normalization layers and others.
        metrics: AUC, Hits@K and MRR of each edge set, with their intervals, for each way to score it (see
            `compare_metrics`). Empty unless they were asked for.

    """

    parts: dict[str, EdgeSetReport]
    layers: tuple[NormLayer, ...]
    verdict: Verdict
    batch_size: int
    repeats: int
    tested: str
    probabilities: bool = False
    threshold: float = 0.0
    couplings: tuple[Coupling, ...] = ()
    metrics: dict[str, dict[str, dict[str, Interval]]] = field(
        default_factory=dict[str, dict[str, dict[str, Interval]]]
    )

    def measured(self) -> str:
        """Return sentences on what was measured: A_pure, τ and κ of each edge set, and the reasons of the verdict."""
        numbers: list[str] = []
        for name, part in self.parts.items():
            a_pure, tau, kappa = (part.statistics[key].mean for key in ("a_pure", "tau", "kappa"))
            numbers.append(f"On {name} edges, A_pure is {a_pure:.2f}, τ is {tau:.2f} and κ is {kappa:.2f}.")
        return " ".join((*numbers, self.verdict.why))

    def points(self) -> list[tuple[str, str]]:
        """Return what was measured and what to do, each with its label."""
        return [("Measured", self.measured()), ("What to do", self.verdict.advice)]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-serializable dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        points = (f"{label}: {text}" for label, text in self.points())
        return "\n".join((f"{self.verdict.level}: {self.verdict.headline}", *points))


def audit(
    score: Score | nn.Module,
    edges: EdgeSet | Mapping[str, EdgeSet],
    *,
    module: nn.Module | Sequence[nn.Module] | None = None,
    batch_size: int = 512,
    num_probes: int = 32,
    repeats: int = 16,
    threshold: float | None = None,
    frozen: Sequence[str] = (),
    metrics: bool = False,
    seed: int = 0,
) -> AuditReport:
    """Measure how much the scores of edges depend on the composition of their batch (arXiv 2604.25978).

    The model is scored in training mode, with dropout off, and in eval mode. Its parameters, buffers, attributes and
    mode, the variables and attributes of `score`, what these contain, and random generators are the same afterwards.

    Args:
        score: scoring function, pairs long [2, edges] -> scores [edges]: a module, a method or a function. Scores may
            be a tensor, an array or a tuple of numbers. If the edges have items (see `EdgeSet`), it is called with
            these as keyword arguments.
        edges: edges on which the model is audited, or several sets of edges by name.
        module: module behind `score`, or several, which are switched between training and eval mode. By default, the
            modules that `score` refers to or calls. With `()`, `score` is called as it is.
        batch_size: edges in a batch. Smaller if an edge set has fewer positives or negatives.
        num_probes: number of probe edges, half of them positives, that stay the same while the composition of the
            rest of their batch changes.
        repeats: number of random draws; 95 % intervals are bootstrapped over them.
        threshold: score above which an edge is predicted to be positive. By default, 0.5 if all scores are between 0
            and 1, which are then taken for probabilities, and 0 otherwise. With a threshold of 0 or below, or of 1 or
            above, scores are never taken for probabilities.
        frozen: names of BatchNorm layers that kept their running statistics in training. Layers that stay in eval mode
            when `module.train()` is called need not be named.
        metrics: whether AUC, Hits@K and MRR of all edges are compared in eval mode and in training mode, in batches of
            several compositions. Every edge is then scored four times.
        seed: seed of all draws.

    Returns:
        statistics, response curves, norm layers, modules that couple the edges of a batch, and a verdict.

    Raises:
        TypeError: `score` is not callable or does not return numbers, or `edges` are neither an `EdgeSet` nor a mapping
            of names to such sets.
        ValueError: a number is out of range, scores are not finite, the model has parameters that its first call
            initializes, or scoring changes a tensor or array that is too large to be copied.

    Example:
        >>> import torch
        >>> edges = EdgeSet(torch.ones(2, 64).long(), torch.zeros(2, 64).long())
        >>> audit(lambda pairs: pairs[0] - 0.5, edges).verdict.level
        'unaffected'

    """
    return run_audit(
        score,
        edges,
        module=module,
        batch_size=batch_size,
        num_probes=num_probes,
        repeats=repeats,
        threshold=threshold,
        frozen=frozen,
        metrics=metrics,
        seed=seed,
    )


def run_audit(
    score: Score | nn.Module,
    edges: EdgeSet | Mapping[str, EdgeSet],
    *,
    module: nn.Module | Sequence[nn.Module] | None,
    batch_size: int,
    num_probes: int,
    repeats: int,
    threshold: float | None,
    frozen: Sequence[str],
    seed: int,
    metrics: bool = False,
    is_brief: bool = False,
) -> AuditReport:
    """Audit a model (see `audit`).

    A brief audit has the same means and the same level, but no curve and no couplings, and takes less time.
    """
    check_score(score)
    sampling = Sampling(batch_size, num_probes, repeats, seed)
    if threshold is not None:
        threshold = check_number("threshold", threshold)
    check_flag("metrics", metrics)
    couplings: tuple[Coupling, ...] = ()
    compared: dict[str, MetricsByWay] = {}
    with prepare(score, check_edges(edges), module=module, frozen=frozen, seed=seed) as prepared:
        bound, modes, restore = prepared.edges, prepared.modes, prepared.restore
        layers = _describe_layers(modes, next(iter(bound.values())))
        restore()
        scored: dict[str, list[Repeat]] = {}
        tested = "as called" if modes.module is None else "training mode"
        for name, edge_set in bound.items():
            own_modes = choose_modes(edge_set, modes, sampling, restore)
            if not _keeps_mode(own_modes, edge_set):
                tested = "eval mode"
            restore()
            scored[name] = score_repeats(edge_set, own_modes, sampling, restore)
            if not is_brief:
                couplings += find_couplings(edge_set, own_modes, restore, seed)
            if metrics:
                compared[name] = compare_metrics(edge_set, own_modes, restore, sampling.batch_size, seed)
    couplings = tuple(dict.fromkeys(couplings))
    everything = [repeat for repeats in scored.values() for repeat in repeats]
    probabilities = (threshold is None or 0 < threshold < 1) and all(map(is_of_probabilities, everything))
    if threshold is None:
        threshold = 0.5 if probabilities else 0.0
    at = threshold
    if probabilities:
        scored = {name: [repeat.apply(to_logits) for repeat in repeats] for name, repeats in scored.items()}
        at = float(to_logits(torch.tensor(threshold, dtype=torch.float64)))
    parts = {
        name: _summarize(repeats, at, seed, resample=_is_whole(bound[name], sampling), is_brief=is_brief)
        for name, repeats in scored.items()
    }
    evidence = Evidence(
        score_gaps={name: part.score_gap for name, part in parts.items()},
        noise={name: part.noise for name, part in parts.items()},
        tested=tested,
        in_eval_mode=_in_eval_mode(modes.module, modes.frozen),
        probabilities=probabilities,
        threshold=threshold,
        one_sided=tuple(name for name, repeats in scored.items() if _is_one_sided(repeats, at)),
        couplings=couplings,
    )
    verdict = judge({name: part.statistics for name, part in parts.items()}, layers, evidence)
    return AuditReport(
        parts, layers, verdict, batch_size, repeats, tested, probabilities, threshold, couplings, compared
    )


def _in_eval_mode(module: nn.Module | None, frozen: set[str]) -> tuple[str, ...]:
    """Return the BatchNorm layers that someone may have put into eval mode by hand, to freeze them."""
    if module is None or not module.training:
        return ()
    return tuple(name for name, layer in batch_norms(module).items() if not layer.training and name not in frozen)


def _describe_layers(modes: Modes, edges: NumberedEdges) -> tuple[NormLayer, ...]:
    if modes.module is None:
        return ()
    with modes.evaluation():
        return describe_norm_layers(modes.module, edges.score, edges.positives[:, :64], modes.frozen)


def _keeps_mode(modes: Modes, edges: NumberedEdges) -> bool:
    if modes.module is None:
        return True
    with modes.training():
        return runs_in_its_mode(modes.module, lambda: edges.score(edges.positives[:, :MIN_EDGES]))


def _is_whole(edges: NumberedEdges, sampling: Sampling) -> bool:
    """Return whether a set of edges is no larger than a batch."""
    return min(edges.positives.size(1), edges.negatives.size(1)) == actual_batch_size(edges, sampling)


def _is_one_sided(repeats: list[Repeat], threshold: float) -> bool:
    """Return whether all scores are above the threshold, or none, whatever the fraction of positives."""
    batches = [batch for repeat in repeats for batch in repeat.batches.values()]
    return {batch.predicted_positive(threshold) for batch in batches} in ({0.0}, {1.0})


def _summarize(repeats: list[Repeat], threshold: float, seed: int, *, resample: bool, is_brief: bool) -> EdgeSetReport:
    """Average statistics and response curve over repeats.

    Args:
        repeats: scores of every draw.
        threshold: score above which an edge is predicted to be positive.
        seed: seed of the intervals.
        resample: whether intervals also cover the choice of the edges. Without that, the intervals of a set that is no
            larger than a batch have no width, because every draw contains the same edges.
        is_brief: whether the response curve is left out, and the choice of the edges in the intervals that the verdict
            does not need.

    """
    resampled: list[list[Repeat]] = []
    if resample:
        generator = torch.Generator().manual_seed(seed)
        needed = [repeat.balanced_only() for repeat in repeats] if is_brief else repeats
        resampled = [[repeat.resample(generator) for _ in range(_RESAMPLES)] for repeat in needed]

    def intervals(
        compute: Callable[[Repeat], dict[str, float]], resampled_by: Callable[[Repeat], dict[str, float]] | None = None
    ) -> dict[str, Interval]:
        values = [compute(repeat) for repeat in repeats]
        found = {name: bootstrap_interval([value[name] for value in values], seed=seed) for name in values[0]}
        changes = [
            {name: new_value - value[name] for name, new_value in new.items()}
            for value, again in zip(values, resampled, strict=bool(resampled))
            for new in map(resampled_by or compute, again)
        ]
        for name in changes[0] if changes else ():
            found[name] = _widen(found[name], [change[name] for change in changes])
        return found

    statistics = intervals(
        lambda repeat: {**compute_statistics(repeat, threshold), "score_gap": score_gap(repeat)},
        _with_judged_intervals if is_brief else None,
    )
    gap = statistics.pop("score_gap")
    curve = tuple(
        ResponsePoint(fraction, **intervals(lambda repeat, at=fraction: _response(repeat, at, threshold)))
        for fraction in (() if is_brief else FRACTIONS)
    )
    return EdgeSetReport(statistics, curve, gap, noise(repeats))


def _with_judged_intervals(repeat: Repeat) -> dict[str, float]:
    """Return the statistics of which the verdict needs not only the mean but also the interval."""
    return {**balanced_aucs(repeat), "score_gap": score_gap(repeat)}


def _widen(interval: Interval, changes: list[float]) -> Interval:
    """Return an interval that also covers 95 % of the changes that other edges would make."""
    kept = [change for change in changes if not math.isnan(change)]
    if not kept or not interval.has_bounds:
        return interval
    low, high = np.quantile(kept, (0.025, 0.975))
    return Interval(
        interval.mean, min(interval.low, interval.mean + float(low)), max(interval.high, interval.mean + float(high))
    )


def _response(repeat: Repeat, fraction: float, threshold: float) -> dict[str, float]:
    batch, probes = repeat.batches[fraction], repeat.probes.get(fraction)
    return {
        "predicted": batch.predicted_positive(threshold),
        "accuracy": batch.accuracy(threshold),
        "probe_score": float(probes.quantile(0.5)) if probes is not None else math.nan,
    }
