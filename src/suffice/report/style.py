"""The visual style of all figures, with a fixed color for each name that suits color blindness and dark pages."""

from __future__ import annotations

import io
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from suffice.files import FIGURE_SUFFIXES, check_suffix

# The palette of Okabe and Ito, whose colors readers with the common forms of color blindness can distinguish.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
# Names that appear together in a figure have different colors; all others get a color by their hash.
_COLORS = {
    "capkv-salience": _PALETTE[0],
    "capkv-profile": _PALETTE[6],
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
_LARGEST_SCALE = 1.3
# The color of text and lines; `to_svg` replaces it by the text color of the page.
_TEXT_COLOR = "#010203"
_SETTINGS: Any = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.edgecolor": _TEXT_COLOR,
    "axes.labelcolor": _TEXT_COLOR,
    "text.color": _TEXT_COLOR,
    "xtick.color": _TEXT_COLOR,
    "ytick.color": _TEXT_COLOR,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "font.size": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "suffice",
}


def color_of(name: str) -> str:
    """Return the color of a policy, model or batch composition, which is the same in every figure.

    Variants, whose names differ after a slash (`fixed/batch`, `fixed/layer`), share a color.
    """
    base = name.partition("/")[0]
    return _COLORS.get(base) or _PALETTE[zlib.crc32(base.encode()) % len(_PALETTE)]


@contextmanager
def figure_style() -> Generator[None]:
    """Apply the style within a `with` block."""
    with mpl.rc_context(_SETTINGS):
        yield


def new_figure(width: float = 6.4, height: float = 3.8, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Create a figure with one or several panels, side by side or one below the other, and return both.

    Args:
        width: width in inches.
        height: height in inches.
        columns: number of panels in a row.
        rows: number of rows.

    """
    with figure_style():
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(rows * columns)]


def to_svg(figure: Figure) -> str:
    """Return a figure as an SVG element whose text and lines have the text color of the page.

    It shrinks on narrow pages, and grows to at most `_LARGEST_SCALE` times its size on wide ones.
    """
    buffer = io.StringIO()
    with figure_style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    # Remove the XML declaration and the document type, which are invalid inside HTML.
    element = text[text.index("<svg") :].replace(_TEXT_COLOR, "currentColor")
    width = figure.get_figwidth() * 72 * _LARGEST_SCALE
    return element.replace("<svg", f'<svg style="max-width: {width:.0f}pt"', 1)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure with a white background to a file.

    Args:
        figure: the figure.
        path: the file, whose suffix determines the format; its folder is created if it is missing.

    Raises:
        ValueError: the suffix is not that of a supported format.

    """
    check_suffix(path, FIGURE_SUFFIXES)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with figure_style(), mpl.rc_context({"savefig.facecolor": "white"}):
        figure.savefig(path, dpi=144, facecolor="white")
