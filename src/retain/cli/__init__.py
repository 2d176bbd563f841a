"""The command line: each command is one call of a public function."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from typing import Annotated

import typer

import retain
from retain.cli.console import errors
from retain.cli.demo import demo

app = typer.Typer(
    name="retain",
    help="What information does a model keep?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(demo)

if importlib.util.find_spec("transformers"):
    from retain.cli.kv import app as kv_app

    app.add_typer(kv_app, name="kv")

if importlib.util.find_spec("torch_geometric"):
    from retain.cli.link import app as link_app

    app.add_typer(link_app, name="link")


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Say which version this is."""
    if version:
        typer.echo(f"retain {retain.__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; an error a user can mend is one line, exit status 2."""
    # The libraries below talk about themselves; a command's own lines say what matters.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers")
    with errors():
        app()
    sys.exit(0)
