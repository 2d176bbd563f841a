"""`suffice demo`: both parts of the package on small examples, as tables and as one HTML page."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.table import Table

from suffice.cli.console import out, print_json, print_table, print_text, step_progress
from suffice.cli.options import JsonOption
from suffice.files import FIGURE_SUFFIXES, PAGE_SUFFIXES, check_suffix

if TYPE_CHECKING:
    from suffice.kv.eval.demo import DemoResult
    from suffice.link.study.demo import DemoResults


class _Part(NamedTuple):
    """A part of the package, with the library that it needs."""

    title: str
    library: str
    extra: str

    @property
    def is_installed(self) -> bool:
        """Whether the library is installed."""
        return importlib.util.find_spec(self.library) is not None

    @property
    def skip_message(self) -> str:
        """Message that is shown if the part is skipped."""
        library = self.library.replace("_", "-")
        return f"Skipped: {self.title}, which needs {library}. Install it: pip install 'suffice[{self.extra}]'"


_KV = _Part("the KV cache", "transformers", "kv")
_LINK = _Part("link prediction", "torch_geometric", "graph")


def demo(
    report: Annotated[Path, typer.Option(help="Write the results as an HTML page to this file.")] = Path(
        "suffice-demo.html"
    ),
    tokens: Annotated[int, typer.Option(help="Number of tokens in the document.", min=400)] = 2000,
    epochs: Annotated[int, typer.Option(help="Number of epochs of each link predictor.", min=1)] = 12,
    seed: Annotated[int, typer.Option(help="Seed of the document, the splits and the models.")] = 0,
    model: Annotated[
        str | None,
        typer.Option(help="Hugging Face model id, local folder, or gemma3-270m. Default: SmolLM2-135M-Instruct."),
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda:0.")] = "cpu",
    figure: Annotated[
        Path | None, typer.Option(help="Write a figure of KL against budget to this file, such as demo.svg.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what Suffice does: answer questions from compressed KV caches, and audit link predictors on two graphs."""
    check_suffix(report, PAGE_SUFFIXES, "--report")
    if figure is not None:
        check_suffix(figure, FIGURE_SUFFIXES, "--figure")

    from suffice.report import Page, Text, save_figure

    page = Page(
        title="What information does a model keep?",
        summary="Questions about facts in a document, answered from the full KV cache and from half and a quarter of "
        "it; and audits of link predictors that were trained on batches of different composition.",
        command=f"suffice demo --tokens {tokens} --epochs {epochs} --seed {seed}",
    )
    skipped = [part.skip_message for part in (_KV, _LINK) if not part.is_installed]
    if skipped:
        page.add("Skipped", *(Text(line) for line in skipped))
    summary: dict[str, object] = {"seed": seed, "skipped": skipped}
    if _KV.is_installed:
        from suffice.kv.eval.demo import run_demo
        from suffice.kv.eval.demo_report import add_demo, plot_demo
        from suffice.kv.hf.loading import load_model

        with step_progress() as show_step:
            network, tokenizer = load_model(model, device=device, on_progress=show_step)
            result = run_demo(network, tokenizer, tokens=tokens, seed=seed, on_progress=show_step)
        add_demo(page, result)
        summary |= {"tokens": result.tokens, "rows": [asdict(row) for row in result.rows]}
        if figure is not None:
            save_figure(plot_demo(result, "agnostic"), figure)
        if not as_json:
            _print_caches(result)
    if _LINK.is_installed:
        from suffice.link.study.demo import run_demo as run_link_demo
        from suffice.link.study.report_sections import add_demo as add_link_demo

        with step_progress() as show_step:
            results = run_link_demo(epochs=epochs, seed=seed, device=device, log=show_step)
        add_link_demo(page, results)
        summary["link"] = [one.results.to_dict() for one in results]
        if not as_json:
            _print_studies(results)
    page.save(report)
    if as_json:
        print_json(summary)
        return
    for line in (*skipped, f"Page: {report}"):
        print_text(line)


def _print_caches(result: DemoResult) -> None:
    from suffice.kv.eval.demo_report import COLUMNS, COLUMNS_EXPLAINED, MODES, demo_table, describe_results

    for mode, title in MODES.items():
        table = Table(title=f"{title} ({result.tokens} tokens)")
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
        for cells in demo_table(result, mode):
            table.add_row(*cells, end_section=cells[0] == "full")
        print_table(table)
    out.print(COLUMNS_EXPLAINED, highlight=False, style="dim")
    for sentence in describe_results(result):
        out.print(sentence, highlight=False)


def _print_studies(demo: Sequence[DemoResults]) -> None:
    from suffice.cli.link_tables import study_table
    from suffice.link.study.demo import describe_results
    from suffice.link.study.report_sections import COLUMNS_EXPLAINED

    for one in demo:
        print_table(study_table(one.results))
    out.print(COLUMNS_EXPLAINED, highlight=False, style="dim")
    for sentence in describe_results(demo):
        out.print(sentence, highlight=False)
