"""A graph as one file in a study's folder, named by what it holds, so that every worker can read it."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from suffice.link.data.checkpoint import load, part, save
from suffice.link.data.graph import Graph, Split


def save_graph(graph: Graph, folder: str | Path) -> str:
    """Write a graph unless it is there, and return its path within the folder."""
    tensors: dict[str, Tensor] = {"x": graph.x, "edges": graph.edges}
    if graph.y is not None:
        tensors["y"] = graph.y
    if graph.official is not None:
        tensors |= {f"official/{name}": getattr(graph.official, name) for name in Split.__dataclass_fields__}
    digest = hashlib.sha256(graph.name.encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    place = f"inputs/{''.join(c if c.isalnum() else '-' for c in graph.name)}-{digest.hexdigest()[:12]}.safetensors"
    if not (Path(folder) / place).exists():
        save(Path(folder) / place, tensors, {"name": graph.name})
    return place


@lru_cache(maxsize=2)
def read_saved_graph(path: Path) -> Graph:
    """Read what `save_graph` wrote; the last ones are kept, since the runs of a study share them.

    Raises:
        CheckpointError: the file is missing or no graph of ours.

    """
    tensors, facts = load(path)
    official = part(tensors, "official")
    return Graph(
        str(facts["name"]), tensors["x"], tensors["edges"], tensors.get("y"), Split(**official) if official else None
    )
