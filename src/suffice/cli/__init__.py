"""The command line: every command parses its options and calls a public function of the package."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import warnings
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

import suffice
from suffice.cli.console import report_errors, report_interrupt, suggest_option


class _Command(NamedTuple):
    """Where a command is defined, and the library that it needs."""

    module: str
    name: str
    library: str = ""


_COMMANDS = {
    "demo": _Command("suffice.cli.demo", "demo"),
    "kv": _Command("suffice.cli.kv", "app", "transformers"),
    "link": _Command("suffice.cli.link", "app", "torch_geometric"),
    "study": _Command("suffice.cli.study", "app"),
    "report": _Command("suffice.cli.report", "report"),
}


class _LazyCommands(TyperGroup):
    """Commands that are imported when they are called, because some of them import torch, which takes seconds."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands whose libraries are installed."""
        return [
            name
            for name, command in _COMMANDS.items()
            if not command.library or importlib.util.find_spec(command.library)
        ]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import and return a command; None if there is no such command."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command = _COMMANDS[cmd_name]
        found: Any = getattr(importlib.import_module(command.module), command.name)
        if isinstance(found, typer.Typer):
            group = found
        else:
            group = typer.Typer(add_completion=False)
            group.command(cmd_name)(found)
        imported = typer.main.get_command(group)
        imported.name = cmd_name
        return imported

    def invoke(self, ctx: Any) -> Any:
        """Run a command, and print a message on Ctrl-C, which Typer would not do."""
        with report_interrupt(), suggest_option():
            return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options before the command."""
        with suggest_option():
            return super().parse_args(ctx, args)


app = typer.Typer(
    name="suffice",
    help="What information does a model keep?",
    cls=_LazyCommands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback(invoke_without_command=True)
def print_version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Print the version if `--version` is given."""
    if version:
        typer.echo(f"suffice {suffice.__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line. Errors that the user can correct are printed on one line; the exit status is then 2."""
    # Hide the messages of transformers, so that those of the commands are easy to see.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait give up their core, before torch is imported. Otherwise they keep it busy, which is ten times
    # slower on two cores that other processes use, too.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers")
    with report_errors(), report_interrupt():
        app()
    sys.exit(0)
