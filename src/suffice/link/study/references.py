"""The raw features of a study: how well they align with the classes, stored measure by measure."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from suffice.link.data.graph import Graph
from suffice.link.study.run_kinds import CORRECT
from suffice.link.train.alignment import MEASURES, measure_alignment


def measure_raw_features(graph: Graph, folder: Path, log: Callable[[str], None]) -> dict[str, float]:
    """Measure how well the raw features align with the classes.

    Each measure is stored in the folder when it is computed. An interrupted call continues behind the last one, and
    other studies of the graph in the same folder find all of them, whatever they train.

    Args:
        graph: graph with a class for each node.
        folder: folder of the study.
        log: called before each measure is computed.

    Returns:
        `node_nmi`, `node_trace_ratio`, …

    Raises:
        ValueError: the graph has no classes, or only one.

    """
    classes = graph.classes
    digest = hashlib.sha256(f"{CORRECT.code_version} {graph.x.dtype} {tuple(graph.x.shape)}".encode())
    for tensor in (graph.x, classes):
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    path = folder / "references" / f"{digest.hexdigest()[:16]}.json"
    values: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for number, name in enumerate(MEASURES):
        if name not in values:
            log(f"measure {number + 1} of {len(MEASURES)}, {name}")
            values |= measure_alignment(graph.x, classes, measures=(name,))
            _write(path, values)
    return {f"node_{name}": values[name] for name in MEASURES}


def _write(path: Path, values: dict[str, float]) -> None:
    """Write the values at once: a process that is killed leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(values), encoding="utf-8")
    os.replace(temporary, path)
