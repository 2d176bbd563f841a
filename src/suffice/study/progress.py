"""Progress of a study: number of finished runs, what each worker is doing, and the estimated time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast


@dataclass
class WorkerStatus:
    """What a worker is doing.

    Args:
        label: name of the run.
        start: `time.monotonic()` at the start of the run.
        message: latest message of the run.

    """

    label: str
    start: float
    message: str = ""


@dataclass
class Progress:
    """The state of a study while it runs.

    Args:
        total: number of runs of the study.
        done: number of done runs.
        failed: number of failed runs.
        slots: number of workers.
        ended_before: number of done and failed runs when this process started.
        elsewhere: number of runs that other processes are executing.
        workers: status of each busy worker, by slot.
        start: `time.monotonic()` at the start.

    """

    total: int
    done: int
    failed: int
    slots: int
    ended_before: int = 0
    elsewhere: int = 0
    workers: dict[int, WorkerStatus] = field(default_factory=dict[int, WorkerStatus])
    start: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds left; None before the first run has ended."""
        ended = self.done + self.failed - self.ended_before
        if ended < 1:
            return None
        seconds_per_run = (time.monotonic() - self.start) / ended
        return seconds_per_run * (self.total - self.done - self.failed)

    def __str__(self) -> str:
        parts = [f"{self.done} of {self.total} done"]
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{self.elsewhere} in another process"] if self.elsewhere else []
        parts += [f"about {format_duration(self.seconds_left)} left"] if self.seconds_left else []
        return ", ".join(parts)


class ProgressCallback(Protocol):
    """A function that shows progress, called whenever something changes."""

    def __call__(self, progress: Progress, line: str) -> None:
        """Show the progress.

        Args:
            progress: the state of the study.
            line: description of the run that ended; empty if none did.

        """
        ...


def log_progress(log: Callable[[str], None], *, every: float = 5.0) -> ProgressCallback:
    """Return a callback that logs a line for each ended run, and otherwise the workers' messages.

    Args:
        log: called with each line.
        every: minimum time between lines while no run ends, in seconds.

    """
    last = time.monotonic()

    def show(progress: Progress, line: str) -> None:
        nonlocal last
        now = time.monotonic()
        if line:
            log(f"{line} ({progress})")
        elif now - last >= every:
            messages = [f"{worker.label}: {worker.message}" for worker in progress.workers.values() if worker.message]
            log("; ".join(messages) or str(progress))
        else:
            return
        last = now

    return show


def make_run_labeler(settings: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any], int], str]:
    """Return a function that names a run by its seed and the settings that vary between runs.

    Args:
        settings: settings of all runs, by dotted name.

    Returns:
        a function of the settings of a run, by dotted name, and its seed, that returns the name.

    """
    first = settings[0] if settings else {}
    names = [name for name in first if len({repr(values.get(name)) for values in settings}) > 1]

    def label(run_settings: Mapping[str, Any], seed: int) -> str:
        parts = [f"{name} {_shorten(run_settings.get(name))}" for name in names]
        return ", ".join([*parts, f"seed {seed}"])

    return label


def format_duration(seconds: float) -> str:
    """Return a duration as text, such as `45 s`, `12 min` or `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _shorten(value: Any) -> str:
    # A mapping is shown by its name, if it has one.
    text = str(cast(Mapping[str, Any], value).get("name", value) if isinstance(value, Mapping) else value)
    return text if len(text) <= 40 else text[:37] + "…"
