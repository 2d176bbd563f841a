"""Figures of audits and studies: response curves, and embeddings of two arms side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

from suffice.link.auditing.audit import AuditReport
from suffice.report import LinePoint, line_plot, tsne_plot
from suffice.study.results import Interval


def plot_response_curves(curves: Mapping[str, Sequence[tuple[float, Interval]]], title: str = "") -> Figure:
    """Plot accuracy against the fraction of positives in the batch, one line per name.

    Args:
        curves: points (fraction, accuracy) by name; the band around a line is left out where accuracy has no bounds.
        title: title above the panel.

    """
    series = {name: [_point(fraction, accuracy) for fraction, accuracy in curve] for name, curve in curves.items()}
    return line_plot(
        series, x_label="fraction of positives in the batch", y_label="accuracy", percent_x=True, title=title
    )


def plot_audit(report: AuditReport) -> Figure:
    """Plot the response curve of an audit, one line per edge set."""
    return plot_response_curves(
        {name: [(point.fraction, point.accuracy) for point in part.curve] for name, part in report.parts.items()}
    )


def plot_embeddings(panels: Mapping[str, tuple[Tensor, Tensor]], *, max_points: int = 600, seed: int = 0) -> Figure:
    """Plot t-SNE maps of embeddings, colored by class, one panel per name.

    Args:
        panels: embeddings [items, channels] and classes [items] by name.
        max_points: maximum number of points in a panel, chosen at random.
        seed: seed of the choice of points and of t-SNE.

    """
    maps: dict[str, tuple[list[list[float]], list[int]]] = {}
    for name, (x, classes) in panels.items():
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:max_points]
        perplexity = min(30.0, (len(chosen) - 1) / 3)
        positions = TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(x[chosen].numpy())
        maps[name] = (positions.tolist(), classes[chosen].tolist())
    return tsne_plot(maps)


def _point(fraction: float, accuracy: Interval) -> LinePoint:
    if not accuracy.has_bounds:
        return LinePoint(fraction, accuracy.mean)
    return LinePoint(fraction, accuracy.mean, max(accuracy.low, 0.0), min(accuracy.high, 1.0))
