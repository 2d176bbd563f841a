"""Figures in one visual language: the same colour for the same name everywhere, colour-blind safe."""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

# Okabe and Ito's palette, which readers with any common colour blindness can tell apart.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
_FIXED = {
    "capkv-profile": _PALETTE[0],
    "capkv": _PALETTE[5],
    "capkv-paper": _PALETTE[7],
    "snapkv": _PALETTE[1],
    "h2o": _PALETTE[2],
    "keydiff": _PALETTE[3],
    "expected-attention": _PALETTE[4],
    "streaming-llm": _PALETTE[6],
    "full": _PALETTE[7],
    "fixed": _PALETTE[1],
    "random": _PALETTE[0],
    "random+balanced": _PALETTE[2],
    "separate": _PALETTE[3],
    "pyramidkv": _PALETTE[6],
    "tova": _PALETTE[3],
    "knorm": _PALETTE[4],
    "gcn": _PALETTE[0],
    "sage": _PALETTE[5],
    "neognn": _PALETTE[1],
    "ncn": _PALETTE[2],
    "ncnc": _PALETTE[3],
    "elph": _PALETTE[4],
    "buddy": _PALETTE[6],
}
_MARKERS = "osD^vPX*"
_DASHES = ("-", "--", ":", "-.")
# Written for text and lines, then replaced by the page's own text colour.
_INK = "#010203"
_STYLE: Any = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "font.size": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "suffice",
}


@dataclass(frozen=True)
class Point:
    """One measured point: x, y and the interval of y."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


def colour(name: str) -> str:
    """Return the colour that stands for a policy, model or composition in every figure.

    Variants of one, named after a slash (`fixed/batch`, `fixed/layer`), share its colour.
    """
    base = name.partition("/")[0]
    return _FIXED.get(base) or _PALETTE[zlib.crc32(base.encode()) % len(_PALETTE)]


@contextmanager
def style() -> Generator[None]:
    """Draw in this module's style."""
    with mpl.rc_context(_STYLE):
        yield


def new(width: float = 6.4, height: float = 3.8, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure of the given size in inches and its panels, side by side."""
    with style():
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, [figure.add_subplot(1, columns, column + 1) for column in range(columns)]


def lines(
    series: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    log_y: bool = False,
    percent_x: bool = False,
) -> Figure:
    """Draw one line for each name, with intervals where they are given; variants differ in their dashes."""
    variants = list(dict.fromkeys(name.partition("/")[2] for name in series))
    # Room for the legend, which stands beside the panel in columns of sixteen.
    columns = max(1, math.ceil(len(series) / 16))
    with style():
        figure, (axes,) = new(6.4 + 3.2 * (columns - 1), max(3.8, 0.28 * min(len(series), 16)))
        for number, (name, points) in enumerate(series.items()):
            x, y = [p.x for p in points], [p.y for p in points]
            marker = _MARKERS[number % len(_MARKERS)]
            dashes = _DASHES[variants.index(name.partition("/")[2]) % len(_DASHES)]
            axes.plot(
                x, y, color=colour(name), linestyle=dashes, marker=marker, markersize=5, linewidth=1.6, label=name
            )
            if all(p.low is not None and p.high is not None for p in points):
                low, high = [p.low or 0.0 for p in points], [p.high or 0.0 for p in points]
                axes.fill_between(x, low, high, color=colour(name), alpha=0.15, linewidth=0)
        axes.set(xlabel=x_label, ylabel=y_label, title=title)
        if log_y:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        if percent_x:
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.25)
        # Beside the panel: a legend inside covers points.
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=columns)
        return figure


def head_map(panels: Mapping[str, Mapping[tuple[int, int], float]], *, title: str = "") -> Figure:
    """Draw a value for each layer and head as a coloured cell; one panel for each entry."""
    with style():
        figure, axes = new(3.6 * len(panels) + 0.6, 4.6, columns=len(panels))
        for panel, (name, cells) in zip(axes, panels.items(), strict=True):
            layers = sorted({layer for layer, _ in cells})
            heads = sorted({head for _, head in cells})
            grid = [[cells.get((layer, head), float("nan")) for head in heads] for layer in layers]
            image = panel.imshow(grid, aspect="auto", cmap="cividis", interpolation="nearest")
            panel.set(xlabel="KV head", ylabel="layer", title=name)
            panel.set_xticks(range(len(heads)), [str(head) for head in heads])
            step = max(1, len(layers) // 10)
            panel.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
            figure.colorbar(image, ax=panel, shrink=0.8)
        figure.suptitle(title, x=0.02, ha="left")
        return figure


def to_svg(figure: Figure) -> str:
    """Return the figure as an SVG element whose text and lines take the page's colour."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    # Without the XML header and document type, which don't belong inside a page.
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def save(figure: Figure, path: str) -> None:
    """Write a figure to a file on white, the format by its ending."""
    with style(), mpl.rc_context({"savefig.facecolor": "white"}):
        figure.savefig(path, dpi=144, facecolor="white")
