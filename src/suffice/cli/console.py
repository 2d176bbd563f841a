"""What all commands share: where they print, how they show progress and errors."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape

from suffice import SufficeError

out = Console()
err = Console(stderr=True)


@contextmanager
def errors() -> Generator[None]:
    """Print an error that a user can mend as one line and exit with status 2."""
    try:
        yield
    except (ValueError, TypeError, OSError, SufficeError) as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        err.print("stopped")
        sys.exit(130)


@contextmanager
def progress() -> Generator[Callable[[str], None]]:
    """Give a function that shows what is being done: a spinner on a terminal, plain lines elsewhere."""
    start = time.monotonic()
    if not err.is_terminal:
        yield lambda line: err.print(
            f"{time.monotonic() - start:6.1f} s  {line}", highlight=False, markup=False, soft_wrap=True
        )
        return
    with err.status("") as status:
        yield lambda line: status.update(escape(line))


def print_json(value: Any) -> None:
    """Print one JSON object on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON doesn't know, by null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, float) and not float("-inf") < value < float("inf"):
        return None
    return value
