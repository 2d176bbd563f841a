"""The demo's second half: what the composition of batches does to a link predictor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from suffice.cli.console import out
from suffice.report import Page, Text

if TYPE_CHECKING:
    from suffice.link.study.demo import DemoResults

_COLUMNS_MEAN = (
    "A_pure: accuracy in batches of positives only and of negatives only. κ: how far fixed probes move as their batch "
    "fills with positives, in gaps between positives and negatives; 0 for an honest model. Edge NMI: agreement of "
    "edge embeddings with the classes. AUC: in eval mode, on test edges."
)


def show(examples: list[DemoResults]) -> None:
    """Print a table for each graph and what follows from them."""
    from suffice.cli.link_show import study_table
    from suffice.link.study.demo import describe_results

    for example in examples:
        out.print(study_table(example.results))
    out.print(_COLUMNS_MEAN, highlight=False, style="dim")
    for line in describe_results(examples):
        out.print(line, highlight=False)


def add(page: Page, examples: list[DemoResults]) -> None:
    """Add the sections of this half to a page."""
    from suffice.link.study.demo import describe_results
    from suffice.link.study.report_sections import add_results

    page.add("Link prediction: what the batch decides", *(Text(line) for line in describe_results(examples)))
    for example in examples:
        add_results(page, example.results, example.representations)
    page.add("What the columns mean", Text(_COLUMNS_MEAN))
