"""A worker process: reads jobs as lines of JSON, does them, and writes what happens as lines of JSON.

It ends when the process that started it is gone, whatever way that went.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from typing import IO, Any

from suffice.study.jobs import Job, perform


def main() -> None:
    """Work until standard input ends."""
    # What a run prints must not get between our lines.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    jobs: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(jobs,), daemon=True).start()
    while True:
        _do(Job.from_json(jobs.get()), lines)


def _read(jobs: queue.Queue[str]) -> None:
    for line in sys.stdin:
        jobs.put(line)
    # Not sys.exit: the run at hand is of no use to anyone now.
    os._exit(0)


def _do(job: Job, lines: IO[str]) -> None:
    try:
        done = perform(job, lambda text: _tell(lines, {"said": text}))
    except BaseException:
        _tell(lines, {"failed": traceback.format_exc()})
    else:
        _tell(lines, {"done": done})


def _tell(lines: IO[str], what: dict[str, Any]) -> None:
    lines.write(json.dumps(what) + "\n")
    lines.flush()


if __name__ == "__main__":
    main()
