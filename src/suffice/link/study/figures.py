"""Pictures: response curves, and embeddings of two trainings side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

from suffice.link.auditing.audit import AuditReport
from suffice.report import LinePoint, line_plot, tsne_plot
from suffice.study.results import Interval


def response(curves: Mapping[str, Sequence[tuple[float, Interval]]], title: str = "") -> Figure:
    """Draw accuracy against the fraction of positives in the batch, one line for each name.

    Args:
        curves: for each name, accuracy by fraction; its band is left out where it has no bounds.
        title: above the panel.

    """
    series = {
        name: [
            LinePoint(x, y.mean) if not y.has_bounds else LinePoint(x, y.mean, max(y.low, 0.0), min(y.high, 1.0))
            for x, y in curve
        ]
        for name, curve in curves.items()
    }
    return line_plot(
        series, x_label="fraction of positives in the batch", y_label="accuracy", percent_x=True, title=title
    )


def audit_response(report: AuditReport) -> Figure:
    """Draw an audit's accuracy against the fraction of positives, with intervals, for each set of edges."""
    return response({name: [(p.fraction, p.accuracy) for p in part.curve] for name, part in report.parts.items()})


def embedding_map(panels: Mapping[str, tuple[Tensor, Tensor]], *, most: int = 600, seed: int = 0) -> Figure:
    """Draw t-SNE maps of embeddings coloured by class, one panel for each training.

    Args:
        panels: embeddings [items, d] and classes [items] by name.
        most: points drawn in a panel.
        seed: of the choice of points and of t-SNE.

    """
    drawn: dict[str, tuple[list[list[float]], list[int]]] = {}
    for name, (x, classes) in panels.items():
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:most]
        perplexity = min(30.0, (len(order) - 1) / 3)
        places = TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(x[order].numpy())
        drawn[name] = (places.tolist(), classes[order].tolist())
    return tsne_plot(drawn)
