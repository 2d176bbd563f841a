"""Time and memory of training and audit on block models of 1 to 30 million edges.

    python benchmarks/link_scale.py [--folder FOLDER] [--sizes 1 3 10 30] [--models gcn buddy ncn] [--json FILE]

The largest graph has the size of ogbl-ppa: 30 million edges, 576 thousand nodes and 58 features. Smaller graphs have
the same degree. A graph is made once and kept in the folder; its features are read through a memory map. Every size and
model is measured in a process of its own, one after another, and each result is written when it is there: the same
command continues after an interruption. A process ends itself above `--limit` GiB.

A batch has a two hundredth of the training edges, which is that of ogbl-ppa's official example for the largest graph
(2 · 65,536 edges), so that an epoch has the same number of steps at every size. The first step fills the caches of a
graph, and a fixed number of further steps is measured. The time of an epoch is extrapolated: the steps of an epoch
times the median step, and the sampling of its negatives. The audit is that of `audit_trained` with its default
settings, 16 draws in batches of 512 edges. Times are seconds of processor time. The peak of each phase is the largest
resident memory, which includes the pages of the memory map that are held at that time. The last line of output is a
JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from link_models import Ours
from machine import forget_peak, machine, status
from suffice.link.auditing.trained import audit_trained
from suffice.link.batches.composition import Random
from suffice.link.batches.sampler import EdgeBatches
from suffice.link.data.graph import Graph, SplitConfig, split_edges
from suffice.link.data.synthetic import block_model
from suffice.link.models import ModelSettings
from suffice.link.train.memory import reuse_freed_memory

DEGREE, FEATURES, CLASSES = 104, 58, 5
HIDDEN = 64
STEPS_PER_PASS = 200  # over the training edges
SETTINGS: dict[str, dict[str, Any]] = {
    "gcn": {"name": "encoder-decoder", "encoder": "gcn"},
    "ncn": {"name": "ncn", "encoder": "pure"},
    "buddy": {"name": "buddy"},
}
TITLES = {"gcn": "GCN", "ncn": "NCN", "buddy": "BUDDY"}
OVER_LIMIT = 77  # exit status of a process that took too much memory


@dataclass
class Phases:
    """Processor time and peak memory of the phases of a process, written to a file after each."""

    path: Path
    found: dict[str, Any] = field(default_factory=dict[str, Any])

    @contextmanager
    def measure(self, name: str) -> Generator[None]:
        forget_peak()
        start, wall = time.process_time(), time.perf_counter()
        yield
        self.found[f"{name}_seconds"] = round(time.process_time() - start, 3)
        self.found[f"{name}_wall_seconds"] = round(time.perf_counter() - wall, 3)
        self.found[f"{name}_peak_gib"] = round(status("VmHWM") / 2**30, 3)
        self.write()
        print(name, self.found[f"{name}_seconds"], "s,", self.found[f"{name}_peak_gib"], "GiB", flush=True)

    def write(self) -> None:
        self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")


def end_above(limit_gib: float) -> None:
    """End this process as soon as it holds more memory than the limit."""

    def watch() -> None:
        while status("VmRSS") < limit_gib * 2**30:
            time.sleep(0.1)
        print(f"more than {limit_gib} GiB", flush=True)
        os._exit(OVER_LIMIT)

    threading.Thread(target=watch, daemon=True).start()


def num_nodes(million_edges: float) -> int:
    return round(million_edges * 2e6 / DEGREE)


def make_graph(million_edges: float, folder: Path) -> None:
    """Draw a block model and write its edges, features and classes."""
    graph = block_model(num_nodes(million_edges), CLASSES, DEGREE, features=FEATURES)
    assert graph.y is not None
    for name, value in (("edges", graph.edges), ("x", graph.x), ("y", graph.y)):
        np.save(folder / f"{name}.npy", value.numpy())


def read_graph(folder: Path) -> Graph:
    """Read a graph; its features stay in the file and are read through a memory map."""
    edges, y = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("edges", "y"))
    x = torch.from_numpy(np.load(folder / "x.npy", mmap_mode="c"))
    return Graph("block-model", x, edges, y)


def measure_one(name: str, folder: Path, path: Path, steps: int, audits: bool) -> None:
    """Measure one model on one graph."""
    phases = Phases(path)
    with phases.measure("graph"):
        graph = read_graph(folder)
    reuse_freed_memory(graph.num_nodes, HIDDEN)  # as `suffice link train` does
    with phases.measure("split"):
        parts = split_edges(graph, SplitConfig(), 0)
    size = parts.train.size(1) // STEPS_PER_PASS
    phases.found |= {"edges": graph.edges.size(1), "nodes": graph.num_nodes, "batch_size": size}
    settings = ModelSettings.from_dict({**SETTINGS[name], "hidden": HIDDEN}).with_norms("none", "batch")
    with phases.measure("preparation"):
        ours = Ours(settings, 1e-3, graph, parts)
        made = EdgeBatches(
            parts.train, graph.num_nodes, Random(), batch_size=size, known=parts.known, balanced=True, seed=0
        )
    batches = iter(made)
    with phases.measure("sampling"):  # the negatives of an epoch, the composition of all batches, the first batch
        first = next(batches)
    phases.found["steps_per_epoch"] = len(made)
    with phases.measure("first_step"):
        ours.step(first)
    taken: list[float] = []
    drawing: list[float] = []
    with phases.measure("steps"):
        for _ in range(steps):
            start = time.process_time()
            batch = next(batches)
            drawing.append(time.process_time() - start)
            start = time.process_time()
            ours.step(batch)
            taken.append(time.process_time() - start)
    per_step = phases.found["sampling_seconds"] / len(made) + statistics.median(drawing)
    each = statistics.median(taken)
    phases.found |= {
        "each_step_seconds": [round(value, 3) for value in taken],
        "step_seconds": round(each, 4),
        "sampling_seconds_per_step": round(per_step, 5),
        "sampling_percent_of_step": round(100 * per_step / (each + per_step), 2),
        "epoch_seconds": round(len(made) * (each + per_step), 1),
    }
    del batches, made, batch, first
    if audits:
        phases.write()
        with phases.measure("audit"):
            phases.found["verdict"] = audit_trained(ours.model, graph, parts).verdict.level
    phases.found |= {"machine": machine(), "done": True}
    phases.write()


def run_all(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure every model on every graph in a process of its own, and return all results by model and size."""
    found: dict[str, dict[str, Any]] = {}
    for million in options.sizes:
        folder = options.folder / f"{million:g}M"
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-W", "ignore", __file__, "--folder", str(options.folder), "--limit"]
        command += [str(options.limit), "--threads", str(options.threads), "--steps", str(options.steps)]
        command += ["--no-audit"] if options.no_audit else []
        if not (folder / "y.npy").exists() and not options.show:
            subprocess.run([*command, "--make", f"{million:g}"], check=True)
        for name in options.models:
            path = folder / f"{name}.json"
            known = json.loads(path.read_text()) if path.exists() else {}
            if not known.get("done") and not known.get("over_limit") and not options.show:
                print(f"{name}, {million:g} million edges", flush=True)
                code = subprocess.run([*command, "--one", name, f"{million:g}"], check=False).returncode
                known = json.loads(path.read_text()) if path.exists() else {}
                if code not in (0, OVER_LIMIT):
                    raise RuntimeError(f"{name} on {million:g} million edges ended with exit status {code}")
                if code == OVER_LIMIT:
                    known["over_limit"] = options.limit
                    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            if known.get("done") or known.get("over_limit"):
                found.setdefault(name, {})[f"{million:g}M"] = known
            if options.json:
                options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def million(result: dict[str, Any]) -> float:
    """Return the number of edges in millions."""
    return result["edges"] / 1e6


def peak(result: dict[str, Any]) -> float:
    """Return the largest resident memory of all phases, in GiB."""
    return max(value for key, value in result.items() if key.endswith("_peak_gib"))


def rows(found: dict[str, dict[str, dict[str, Any]]]) -> list[list[str]]:
    """Return a table of seconds and GiB, in total and by million edges."""
    table = [["model", "edges", "first step, s", "one step, s", "sampling, % of a step", "one epoch, s", "audit, s"]]
    table[0] += ["peak, GiB", "epoch, s per million edges", "audit, s per million", "peak, GiB per million"]
    for name, by_size in found.items():
        for result in by_size.values():
            if not result.get("done"):
                continue
            size = million(result)
            values = [f"{result['edges']:,}", f"{result['first_step_seconds']:.1f}", f"{result['step_seconds']:.2f}"]
            values += [f"{result['sampling_percent_of_step']:.1f}", f"{result['epoch_seconds']:,.0f}"]
            audit = result.get("audit_seconds")
            values += ["–" if audit is None else f"{audit:.1f}", f"{peak(result):.2f}"]
            values += [f"{result['epoch_seconds'] / size:.0f}", "–" if audit is None else f"{audit / size:.1f}"]
            table.append([TITLES[name], *values, f"{peak(result) / size:.2f}"])
    return table


def markdown(table: list[list[str]]) -> str:
    head, *body = table
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def draw(found: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Draw the time of an epoch and of an audit, and the peak memory, against the number of edges."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3), layout="constrained")
    titles = ("one epoch, s", "audit, s", "peak memory of the process, GiB")
    for name, by_size in found.items():
        done = [result for result in by_size.values() if result.get("done")]
        values = (
            [result["epoch_seconds"] for result in done],
            [result.get("audit_seconds", math.nan) for result in done],
            [peak(result) for result in done],
        )
        for axis, title, of_phase in zip(axes, titles, values, strict=True):
            axis.loglog([million(result) for result in done], of_phase, marker="o", label=TITLES[name])
            axis.set(xlabel="million edges", title=title)
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out/link-scale"))
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 3, 10, 30], help="millions of edges")
    parser.add_argument("--models", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--limit", type=float, default=14.0, help="GiB at which a process ends itself")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="show the results in the folder, without measuring")
    parser.add_argument("--no-audit", action="store_true", help="measure only training")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--one", nargs=2, help="measure only one model on the graph of a size, in this process")
    parser.add_argument("--make", type=float, help="make only the graph of a size")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    end_above(options.limit)
    if options.make:
        make_graph(options.make, options.folder / f"{options.make:g}M")
    elif options.one:
        name, folder = options.one[0], options.folder / f"{float(options.one[1]):g}M"
        measure_one(name, folder, folder / f"{name}.json", options.steps, not options.no_audit)
    else:
        found = run_all(options)
        if options.figure:
            draw(found, options.figure)
        print(markdown(rows(found)))
        print(json.dumps(found))


if __name__ == "__main__":
    main()
