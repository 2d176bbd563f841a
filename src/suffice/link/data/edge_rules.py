"""What becomes of duplicate edges, self-loops and weights: one rule for files and for graphs in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.link.batches.negatives import INTEGERS, edge_keys

_CHOICES = {"duplicates": ("merge", "refuse"), "self_loops": ("drop", "refuse"), "weights": ("drop", "refuse")}


@dataclass(frozen=True)
class EdgeRules:
    """What becomes of edges that a `Graph` cannot hold, because it is undirected, unweighted and simple.

    Edges (u, v) and (v, u) are the same edge, so that a directed graph becomes undirected.

    Args:
        duplicates: `merge` edges that are listed several times, or `refuse` them. A list with both directions of all
            edges holds no duplicates.
        self_loops: `drop` edges from a node to itself, or `refuse` them.
        weights: `drop` weights and all other values of edges, or `refuse` them.

    Raises:
        ValueError: an argument is unknown.

    """

    duplicates: str = "merge"
    self_loops: str = "drop"
    weights: str = "drop"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(choices)}, got {getattr(self, name)!r}")

    def check_weights(self, found: str | None) -> None:
        """Raise if edges have values and the rules refuse them.

        Args:
            found: description of the values; None if there are none.

        Raises:
            ValueError: they are refused.

        """
        if self.weights == "refuse" and found is not None:
            raise ValueError(
                f"edges must have no weights or other values, got {found}. Use weights='drop' to drop them"
            )

    def apply(self, edges: Tensor, num_nodes: int) -> Tensor:
        """Return each undirected edge once, the smaller node id first, in the order of the list, long [2, edges].

        Args:
            edges: edges with node ids in range, long [2, edges].
            num_nodes: number of nodes.

        Raises:
            ValueError: duplicates or self-loops are refused, or no edges are left.

        """
        is_loop = edges[0] == edges[1]
        if self.self_loops == "refuse":
            refuse_edges(edges, is_loop, "join two different nodes", "self-loops", "Use self_loops='drop' to drop them")
        edges = edges[:, ~is_loop]
        if edges.size(1) == 0:
            raise ValueError("edges must hold at least one edge between two different nodes, got none")
        is_copy = find_copies(edges, num_nodes)
        if self.duplicates == "refuse" and not _has_both_directions(edges, num_nodes):
            refuse_edges(edges, is_copy, "be listed once each", "duplicates", "Use duplicates='merge' to merge them")
        kept = edges[:, ~is_copy]
        return torch.stack([kept.min(dim=0).values, kept.max(dim=0).values])


def check_range(edges: Tensor, num_nodes: int) -> None:
    """Raise unless edges [2, edges] have integer node ids in range, and there is at least one.

    Raises:
        TypeError: node ids are not integers.
        ValueError: they are not accepted.

    """
    if edges.ndim != 2 or edges.size(0) != 2 or edges.size(1) == 0:
        raise ValueError(f"edges must have shape [2, edges] with at least one edge, got {tuple(edges.shape)}")
    if edges.dtype not in INTEGERS:
        raise TypeError(f"edges must hold integer node ids, got {edges.dtype}")
    out_of_range = ((edges < 0) | (edges >= num_nodes)).any(dim=0)
    refuse_edges(edges, out_of_range, f"have node ids from 0 to {num_nodes - 1}", "out of range")


def find_copies(edges: Tensor, num_nodes: int) -> Tensor:
    """Return a mask of all copies of an undirected edge but one, bool [edges].

    The first copy with the smaller node id first is not marked, or the first one if there is none.
    """
    keys, is_backward = edge_keys(edges, num_nodes), (edges[0] > edges[1]).long()
    by_direction = is_backward.argsort(stable=True)
    order = by_direction[keys[by_direction].argsort(stable=True)]
    is_copy = torch.zeros_like(keys, dtype=torch.bool)
    is_copy[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    return is_copy


def refuse_edges(edges: Tensor, is_wrong: Tensor, accepted: str, found: str, remedy: str = "") -> None:
    """Raise if edges are wrong; the message gives their number and the first one.

    Args:
        edges: long [2, edges].
        is_wrong: mask of the wrong edges, bool [edges].
        accepted: what edges must do.
        found: what the wrong edges are.
        remedy: what to do.

    Raises:
        ValueError: an edge is wrong.

    """
    if bool(is_wrong.any()):
        first = tuple(edges[:, int(is_wrong.nonzero()[0])].tolist())
        text = f"edges must {accepted}, got {int(is_wrong.sum())} {found}, the first is {first}"
        raise ValueError(f"{text}. {remedy}" if remedy else text)


def _has_both_directions(edges: Tensor, num_nodes: int) -> bool:
    """Return whether the list holds every edge once in each direction."""
    keys, is_backward = edge_keys(edges, num_nodes), edges[0] > edges[1]
    forward, backward = keys[~is_backward].sort().values, keys[is_backward].sort().values
    return torch.equal(forward, backward) and bool((forward[1:] != forward[:-1]).all())
