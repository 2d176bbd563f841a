"""Audit of composition bias: how much the score of an edge depends on the rest of its batch (arXiv 2604.25978).

The steps of an audit: `scoring` draws edges and scores them in batches of every composition, `statistics` computes
A_pure, τ and κ from the scores, and `verdict` judges them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from suffice.link.auditing.kappa_tau import compute_statistics
from suffice.link.auditing.module_state import norm_mode, preserve_state
from suffice.link.auditing.norm_layers import NormLayer, describe_norm_layers, frozen_batch_norms
from suffice.link.auditing.scoring import FRACTIONS, EdgeSet, Repeat, Sampling, Score, score_repeats
from suffice.link.auditing.verdict import Verdict, judge
from suffice.study.results import Interval, bootstrap_interval


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

    """

    statistics: dict[str, Interval]
    curve: tuple[ResponsePoint, ...]


@dataclass(frozen=True)
class AuditReport:
    """Result of an audit.

    Args:
        parts: report of each edge set by its name (such as `heldout` and `train`).
        layers: normalization layers of the model.
        verdict: level of composition bias, with reasons and advice.
        batch_size: edges in a batch.
        repeats: number of random draws.

    """

    parts: dict[str, EdgeSetReport]
    layers: tuple[NormLayer, ...]
    verdict: Verdict
    batch_size: int
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-serializable dictionary."""
        return asdict(self)


def audit(
    score: Score | nn.Module,
    edges: EdgeSet | Mapping[str, EdgeSet],
    *,
    module: nn.Module | None = None,
    batch_size: int = 512,
    num_probes: int = 32,
    repeats: int = 16,
    threshold: float = 0.0,
    frozen: Sequence[str] = (),
    seed: int = 0,
) -> AuditReport:
    """Measure how much the scores of edges depend on the composition of their batch (arXiv 2604.25978).

    The parameters, buffers, gradients and training mode of the model and the global random generators do not change.

    Args:
        score: scoring function, pairs long [2, edges] -> scores [edges]: a module, a method or a function.
        edges: edges on which the model is audited, or several sets of edges by name.
        module: module behind `score`, whose norm layers are switched between training and eval mode. Defaults to
            `score` if that is a module. Without a module, `score` is called as it is.
        batch_size: edges in a batch. Smaller if an edge set has fewer positives or negatives.
        num_probes: number of probe edges, half of them positives, that stay the same while the composition of the
            rest of their batch changes.
        repeats: number of random draws; 95 % intervals are bootstrapped over them.
        threshold: score above which an edge is predicted to be positive: 0 for logits, 0.5 for probabilities.
        frozen: names of BatchNorm layers that kept their running statistics in training. Layers in eval mode in a
            module in training mode are recognized automatically.
        seed: seed of all draws.

    Returns:
        statistics, response curves, norm layers and a verdict.

    Raises:
        TypeError: `score` is not callable or does not return a tensor.
        ValueError: a number is out of range, or scores are not finite.

    Example:
        >>> import torch
        >>> edges = EdgeSet(torch.ones(2, 64).long(), torch.zeros(2, 64).long())
        >>> audit(lambda pairs: pairs[0] - 0.5, edges).verdict.level
        'unaffected'

    """
    if not callable(score):
        raise TypeError(f"score must be a function or module that scores pairs, got {type(score).__name__}")
    sampling = Sampling(batch_size, num_probes, repeats, seed)
    edge_sets = {"heldout": edges} if isinstance(edges, EdgeSet) else dict(edges)
    if not edge_sets:
        raise ValueError("edges must contain at least one EdgeSet, got an empty mapping")
    if module is None and isinstance(score, nn.Module):
        module = score
    with preserve_state(module):
        frozen_names = frozen_batch_norms(module, frozen) if module is not None else set[str]()
        layers = _describe_layers(module, score, next(iter(edge_sets.values())), frozen_names)
        parts: dict[str, EdgeSetReport] = {}
        for name, edge_set in edge_sets.items():
            scored = score_repeats(edge_set.score or score, edge_set, module, frozen_names, sampling)
            parts[name] = _summarize(scored, threshold, seed)
    verdict = judge({name: part.statistics for name, part in parts.items()}, layers)
    return AuditReport(parts, layers, verdict, batch_size, repeats)


def _describe_layers(module: nn.Module | None, score: Score, edges: EdgeSet, frozen: set[str]) -> tuple[NormLayer, ...]:
    if module is None:
        return ()
    with norm_mode(module, training=False, frozen=frozen):
        return describe_norm_layers(module, edges.score or score, edges.positives[:, :64], frozen)


def _summarize(repeats: list[Repeat], threshold: float, seed: int) -> EdgeSetReport:
    """Average statistics and response curve over repeats."""
    values = [compute_statistics(repeat, threshold) for repeat in repeats]
    statistics = {name: bootstrap_interval([value[name] for value in values], seed=seed) for name in values[0]}
    curve = tuple(_response_point(fraction, repeats, threshold, seed) for fraction in FRACTIONS)
    return EdgeSetReport(statistics, curve)


def _response_point(fraction: float, repeats: list[Repeat], threshold: float, seed: int) -> ResponsePoint:
    batches = [repeat.batches[fraction] for repeat in repeats]
    medians = [
        float(repeat.probes[fraction].quantile(0.5)) if fraction in repeat.probes else float("nan")
        for repeat in repeats
    ]
    return ResponsePoint(
        fraction,
        predicted=bootstrap_interval([batch.predicted_positive(threshold) for batch in batches], seed=seed),
        accuracy=bootstrap_interval([batch.accuracy(threshold) for batch in batches], seed=seed),
        probe_score=bootstrap_interval(medians, seed=seed),
    )
