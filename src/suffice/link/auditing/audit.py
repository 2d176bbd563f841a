"""Audit of composition bias: how much the score of an edge depends on the rest of its batch (arXiv 2604.25978).

The steps of an audit: `scoring` draws edges and scores them in batches of every composition, `statistics` computes
A_pure, τ and κ from the scores, and `verdict` judges them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from suffice.arguments import check_names, check_number
from suffice.link.auditing.kappa_tau import compute_statistics, noise, score_gap
from suffice.link.auditing.module_state import (
    Modes,
    WithoutDropout,
    find_modules,
    join_modules,
    layers_kept_in_eval_mode,
    runs_in_its_mode,
)
from suffice.link.auditing.norm_layers import NormLayer, batch_norms, check_batch_norms, describe_norm_layers
from suffice.link.auditing.scoring import (
    FRACTIONS,
    MIN_EDGES,
    EdgeSet,
    Repeat,
    Sampling,
    Score,
    actual_batch_size,
    choose_modes,
    score_repeats,
)
from suffice.link.auditing.snapshot import preserve_state
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
        probe_score: median score of the probe edges; NaN in pure batches, which contain no probes.

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

    """

    parts: dict[str, EdgeSetReport]
    layers: tuple[NormLayer, ...]
    verdict: Verdict
    batch_size: int
    repeats: int
    tested: str

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-serializable dictionary."""
        return asdict(self)


def audit(
    score: Score | nn.Module,
    edges: EdgeSet | Mapping[str, EdgeSet],
    *,
    module: nn.Module | Sequence[nn.Module] | None = None,
    batch_size: int = 512,
    num_probes: int = 32,
    repeats: int = 16,
    threshold: float = 0.0,
    frozen: Sequence[str] = (),
    seed: int = 0,
) -> AuditReport:
    """Measure how much the scores of edges depend on the composition of their batch (arXiv 2604.25978).

    The model is scored in training mode, with dropout off, and in eval mode. Its parameters, buffers, attributes and
    mode, the variables and attributes of `score`, what these contain, and random generators are the same afterwards.

    Args:
        score: scoring function, pairs long [2, edges] -> scores [edges]: a module, a method or a function.
        edges: edges on which the model is audited, or several sets of edges by name.
        module: module behind `score`, or several, which are switched between training and eval mode. By default, the
            modules that `score` refers to or calls. With `()`, `score` is called as it is.
        batch_size: edges in a batch. Smaller if an edge set has fewer positives or negatives.
        num_probes: number of probe edges, half of them positives, that stay the same while the composition of the
            rest of their batch changes.
        repeats: number of random draws; 95 % intervals are bootstrapped over them.
        threshold: score above which an edge is predicted to be positive: 0 for logits, 0.5 for probabilities.
        frozen: names of BatchNorm layers that kept their running statistics in training. Layers that stay in eval mode
            when `module.train()` is called need not be named.
        seed: seed of all draws.

    Returns:
        statistics, response curves, norm layers and a verdict.

    Raises:
        TypeError: `score` is not callable or does not return a tensor.
        ValueError: a number is out of range, scores are not finite, the model has parameters that its first call
            initializes, or scoring changes a tensor or array that is too large to be copied.

    Example:
        >>> import torch
        >>> edges = EdgeSet(torch.ones(2, 64).long(), torch.zeros(2, 64).long())
        >>> audit(lambda pairs: pairs[0] - 0.5, edges).verdict.level
        'unaffected'

    """
    if not callable(score):
        raise TypeError(f"score must be a function or module that scores pairs, got {type(score).__name__}")
    sampling = Sampling(batch_size, num_probes, repeats, seed)
    threshold = check_number("threshold", threshold)
    frozen = check_names("frozen", frozen, "names of layers", "['decoder.norm']")
    edge_sets = {"heldout": edges} if isinstance(edges, EdgeSet) else dict(edges)
    if not edge_sets:
        raise ValueError("edges must contain at least one EdgeSet, got an empty mapping")
    if module is not None and not isinstance(module, nn.Module):
        module = join_modules(list(module))
    elif module is None:
        module = _find_module(score, edge_sets.values())
    scores = [score, *(edge_set.score for edge_set in edge_sets.values() if edge_set.score)]
    with preserve_state(module, scores) as restore, WithoutDropout():
        torch.manual_seed(seed)
        frozen_names = _frozen_layers(module, frozen)
        modes = Modes(module, frozen_names)
        layers = _describe_layers(modes, score, next(iter(edge_sets.values())))
        restore()
        parts: dict[str, EdgeSetReport] = {}
        tested = "as called" if module is None else "training mode"
        for name, edge_set in edge_sets.items():
            own_score = edge_set.score or score
            own_modes = choose_modes(own_score, edge_set, modes, sampling, restore)
            if not _keeps_mode(own_modes, own_score, edge_set):
                tested = "eval mode"
            restore()
            scored = score_repeats(own_score, edge_set, own_modes, sampling, restore)
            is_whole = min(edge_set.positives.size(1), edge_set.negatives.size(1)) == actual_batch_size(
                edge_set, sampling
            )
            parts[name] = _summarize(scored, threshold, seed, resample=is_whole)
    evidence = Evidence(
        {name: part.score_gap for name, part in parts.items()},
        {name: part.noise for name, part in parts.items()},
        tested,
        _in_eval_mode(module, frozen_names),
    )
    verdict = judge({name: part.statistics for name, part in parts.items()}, layers, evidence)
    return AuditReport(parts, layers, verdict, batch_size, repeats, tested)


def _find_module(score: Score | nn.Module, edge_sets: Iterable[EdgeSet]) -> nn.Module | None:
    """Return the modules behind the scoring functions, which score a few pairs for it."""
    if isinstance(score, nn.Module):
        return score
    sets = [(edge_set.score or score, edge_set.positives[:, :MIN_EDGES]) for edge_set in edge_sets]

    def call() -> None:
        for scorer, pairs in sets:
            scorer(pairs)

    functions = [function for function, _ in sets]
    with preserve_state(find_modules(functions), functions):
        return find_modules(functions, call)


def _frozen_layers(module: nn.Module | None, names: Sequence[str]) -> set[str]:
    """Return the names of the layers that keep their statistics in training."""
    if module is None:
        return set()
    return check_batch_norms(module, names) | (layers_kept_in_eval_mode(module) & batch_norms(module).keys())


def _in_eval_mode(module: nn.Module | None, frozen: set[str]) -> tuple[str, ...]:
    """Return the BatchNorm layers that someone may have put into eval mode by hand, to freeze them."""
    if module is None or not module.training:
        return ()
    return tuple(name for name, layer in batch_norms(module).items() if not layer.training and name not in frozen)


def _describe_layers(modes: Modes, score: Score, edges: EdgeSet) -> tuple[NormLayer, ...]:
    if modes.module is None:
        return ()
    with modes.evaluation():
        return describe_norm_layers(modes.module, edges.score or score, edges.positives[:, :64], modes.frozen)


def _keeps_mode(modes: Modes, score: Score, edges: EdgeSet) -> bool:
    if modes.module is None:
        return True
    with modes.training():
        return runs_in_its_mode(modes.module, lambda: score(edges.positives[:, :MIN_EDGES]))


def _summarize(repeats: list[Repeat], threshold: float, seed: int, *, resample: bool) -> EdgeSetReport:
    """Average statistics and response curve over repeats.

    Args:
        repeats: scores of every draw.
        threshold: score above which an edge is predicted to be positive.
        seed: seed of the intervals.
        resample: whether intervals also cover the choice of the edges. Without that, the intervals of a set that is no
            larger than a batch have no width, because every draw contains the same edges.

    """
    resampled: list[list[Repeat]] = []
    if resample:
        generator = torch.Generator().manual_seed(seed)
        resampled = [[repeat.resample(generator) for _ in range(_RESAMPLES)] for repeat in repeats]

    def intervals(compute: Callable[[Repeat], dict[str, float]]) -> dict[str, Interval]:
        values = [compute(repeat) for repeat in repeats]
        found = {name: bootstrap_interval([value[name] for value in values], seed=seed) for name in values[0]}
        changes = [
            {name: new[name] - value[name] for name in new}
            for value, again in zip(values, resampled, strict=bool(resampled))
            for new in map(compute, again)
        ]
        if changes:
            found = {name: _widen(found[name], [change[name] for change in changes]) for name in found}
        return found

    statistics = intervals(lambda repeat: {**compute_statistics(repeat, threshold), "score_gap": score_gap(repeat)})
    gap = statistics.pop("score_gap")
    curve = tuple(
        ResponsePoint(fraction, **intervals(lambda repeat, at=fraction: _response(repeat, at, threshold)))
        for fraction in FRACTIONS
    )
    return EdgeSetReport(statistics, curve, gap, noise(repeats))


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
