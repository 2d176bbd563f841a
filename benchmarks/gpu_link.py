"""Measure common neighbors and sketches on a GPU: kernels and plain PyTorch, whose results must be equal."""

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
    """Fill `run.result["link"]`, and return whether kernels and plain PyTorch agree."""
    num_nodes, num_edges, num_pairs = (60, 300, 30) if run.small else (500_000, 10_000_000, 1_000_000)
    generator = torch.Generator(run.device).manual_seed(0)
    # Node ids are products of two uniform numbers, so that degrees are as uneven as in real graphs.
    edges = torch.rand(2, 2, num_edges, device=run.device, generator=generator).prod(0).mul(num_nodes).long()
    graph = Adjacency(edges.clamp_(max=num_nodes - 1), num_nodes)
    pairs = torch.randint(num_nodes, (2, num_pairs), device=run.device, generator=generator)
    degree = graph.degree
    num_lookups = torch.minimum(degree[pairs[0]], degree[pairs[1]]).sum()
    min_bytes = {
        "common neighbors": 40 * int(num_lookups),
        "sketches": 2 * (graph.csr.col.numel() + 2 * num_nodes) * (128 * 4 + 256 * 2),
    }
    functions = {
        "common neighbors": partial(common_neighbors, graph, pairs),
        "sketches": partial(sketch, graph, hops=2),
    }
    rows: dict[str, Any] = {}
    agree = True
    for name, function in functions.items():
        with disable_kernels():
            row: dict[str, Any] = {"torch": run.time(f"{name}, plain torch", function, 3), "ours": None}
        if can_use_kernels(graph.csr.col):
            row["ours"] = run.time(name, function, 3)
            if row["ours"]:
                row["of_copy"] = min_bytes[name] / row["ours"] / bandwidth
            with disable_kernels():
                expected = function()
            agree = agree and _equal(function(), expected)
        else:
            run.skip(name, "no kernel for this device")
        rows[name] = row
        shown = {key: "skipped" if value is None else f"{1000 * value:.2f} ms" for key, value in row.items()}
        print(f"{name}: torch {shown['torch']}, kernel {shown['ours']}")
    run.result["link"] = rows
    return agree


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.equal(right)
    left_parts, right_parts = (x if isinstance(x, tuple) else (x.minhash, x.registers) for x in (left, right))
    return all(_equal(a, b) for a, b in zip(left_parts, right_parts, strict=True))
