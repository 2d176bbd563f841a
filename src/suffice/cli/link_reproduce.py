"""`suffice link reproduce`: the paper's study on every model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from suffice.cli.command_line import command_line
from suffice.cli.console import finite, out, print_json
from suffice.cli.link_options import (
    AtTest,
    BatchSize,
    Device,
    Directions,
    Epochs,
    Json,
    Largest,
    Patience,
    Preset,
    Quiet,
    Root,
    Seeds,
    Test,
    Validation,
    Workers,
    positive,
)
from suffice.cli.watching import watching


def reproduce(
    data: Annotated[str, typer.Option(help="Data sets, with commas.")] = "Cora,CiteSeer",
    models: Annotated[str, typer.Option(help="Models, with commas; all seven if not given.")] = "",
    arms: Annotated[str, typer.Option(help="Arms as NAME/NORM or NAME/ENCODER-DECODER, with commas.")] = "",
    root: Root = Path("data"),
    folder: Annotated[Path, typer.Option(help="Folder of finished runs, to go on from.")] = Path("reproduction"),
    hidden: Annotated[int, typer.Option(help="Number of channels of every model.")] = 64,
    preset: Preset = False,
    epochs: Epochs = 30,
    directions: Directions = 2,
    batch_size: BatchSize = 512,
    patience: Patience = None,
    validation: Validation = 0.05,
    test: Test = 0.10,
    largest_component: Largest = False,
    validation_edges_at_test: AtTest = False,
    seeds: Seeds = 5,
    device: Device = "cpu",
    workers: Workers = 0,
    quiet: Quiet = False,
    show: Annotated[bool, typer.Option("--show", help="Run nothing; show what is finished.")] = False,
    as_json: Json = False,
    markdown: Annotated[Path | None, typer.Option(help="Also write tables and findings as Markdown.")] = None,
) -> None:
    """Run the paper's study: every model on every data set in every way of training."""
    from suffice.link.data.graph import SplitConfig
    from suffice.link.study import reproduction as study
    from suffice.link.study.arms import parse_arm
    from suffice.link.study.findings import to_markdown
    from suffice.link.train.config import TrainConfig

    if show:
        results = study.load_results(folder)
    else:
        with watching(quiet) as watch:
            results = study.reproduce(
                [name.strip() for name in data.split(",")],
                folder,
                models=[name.strip() for name in models.split(",")] if models else study.MODELS,
                arms=[parse_arm(key.strip()) for key in arms.split(",")] if arms else study.ARMS,
                seeds=positive(seeds),
                train=TrainConfig(epochs=epochs, directions=directions, batch_size=batch_size, patience=patience),
                split=SplitConfig(validation, test, largest_component, validation_edges_at_test),
                hidden=hidden,
                published=preset,
                root=root,
                device=device,
                workers=workers,
                on_progress=watch,
                command=command_line(),
            )
    text = to_markdown(results)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(text, encoding="utf-8")
    if as_json:
        print_json(finite(study.results_to_dict(results)))
        return
    out.print(text, markup=False, highlight=False, soft_wrap=True)
