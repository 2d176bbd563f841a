"""Common neighbours and sketches on a GPU: kernels against plain torch, equal in every number, and their bytes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from suffice.gpu import can_use_kernels, disable_kernels
from suffice.link.sparse.adjacency import Adjacency
from suffice.link.sparse.neighbors import common_neighbors
from suffice.link.sparse.sketches import sketch

if TYPE_CHECKING:
    from gpu import Run


def measure(run: Run, bandwidth: float) -> bool:
    """Fill `run.result["link"]`; whether kernels and torch agree."""
    nodes, edges, pairs = (60, 300, 30) if run.small else (500_000, 10_000_000, 1_000_000)
    generator = torch.Generator(run.device).manual_seed(0)
    # Degrees as uneven as those of real graphs: the ids are products of two uniform ones.
    ends = torch.rand(2, 2, edges, device=run.device, generator=generator).prod(0).mul(nodes).long()
    graph = Adjacency(ends.clamp_(max=nodes - 1), nodes)
    asked = torch.randint(nodes, (2, pairs), device=run.device, generator=generator)
    degree = graph.degree
    least = torch.minimum(degree[asked[0]], degree[asked[1]]).sum()
    bytes_needed = {
        "common neighbours": 40 * int(least),
        "sketches": 2 * (graph.csr.col.numel() + 2 * nodes) * (128 * 4 + 256 * 2),
    }
    work = {
        "common neighbours": partial(common_neighbors, graph, asked),
        "sketches": partial(sketch, graph, hops=2),
    }
    rows: dict[str, Any] = {}
    right = True
    for name, own in work.items():
        with disable_kernels():
            row: dict[str, Any] = {"torch": run.time(f"{name}, plain torch", own, 3), "ours": None}
        if can_use_kernels(graph.csr.col):
            row["ours"] = run.time(name, own, 3)
            if row["ours"]:
                row["of_copy"] = bytes_needed[name] / row["ours"] / bandwidth
            with disable_kernels():
                exact = own()
            right = right and _equal(own(), exact)
        else:
            run.skip(name, "no kernel here")
        rows[name] = row
        shown = {key: "skipped" if value is None else f"{1000 * value:.2f} ms" for key, value in row.items()}
        print(f"{name}: torch {shown['torch']}, kernel {shown['ours']}")
    run.result["link"] = rows
    return right


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.equal(other)
    parts = one if isinstance(one, tuple) else (one.minhash, one.registers)
    others = other if isinstance(other, tuple) else (other.minhash, other.registers)
    return all(_equal(a, b) for a, b in zip(parts, others, strict=True))
