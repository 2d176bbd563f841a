"""A worker process, which reads jobs from standard input and writes their events to standard output as lines of JSON.

The worker exits when the process that started it ends for any reason, because its standard input then ends.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from typing import IO, Any

from suffice.study.job import Job, run_job


def main() -> None:
    """Execute jobs until standard input ends."""
    # Events go to a copy of standard output. What a run prints goes to standard error, so that it cannot break a line.
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    jobs: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read_jobs, args=(jobs,), daemon=True).start()
    while True:
        _execute(Job.from_json(jobs.get()), output)


def _read_jobs(jobs: queue.Queue[str]) -> None:
    for line in sys.stdin:
        jobs.put(line)
    # Exit at once: nobody is left to receive the result of the current run.
    os._exit(0)


def _execute(job: Job, output: IO[str]) -> None:
    try:
        completed = run_job(job, lambda text: _write(output, {"message": text}))
    except BaseException:
        _write(output, {"error": traceback.format_exc()})
    else:
        _write(output, {"completed": completed})


def _write(output: IO[str], fields: dict[str, Any]) -> None:
    output.write(json.dumps(fields) + "\n")
    output.flush()


if __name__ == "__main__":
    main()
