"""The audit of how the scores of an edge depend on what else is in its batch.

f is the fraction of positives in a batch of edges. Over several draws of probes and company it measures, in
the forward pass that training used (norm layers on batch statistics, dropout off):

* A_pure, the mean accuracy of pure batches, f = 1 and f = 0;
* τ, the slope of the predicted-positive fraction against f; TPR − FPR for an honest model;
* κ, the slope of the median logit of fixed probes over f in [0.1, 0.9], divided by the gap between positives
  and negatives at f = 0.5; 0 for an honest model.

The median, since a few outliers of the minority class dominate a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor, nn

from suffice.link.auditing.norm_layers import NormLayer, as_module, find_norms, frozen_names, mode, untouched
from suffice.link.auditing.verdict import Verdict, judge
from suffice.link.metrics import auc
from suffice.study.results import Interval, bootstrap_interval

Score = Callable[[Tensor], Tensor]
FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class EdgeSet:
    """Edges to audit on.

    Args:
        positives: long [2, positives].
        negatives: long [2, negatives].
        score: scores these edges if they need their own (training edges, masked from the messages).

    """

    positives: Tensor
    negatives: Tensor
    score: Score | None = None

    def __post_init__(self) -> None:
        for name, edges in (("positives", self.positives), ("negatives", self.negatives)):
            if edges.ndim != 2 or edges.size(0) != 2 or edges.size(1) < 16:
                raise ValueError(f"{name} has shape {tuple(edges.shape)}; accepted: [2, edges], 16 or more")


@dataclass(frozen=True)
class Point:
    """The response at one composition: predicted-positive fraction, accuracy, median probe logit."""

    fraction: float
    predicted: Interval
    accuracy: Interval
    probe_logit: Interval  # NaN in pure batches, which hold no probes


@dataclass(frozen=True)
class PartReport:
    """Statistics by name and the response curve, on one set of edges."""

    statistics: dict[str, Interval]
    curve: tuple[Point, ...]


@dataclass(frozen=True)
class AuditReport:
    """What an audit found: parts by name (`heldout`, `train`), norm layers, verdict."""

    parts: dict[str, PartReport]
    layers: tuple[NormLayer, ...]
    verdict: Verdict
    batch_size: int
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON holds it."""
        return asdict(self)


def audit(
    score: Score | nn.Module,
    edges: EdgeSet | Mapping[str, EdgeSet],
    *,
    module: nn.Module | None = None,
    batch_size: int = 512,
    probes: int = 32,
    repeats: int = 16,
    threshold: float = 0.0,
    frozen: tuple[str, ...] = (),
    seed: int = 0,
) -> AuditReport:
    """Audit anything that scores pairs for dependence on the make-up of its batches (arXiv 2604.25978).

    The model is left as it was: parameters, buffers, modes, gradients and random generators.

    Args:
        score: maps pairs [2, edges] to scores [edges]; a module, a method, or a plain function.
        edges: what to audit on; several sets by name.
        module: the module behind `score`, whose norm layers are run on batch and on stored statistics;
            `score` itself if that is a module. Without one, `score` is taken as it is.
        batch_size: edges in a batch; less where a set holds fewer positives or negatives.
        probes: edges, half of them positives, that stay while the rest of their batch changes.
        repeats: draws of probes and company; intervals are bootstrapped over them.
        threshold: score above which an edge is predicted: 0 for logits, 0.5 for probabilities.
        frozen: paths of batch norms that kept their stored statistics in training; layers that are in eval
            mode while the module trains are recognised without.
        seed: decides all draws.

    Raises:
        TypeError: `score` can't be called, or returns something else than scores.
        ValueError: a number is out of range, or scores are not finite.

    Example:
        >>> edges = EdgeSet(torch.ones(2, 64).long(), torch.zeros(2, 64).long())
        >>> audit(lambda pairs: pairs[0] - 0.5, edges).verdict.level
        'unaffected'

    """
    if not callable(score):
        raise TypeError(f"score is {type(score).__name__}; accepted: a function or module of pairs")
    for name, value, least in (("batch_size", batch_size, 20), ("probes", probes, 4), ("repeats", repeats, 2)):
        if value < least:
            raise ValueError(f"{name} is {value}; accepted: at least {least}")
    sets = {"heldout": edges} if isinstance(edges, EdgeSet) else dict(edges)
    if not sets:
        raise ValueError("edges is empty; accepted: at least one EdgeSet")
    module = as_module(score) if module is None else module
    with untouched(module):
        still = frozen_names(module, frozen) if module is not None else set[str]()
        layers: tuple[NormLayer, ...] = ()
        first = next(iter(sets.values()))
        if module is not None:
            with mode(module, batch_statistics=False, frozen=still):
                layers = find_norms(module, first.score or score, first.positives[:, :64], still)
        parts = {
            name: _audit_part(part.score or score, part, module, still, batch_size, probes, repeats, threshold, seed)
            for name, part in sets.items()
        }
    verdict = judge({name: part.statistics for name, part in parts.items()}, layers)
    return AuditReport(parts, layers, verdict, batch_size, repeats)


@dataclass(frozen=True)
class _Draw:
    """Logits of one repeat: by fraction for the whole batch, positives first, and of the probes in it."""

    batch: dict[float, Tensor]
    positives: dict[float, int]
    probes: dict[float, Tensor]


def _audit_part(
    score: Score,
    edges: EdgeSet,
    module: nn.Module | None,
    frozen: set[str],
    batch_size: int,
    probes: int,
    repeats: int,
    threshold: float,
    seed: int,
) -> PartReport:
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, edges.positives.size(1), edges.negatives.size(1))
    # At f = 0.1 a batch still has to hold the probes' own positives.
    half = max(1, min(probes // 2, int(0.1 * size)))
    orders = [
        (
            torch.randperm(edges.positives.size(1), generator=generator)[:size],
            torch.randperm(edges.negatives.size(1), generator=generator)[:size],
        )
        for _ in range(repeats)
    ]
    with mode(module, batch_statistics=False, frozen=frozen):
        evaluated = [_run(score, _balanced(edges, positives, negatives)) for positives, negatives in orders]
    # Running on batch statistics moves the stored ones: they are given back before the next set of edges.
    with untouched(module), mode(module, batch_statistics=True, frozen=frozen):
        draws = [_draw(score, edges, positives, negatives, half) for positives, negatives in orders]
    values = [_statistics(draw, stored, half, threshold) for draw, stored in zip(draws, evaluated, strict=True)]
    statistics = {name: bootstrap_interval([value[name] for value in values], seed=seed) for name in values[0]}
    curve = tuple(_point(fraction, draws, threshold, seed) for fraction in FRACTIONS)
    return PartReport(statistics, curve)


def _draw(score: Score, edges: EdgeSet, positives: Tensor, negatives: Tensor, half: int) -> _Draw:
    size = positives.numel()
    batch: dict[float, Tensor] = {}
    count: dict[float, int] = {}
    probes: dict[float, Tensor] = {}
    for fraction in FRACTIONS:
        own = round(fraction * size)
        pairs = _pairs(edges, positives[:own], negatives[: size - own])
        batch[fraction], count[fraction] = _run(score, pairs), own
        if 0 < fraction < 1:
            # The first of each class: in every mixed batch.
            logits = batch[fraction]
            probes[fraction] = torch.cat([logits[:half], logits[own : own + half]])
    return _Draw(batch, count, probes)


def _pairs(edges: EdgeSet, positives: Tensor, negatives: Tensor) -> Tensor:
    device = edges.positives.device
    return torch.cat([edges.positives[:, positives.to(device)], edges.negatives[:, negatives.to(device)]], dim=1)


def _balanced(edges: EdgeSet, positives: Tensor, negatives: Tensor) -> Tensor:
    own = round(0.5 * positives.numel())
    return _pairs(edges, positives[:own], negatives[: positives.numel() - own])


def _run(score: Score, pairs: Tensor) -> Tensor:
    scores: object = score(pairs)
    if not isinstance(scores, Tensor):
        raise TypeError(f"score returned {type(scores).__name__}; accepted: a tensor of scores [edges]")
    scores = scores.detach().float().cpu().reshape(-1)
    if scores.numel() != pairs.size(1):
        raise ValueError(f"score returned {scores.numel()} scores; accepted: {pairs.size(1)}, one a pair")
    if not bool(scores.isfinite().all()):
        raise ValueError("score returned NaN or infinite scores; accepted: finite numbers")
    return scores


def _statistics(draw: _Draw, stored: Tensor, half: int, threshold: float) -> dict[str, float]:
    ones, zeros = draw.batch[1.0], draw.batch[0.0]
    own = draw.positives[0.5]
    balanced = draw.batch[0.5]
    gap = float(balanced[:own].mean() - balanced[own:].mean())
    inner = [fraction for fraction in FRACTIONS if 0 < fraction < 1]
    medians = [float(draw.probes[fraction].quantile(0.5)) for fraction in inner]
    predicted = [float((draw.batch[fraction] > threshold).float().mean()) for fraction in FRACTIONS]
    order = float(kendalltau(draw.probes[0.1].numpy(), draw.probes[0.9].numpy())[0])  # pyright: ignore[reportArgumentType]
    return {
        "a_pure": (float((ones > threshold).float().mean()) + float((zeros <= threshold).float().mean())) / 2,
        "tau": float(np.polyfit(FRACTIONS, predicted, 1)[0]),
        "kappa": float(np.polyfit(inner, medians, 1)[0]) / gap if gap else float("nan"),
        "rank_change": 0.0 if np.isnan(order) else (1 - order) / 2,
        "eval_gap": float((balanced - stored).abs().mean()) / abs(gap) if gap else float("nan"),
        "accuracy_balanced": _accuracy(balanced, own, threshold),
        "accuracy_eval": _accuracy(stored, own, threshold),
        "auc_pure": auc(ones, zeros),
        "auc_balanced": auc(balanced[:own], balanced[own:]),
        "auc_eval": auc(stored[:own], stored[own:]),
    }


def _accuracy(logits: Tensor, positives: int, threshold: float) -> float:
    right = (logits[:positives] > threshold).sum() + (logits[positives:] <= threshold).sum()
    return float(right) / logits.numel()


def _point(fraction: float, draws: list[_Draw], threshold: float, seed: int) -> Point:
    predicted = [float((draw.batch[fraction] > threshold).float().mean()) for draw in draws]
    accuracy = [_accuracy(draw.batch[fraction], draw.positives[fraction], threshold) for draw in draws]
    medians = [
        float(draw.probes[fraction].quantile(0.5)) if fraction in draw.probes else float("nan") for draw in draws
    ]
    return Point(
        fraction,
        bootstrap_interval(predicted, seed=seed),
        bootstrap_interval(accuracy, seed=seed),
        bootstrap_interval(medians, seed=seed),
    )
