"""Jobs: one run each, executed by the same function in this process, in a worker process and on Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from suffice.environment import describe_environment
from suffice.study.run_kind import import_object


@dataclass(frozen=True)
class Job:
    """A run to execute.

    Args:
        key: key of the run.
        function: function that executes it, as `module:function`.
        settings: complete nested settings.
        seed: seed of the run.
        folder: the study's folder.
        inputs: files that the run reads, relative to the folder.

    """

    key: str
    function: str
    settings: dict[str, Any]
    seed: int
    folder: str
    inputs: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the job as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Return the job that `to_json` described."""
        job = cls(**json.loads(text))
        return replace(job, inputs=tuple(job.inputs))


@dataclass(frozen=True)
class RunContext:
    """What a run may use in addition to its settings and seed.

    Args:
        key: key of the run.
        folder: the study's folder; a run may keep a checkpoint there, from which it resumes.
        log: called with a short message on what the run is doing, which the progress of the study shows.

    """

    key: str
    folder: Path
    log: Callable[[str], None] = field(default=lambda _: None)

    def file(self, suffix: str) -> Path:
        """Return the path of a file that belongs to this run alone, such as its checkpoint."""
        return self.folder / "runs" / f"{self.key}{suffix}"


def run_job(job: Job, log: Callable[[str], None]) -> dict[str, Any]:
    """Execute a run and return its `result`, the `environment` it was executed in, and its `seconds`.

    Args:
        job: the run.
        log: receives the messages of the run.

    Raises:
        TypeError: the result is not a dict that JSON can represent.

    """
    start = time.monotonic()
    context = RunContext(job.key, Path(job.folder), log)
    result = import_object(job.function)(dict(job.settings), job.seed, context)
    if not isinstance(result, dict):
        raise TypeError(f"result of {job.function} must be a dict, got {type(result).__name__}")
    json.dumps(result)
    return {"result": result, "environment": describe_environment(), "seconds": time.monotonic() - start}
