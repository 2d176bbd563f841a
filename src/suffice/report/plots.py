"""Figures of a study: forests of differences, and maps of embeddings side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from suffice.report.figures import colour, new, style


@dataclass(frozen=True)
class Difference:
    """A paired difference: who, by how much, and the interval; bounds that are not numbers are left out."""

    name: str
    mean: float
    low: float
    high: float


def forest(panels: Mapping[str, Sequence[Difference]], *, x_label: str, title: str = "") -> Figure:
    """Draw paired differences with their intervals, one row each, one panel for each metric.

    Args:
        panels: differences by metric, the same names in each.
        x_label: what the differences are, with their unit.
        title: above the panels.

    """
    names = list(dict.fromkeys(row.name for rows in panels.values() for row in rows))
    width = 2.2 + 2.4 * len(panels)
    figure, axes = new(width, 1.3 + 0.32 * len(names), columns=len(panels))
    with style():
        for number, (panel, (metric, rows)) in enumerate(zip(axes, panels.items(), strict=True)):
            for row in rows:
                y, shade = names.index(row.name), colour(row.name)
                if math.isfinite(row.low) and math.isfinite(row.high):
                    panel.plot([row.low, row.high], [y, y], color=shade, linewidth=1.8, solid_capstyle="butt")
                sure = row.low > 0 or row.high < 0
                panel.plot([row.mean], [y], "o", color=shade, markersize=5, fillstyle="full" if sure else "none")
            panel.axvline(0, color="#7F7F7F", linewidth=0.8)
            panel.set(title=metric, xlabel=x_label, ylim=(len(names) - 0.5, -0.5))
            panel.set_yticks(range(len(names)), names if number == 0 else [""] * len(names))
            panel.locator_params(axis="x", nbins=4)
            panel.grid(axis="x", alpha=0.25)
        figure.suptitle(title, x=0.02, ha="left")
    return figure


def scatter_maps(panels: Mapping[str, tuple[Sequence[Sequence[float]], Sequence[int]]]) -> Figure:
    """Draw points in the plane coloured by class, one panel for each name.

    Args:
        panels: places [points, 2] and classes [points] by name.

    """
    figure, axes = new(4.6 * len(panels), 4.4, columns=len(panels))
    for panel, (name, (places, classes)) in zip(axes, panels.items(), strict=True):
        x, y = [place[0] for place in places], [place[1] for place in places]
        panel.scatter(x, y, c=list(classes), cmap="tab10", s=5, linewidths=0)
        panel.set(title=name, xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
    return figure
