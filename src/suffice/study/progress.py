"""How far a study is: totals, who does what, and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from suffice.study.spec import Planned


@dataclass
class Working:
    """What a worker is at."""

    label: str
    since: float
    said: str = ""


@dataclass
class Progress:
    """The state of a study while it runs."""

    total: int
    done: int
    failed: int
    slots: int
    before: int = 0
    elsewhere: int = 0
    workers: dict[int, Working] = field(default_factory=dict[int, Working])
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float | None:
        """Estimated seconds left; None before a run has ended."""
        ended = self.done + self.failed - self.before
        if ended < 1:
            return None
        pace = (time.monotonic() - self.start) / ended
        return pace * (self.total - self.done - self.failed)

    def __str__(self) -> str:
        left = self.left
        parts = [f"{self.done} of {self.total} done"]
        parts += [f"{self.failed} failed"] if self.failed else []
        parts += [f"{self.elsewhere} in another process"] if self.elsewhere else []
        parts += [f"about {duration(left)} left"] if left else []
        return ", ".join(parts)


class Watcher(Protocol):
    """Shows progress. `line` says that a run ended, or is empty where a worker only said something."""

    def __call__(self, progress: Progress, line: str) -> None:
        """Show it."""
        ...


def plain(say: Callable[[str], None], *, every: float = 5.0) -> Watcher:
    """Return a watcher that says a line for each run that ended, and now and then what the workers are at."""
    last = time.monotonic()

    def show(progress: Progress, line: str) -> None:
        nonlocal last
        now = time.monotonic()
        if line:
            say(f"{line} ({progress})")
        elif now - last >= every:
            at = [f"{work.label}: {work.said}" for work in progress.workers.values() if work.said]
            say("; ".join(at) or str(progress))
        else:
            return
        last = now

    return show


def labels(plan: Sequence[Planned]) -> Callable[[Mapping[str, Any], int], str]:
    """Return a function that names a run of a plan in few words: what differs between runs, and the seed."""
    names = [name for name in (plan[0].settings if plan else ()) if len({repr(p.settings.get(name)) for p in plan}) > 1]

    def label(settings: Mapping[str, Any], seed: int) -> str:
        parts = [f"{name} {_short(settings.get(name))}" for name in names]
        return ", ".join([*parts, f"seed {seed}"])

    return label


def duration(seconds: float) -> str:
    """Return seconds as a person says them: `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _short(value: Any) -> str:
    # A setting of many parts goes by its name, if it has one.
    text = str(cast(Mapping[str, Any], value).get("name", value) if isinstance(value, Mapping) else value)
    return text if len(text) <= 40 else text[:37] + "…"
