"""One run: what a worker is given and what it gives back, the same in a process, on a worker and on Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from suffice.study.keys import made_with
from suffice.study.kinds import resolve

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A run to do."""

    key: str
    entry: str
    settings: dict[str, Any]
    seed: int
    folder: str
    inputs: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the job as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Read what `to_json` wrote."""
        found = cls(**json.loads(text))
        return replace(found, inputs=tuple(found.inputs))


@dataclass(frozen=True)
class Context:
    """What a run may use beside its settings.

    Args:
        key: the run's name.
        folder: the study's; a run may leave a checkpoint there to go on from.
        say: tells the person who waits what the run is doing.

    """

    key: str
    folder: Path
    say: Say = field(default=lambda _: None)

    def file(self, ending: str) -> Path:
        """Return the path of a file of this run alone, by its ending."""
        return self.folder / "runs" / f"{self.key}{ending}"


def perform(job: Job, say: Say) -> dict[str, Any]:
    """Do a run and return its result, what made it, and its seconds.

    Raises:
        TypeError: the result is no JSON object.

    """
    start = time.monotonic()
    result = resolve(job.entry)(dict(job.settings), job.seed, Context(job.key, Path(job.folder), say))
    if not isinstance(result, dict):
        raise TypeError(f"{job.entry} returned {type(result).__name__}; accepted: a dict that JSON holds")
    json.dumps(result)
    return {"result": result, "made": made_with(), "seconds": time.monotonic() - start}
