"""Self-contained HTML and Markdown pages of text, tables and figures.

This package depends neither on `suffice.kv` nor on `suffice.link`; callers pass everything that a page shows.
"""

from suffice.report.blocks import Block, Code, Figure, KeptText, Result, Table, Text
from suffice.report.page import Page
from suffice.report.plots import ForestRow, LinePoint, forest_plot, head_heatmap, line_plot, tsne_plot
from suffice.report.style import color_of, new_figure, save_figure

__all__ = [
    "Block",
    "Code",
    "Figure",
    "ForestRow",
    "KeptText",
    "LinePoint",
    "Page",
    "Result",
    "Table",
    "Text",
    "color_of",
    "forest_plot",
    "head_heatmap",
    "line_plot",
    "new_figure",
    "save_figure",
    "tsne_plot",
]
