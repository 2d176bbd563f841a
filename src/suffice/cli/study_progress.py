"""Progress of a study: a line for each worker on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from suffice.cli.console import err, timed_lines
from suffice.study.progress import Progress, ProgressCallback, format_duration, log_progress


@contextmanager
def study_progress(quiet: bool = False) -> Generator[ProgressCallback]:
    """Yield a callback for `run_study` that shows its progress.

    Args:
        quiet: show nothing.

    """
    if quiet:
        yield lambda progress, line: None
        return
    if not err.is_terminal:
        yield log_progress(timed_lines())
        return
    with Live(console=err, refresh_per_second=4, transient=True) as live:

        def show(progress: Progress, line: str) -> None:
            if ": failed: " in line:
                live.console.print(line, markup=False, highlight=False)
            live.update(_worker_lines(progress))

        yield show


def _worker_lines(progress: Progress) -> Group:
    workers = Table.grid(padding=(0, 1))
    for column in ("worker", "seconds", "run", "message"):
        workers.add_column(
            column, overflow="ellipsis", no_wrap=True, justify="right" if column == "seconds" else "left"
        )
    for slot in range(progress.slots):
        worker = progress.workers.get(slot)
        cells = ("", "waiting", "")
        if worker is not None:
            cells = (format_duration(time.monotonic() - worker.start), worker.label, worker.message)
        workers.add_row(Text(f"worker {slot + 1}", style="dim"), *(Text(cell) for cell in cells))
    bar = ProgressBar(total=max(progress.total, 1), completed=progress.done + progress.failed, width=40)
    total = Table.grid(padding=(0, 1))
    total.add_row(bar, Text(str(progress)))
    return Group(workers, total)
