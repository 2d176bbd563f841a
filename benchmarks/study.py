"""Duration of the commands that show 10,000 stored runs, with the start of Python; the last line is one JSON object.

make bench-study
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from suffice.study import RunKind, Spec, Store
from suffice.study.owner import Owner

POLICIES = [f"policy-{number}" for number in range(20)]
METRICS = [f"metric-{number}" for number in range(10)]
KIND = RunKind("bench", "benchmarks.study:no_function", {"policy": "", "budget": 0.5, "task": "", "note": "x" * 100})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = fill(Path(folder), arguments.seeds)
        print(f"{runs} runs, store of {(Path(folder) / 'study.db').stat().st_size / 1e6:.0f} MB")
        page = str(Path(folder) / "page.html")
        measured: dict[str, list[tuple[float, float]]] = {
            "status_seconds": timed(["study", "status", folder], arguments.repeats),
            "show_seconds": timed(["study", "show", folder], arguments.repeats),
            "report_seconds": timed(["report", folder, "--to", page], min(arguments.repeats, 3)),
        }
        print(f"page of {Path(page).stat().st_size / 1e6:.1f} MB")
    wall = {name: [seconds for seconds, _ in values] for name, values in measured.items()}
    # CPU time depends less than wall time on what else runs on a shared machine.
    cpu = {name: [seconds for _, seconds in values] for name, values in measured.items()}
    result: dict[str, Any] = {"runs": runs, **medians(wall)}
    result["ranges"] = {name: [round(min(values), 3), round(max(values), 3)] for name, values in wall.items()}
    result["cpu_seconds"] = medians(cpu)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def fill(folder: Path, seeds: int) -> int:
    """Store finished runs of 20 policies, 10 budgets and 5 tasks with every seed, and return their number."""
    generator = random.Random(0)
    grid = {"policy": POLICIES, "budget": [n / 10 for n in range(1, 11)], "task": [f"task-{n}" for n in range(5)]}
    plan = Spec("bench", "bench", grid=grid, seeds=seeds).plan(KIND)
    with Store(folder) as store, Owner(folder) as owner:
        store.plan("bench", KIND, plan)
        # Only reading is timed, so that the runs need not survive a power failure.
        store._database.execute("PRAGMA synchronous = OFF")
        while (claim := store.claim("bench", owner)) is not None:
            values = {metric: generator.gauss(claim.settings["budget"], 0.1) for metric in METRICS}
            curve = [[step / 20, generator.random(), generator.random()] for step in range(21)]
            store.finish(claim.key, owner, {"values": values, "curve": curve}, {"source": "bench", "suffice": "x"}, 1.0)
    return len(plan)


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(values), 3) for name, values in seconds.items()}


def timed(arguments: list[str], repeats: int) -> list[tuple[float, float]]:
    """Run a command several times, and return the wall time and the CPU time of each in seconds."""
    seconds: list[tuple[float, float]] = []
    for _ in range(repeats):
        start, before = time.perf_counter(), os.times()
        command = [sys.executable, "-c", "from suffice.cli import main; main()", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        seconds.append((time.perf_counter() - start, cpu))
        print(f"{' '.join(arguments[:2])}: {seconds[-1][0]:.2f} s, {cpu:.2f} s of CPU")
    return seconds


if __name__ == "__main__":
    main()
