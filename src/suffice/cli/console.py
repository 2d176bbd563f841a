"""Output of all commands: results, progress and errors."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from suffice import SufficeError

out = Console()
err = Console(stderr=True)


def command_line() -> str:
    """Return the running command as the user would type it."""
    return shlex.join(["suffice", *sys.argv[1:]])


def print_text(text: str) -> None:
    """Print text on standard output as it is, without markup."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def print_table(table: Table) -> None:
    """Print a table on standard output; in a file or a pipe, which have no width, without cutting off cells."""
    if out.is_terminal:
        out.print(table)
        return
    unlimited = out.options.update(max_width=sys.maxsize)
    width = max(out.width, Measurement.get(out, unlimited, table).maximum)
    Console(file=out.file, width=width).print(table)


def print_json(value: Any) -> None:
    """Print one JSON object on standard output. NaN and infinity, which JSON cannot represent, become null."""
    sys.stdout.write(json.dumps(_without_non_finite(value), ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def report_errors() -> Generator[None]:
    """If the user can correct an error, print its message on one line and exit with status 2."""
    try:
        yield
    except (ValueError, TypeError, OSError, SufficeError) as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


@contextmanager
def report_interrupt() -> Generator[None]:
    """Print that the command was interrupted by Ctrl-C, and exit with status 130."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)


@contextmanager
def suggest_option() -> Generator[None]:
    """If an option is unknown, suggest the most similar one in the same words as for all other names."""
    try:
        yield
    except Exception as error:
        similar = getattr(error, "possibilities", None)
        if getattr(error, "option_name", None) and similar:
            error.message = f"{error.message}. Did you mean {similar[0]!r}?"  # pyright: ignore[reportAttributeAccessIssue]
            error.possibilities = []  # pyright: ignore[reportAttributeAccessIssue]
        raise


@contextmanager
def step_progress() -> Generator[Callable[[str], None]]:
    """Yield a function that shows the current step: beside a spinner on a terminal, otherwise as a line."""
    if not err.is_terminal:
        yield timed_lines()
        return
    with err.status("") as status:
        yield lambda step: status.update(escape(step))


def timed_lines() -> Callable[[str], None]:
    """Return a function that prints lines on standard error, each preceded by the seconds since this call."""
    start = time.monotonic()

    def show(line: str) -> None:
        seconds = time.monotonic() - start
        err.print(f"{seconds:6.1f} s  {line}", highlight=False, markup=False, soft_wrap=True)

    return show


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
