"""The progress of a study: a line for each worker on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from suffice.cli.console import err
from suffice.study.progress import Progress, ProgressCallback, format_duration, log_progress


@contextmanager
def watching(quiet: bool = False) -> Generator[ProgressCallback]:
    """Give a watcher for `run_study`: totals, the time left, and what each worker is at."""
    if quiet:
        yield lambda progress, line: None
        return
    start = time.monotonic()
    if not err.is_terminal:
        yield log_progress(
            lambda line: err.print(
                f"{time.monotonic() - start:6.1f} s  {line}", highlight=False, markup=False, soft_wrap=True
            )
        )
        return
    with Live(console=err, refresh_per_second=4, transient=True) as live:

        def show(progress: Progress, line: str) -> None:
            if ": failed: " in line:
                live.console.print(line, markup=False, highlight=False)
            live.update(_lines(progress))

        yield show


def _lines(progress: Progress) -> Group:
    workers = Table.grid(padding=(0, 1))
    for column in ("worker", "seconds", "label", "said"):
        workers.add_column(
            column, overflow="ellipsis", no_wrap=True, justify="right" if column == "seconds" else "left"
        )
    for slot in range(progress.slots):
        work = progress.workers.get(slot)
        cells = (
            (format_duration(time.monotonic() - work.start), work.label, work.message) if work else ("", "waiting", "")
        )
        workers.add_row(Text(f"worker {slot + 1}", style="dim"), *(Text(cell) for cell in cells))
    bar = ProgressBar(total=max(progress.total, 1), completed=progress.done + progress.failed, width=40)
    total = Table.grid(padding=(0, 1))
    total.add_row(bar, Text(str(progress)))
    return Group(workers, total)
