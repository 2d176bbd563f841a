"""Plots: lines with intervals, forest plots of differences, heat maps of heads, and scatter plots of embeddings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from suffice.report.style import color_of, figure_style, new_figure

_MARKERS = "osD^vPX*"
_DASHES = ("-", "--", ":", "-.")
_WIDTH = 4.8  # inches: on a page of 360 pixels, texts then have about 9 pixels
_LEGEND_CHARACTERS = 50  # of a row of the legend at this width
_MARKER_CHARACTERS = 7  # that the marker and the gap beside a label take


@dataclass(frozen=True)
class LinePoint:
    """A point of a line plot.

    Args:
        x: position.
        y: value.
        low: lower bound of the value; NaN for no interval.
        high: upper bound of the value; NaN for no interval.

    """

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class ForestRow:
    """A row of a forest plot.

    Args:
        name: label of the row.
        mean: mean difference.
        low: lower bound of its interval; NaN for no interval.
        high: upper bound of its interval; NaN for no interval.

    """

    name: str
    mean: float
    low: float
    high: float


def line_plot(
    series: Mapping[str, Sequence[LinePoint]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_y: bool = False,
    percent_x: bool = False,
) -> Figure:
    """Draw one line for each name, with a band where all points have intervals.

    Args:
        series: points by name. Variants of a name, which differ after a slash, differ in their dashes.
        x_label: label of the x axis.
        y_label: label of the y axis.
        title: title above the panel.
        log_y: use a logarithmic y axis; otherwise the axis includes 0.
        percent_x: show x, a fraction, in percent.

    """
    variants = list(dict.fromkeys(name.partition("/")[2] for name in series))
    longest = max(map(len, series), default=0) + _MARKER_CHARACTERS
    legend_columns = max(1, min(len(series), _LEGEND_CHARACTERS // longest))
    with figure_style():
        # The legend is below the panel, where it cannot cover points and needs no width.
        figure, (axes,) = new_figure(_WIDTH, 3.3 + 0.22 * math.ceil(len(series) / legend_columns))
        for number, (name, points) in enumerate(series.items()):
            x = [point.x for point in points]
            axes.plot(
                x,
                [point.y for point in points],
                color=color_of(name),
                linestyle=_DASHES[variants.index(name.partition("/")[2]) % len(_DASHES)],
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=5,
                linewidth=1.6,
                label=name,
            )
            low, high = [point.low for point in points], [point.high for point in points]
            if not any(map(math.isnan, [*low, *high])):
                axes.fill_between(x, low, high, color=color_of(name), alpha=0.15, linewidth=0)
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
        if log_y:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        if percent_x:
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.25)
        figure.legend(loc="outside lower left", ncols=legend_columns)
        return figure


def head_heatmap(panels: Mapping[str, Mapping[tuple[int, int], float]], *, title: str = "") -> Figure:
    """Draw a value for each layer and KV head as a colored cell, with a scale that names what the colors mean.

    Args:
        panels: for each panel, values by layer and head; its name is what they mean.
        title: title above the panels.

    """
    with figure_style():
        figure, axes = new_figure(_WIDTH, 3.8 * len(panels) + 0.4, rows=len(panels))
        for panel, (name, cells) in zip(axes, panels.items(), strict=True):
            layers = sorted({layer for layer, _ in cells})
            heads = sorted({head for _, head in cells})
            grid = [[cells.get((layer, head), math.nan) for head in heads] for layer in layers]
            image = panel.imshow(grid, aspect="auto", cmap="cividis", interpolation="nearest")
            panel.set(xlabel="KV head", ylabel="layer", title=name)
            panel.set_xticks(range(len(heads)), [str(head) for head in heads])
            step = max(1, len(layers) // 10)
            panel.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
            figure.colorbar(image, ax=panel, label=f"{name} (brighter: more)")
        figure.suptitle(title, x=0.02, ha="left")
        return figure


def forest_plot(panels: Mapping[str, Sequence[ForestRow]], *, x_label: str, title: str = "") -> Figure:
    """Draw differences with their intervals; the circle of a mean is filled if its interval excludes 0.

    Args:
        panels: for each metric, its differences.
        x_label: label of the x axis, with the unit of the differences.
        title: title above the panels.

    """
    names = list(dict.fromkeys(row.name for rows in panels.values() for row in rows))
    figure, axes = new_figure(2.2 + 2.4 * len(panels), 1.3 + 0.32 * len(names), columns=len(panels))
    with figure_style():
        for number, (panel, (metric, rows)) in enumerate(zip(axes, panels.items(), strict=True)):
            for row in rows:
                y, color = names.index(row.name), color_of(row.name)
                if math.isfinite(row.low) and math.isfinite(row.high):
                    panel.plot([row.low, row.high], [y, y], color=color, linewidth=1.8, solid_capstyle="butt")
                excludes_zero = row.low > 0 or row.high < 0
                fill = "full" if excludes_zero else "none"
                panel.plot([row.mean], [y], "o", color=color, markersize=5, fillstyle=fill)
            panel.axvline(0, color="#7F7F7F", linewidth=0.8)
            panel.set(title=metric, xlabel=x_label, ylim=(len(names) - 0.5, -0.5))
            panel.set_yticks(range(len(names)), names if number == 0 else [""] * len(names))
            panel.locator_params(axis="x", nbins=4)
            panel.grid(axis="x", alpha=0.25)
        figure.suptitle(title, x=0.02, ha="left")
    return figure


def tsne_plot(panels: Mapping[str, tuple[Sequence[Sequence[float]], Sequence[int]]]) -> Figure:
    """Draw t-SNE maps, with points colored by class.

    Args:
        panels: for each panel, positions [points, 2] and classes [points].

    """
    figure, axes = new_figure(4.6 * len(panels), 4.4, columns=len(panels))
    for panel, (name, (positions, classes)) in zip(axes, panels.items(), strict=True):
        x, y = [position[0] for position in positions], [position[1] for position in positions]
        panel.scatter(x, y, c=list(classes), cmap="tab10", s=5, linewidths=0)
        panel.set(title=name, xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
    return figure
