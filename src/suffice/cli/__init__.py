"""The command line: each command is one call of a public function."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import suffice
from suffice.cli.console import errors

# Where a command is, and the library without which it is not there.
_COMMANDS = {
    "demo": ("suffice.cli.demo:demo", ""),
    "kv": ("suffice.cli.kv:app", "transformers"),
    "link": ("suffice.cli.link:app", "torch_geometric"),
    "study": ("suffice.cli.study:app", ""),
    "report": ("suffice.cli.report:report", ""),
}


class _Commands(TyperGroup):
    """Commands that are imported when they are called: a look at a study needs no torch, which takes seconds."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands whose libraries are installed."""
        return [name for name, (_, needs) in _COMMANDS.items() if not needs or importlib.util.find_spec(needs)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import a command."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module, _, name = _COMMANDS[cmd_name][0].partition(":")
        found: Any = getattr(importlib.import_module(module), name)
        if not isinstance(found, typer.Typer):
            alone = typer.Typer(add_completion=False)
            alone.command(cmd_name)(found)
            found = alone
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command


app = typer.Typer(
    name="suffice",
    help="What information does a model keep?",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Say which version this is."""
    if version:
        typer.echo(f"suffice {suffice.__version__}")
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
