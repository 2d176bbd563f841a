"""The edges that messages pass over, in compressed rows, and views of it that lack some edges."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")
# A byte for each pair of nodes pays up to this many: 64 MiB, graphs of 8,192 nodes.
SMALL = 2**26


class CompressedRows:
    """Directed edges in compressed sparse rows.

    Args:
        codes: row · num_nodes + column of each edge, ascending, none twice, long [edges].
        num_nodes: nodes of the graph.

    """

    def __init__(self, codes: Tensor, num_nodes: int) -> None:
        self.codes = codes
        self.num_nodes = num_nodes
        self.row = torch.div(codes, max(num_nodes, 1), rounding_mode="floor")
        self.col = codes - self.row * num_nodes
        self.degree = torch.bincount(self.row, minlength=num_nodes)
        self.rowptr = offsets_from_counts(self.degree)

    def without(self, places: Tensor) -> CompressedRows:
        """Return the rows without the edges at some places, long, ascending, none twice."""
        keep = torch.ones_like(self.codes, dtype=torch.bool)
        keep[places] = False
        kept = keep.nonzero().flatten()
        chosen = CompressedRows.__new__(CompressedRows)
        chosen.num_nodes = self.num_nodes
        chosen.codes, chosen.row, chosen.col = (part.index_select(0, kept) for part in (self.codes, self.row, self.col))
        chosen.degree = self.degree - torch.bincount(self.row[places], minlength=self.num_nodes)
        chosen.rowptr = offsets_from_counts(chosen.degree)
        return chosen

    def expand(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the neighbours of nodes, node after node, and the position in `nodes` that each belongs to.

        Args:
            nodes: long [n], repeats allowed.

        """
        start, count = self.rowptr.index_select(0, nodes), self.degree.index_select(0, nodes)
        owner = torch.repeat_interleave(count)
        place = (start - offsets_from_counts(count)[:-1]).index_select(0, owner)
        place += torch.arange(owner.numel(), device=owner.device)
        return self.col.index_select(0, place), owner

    def find(self, codes: Tensor) -> Tensor:
        """Return where each code stands, -1 if it is no edge, long [codes]."""
        if self.codes.numel() == 0:
            return torch.full_like(codes, -1)
        places = torch.searchsorted(self.codes, codes).clamp_(max=self.codes.numel() - 1)
        return torch.where(self.codes.index_select(0, places) == codes, places, -1)


class Adjacency:
    """An undirected graph: both directions of every edge, no self-loop, none twice.

    Args:
        edge_index: edges in one direction or both, in any order, long [2, edges].
        num_nodes: nodes of the graph.
        keys: a number for each node that sketches hash in place of its id, long [nodes]; under a relabelling that
            takes it along, sketches stay the same.

    Raises:
        ValueError: the shape is wrong or an id is out of range.

    """

    _view: tuple[Adjacency, Tensor]

    def __init__(self, edge_index: Tensor, num_nodes: int, *, keys: Tensor | None = None) -> None:
        if edge_index.ndim != 2 or edge_index.size(0) != 2:
            raise ValueError(f"edge_index has shape {tuple(edge_index.shape)}; accepted: [2, edges]")
        if edge_index.numel() and not (int(edge_index.min()) >= 0 and int(edge_index.max()) < num_nodes):
            raise ValueError(
                f"edge_index holds ids {int(edge_index.min())} to {int(edge_index.max())}; "
                f"accepted: 0 to {num_nodes - 1}"
            )
        if keys is not None and keys.shape != (num_nodes,):
            raise ValueError(f"keys has shape {tuple(keys.shape)}; accepted: ({num_nodes},), one a node")
        self.num_nodes = num_nodes
        without_loops = edge_index[:, edge_index[0] != edge_index[1]]
        self._csr = CompressedRows(_codes(without_loops, num_nodes).unique(), num_nodes), None
        self.keys = torch.arange(num_nodes, device=edge_index.device) if keys is None else keys
        self.base = self
        self._made: dict[str, tuple[tuple[object, ...], Any]] = {}

    @cached_property
    def _csr(self) -> tuple[CompressedRows, CompressedRows | None]:
        # Of a view, when they are asked for: sketches, for one, are of the base.
        graph, pairs = self._view
        places = graph._edges(pairs).unique()
        gone = graph.csr.codes[places]
        if graph.removed is not None:
            gone = torch.cat([graph.removed.codes, gone]).sort().values
        return graph.csr.without(places), CompressedRows(gone, self.num_nodes)

    @property
    def csr(self) -> CompressedRows:
        """The edges."""
        return self._csr[0]

    @property
    def removed(self) -> CompressedRows | None:
        """The edges of the base that a view lacks."""
        return self._csr[1]

    @property
    def edge_index(self) -> Tensor:
        """Both directions of every edge, sorted, long [2, edges]."""
        return torch.stack([self.csr.row, self.csr.col])

    @property
    def degree(self) -> Tensor:
        """Neighbours of each node, long [nodes]."""
        return self.csr.degree

    @property
    def device(self) -> torch.device:
        """Where the graph is."""
        return self.keys.device

    def without(self, pairs: Tensor) -> Adjacency:
        """Return a view that lacks the given edges in both directions; pairs that are no edges are ignored.

        The graph that the first view was made of stays its `base`, with all that was remembered.

        Args:
            pairs: long [2, pairs].

        """
        view = Adjacency.__new__(Adjacency)
        view.num_nodes, view.keys, view.base, view._made = self.num_nodes, self.keys, self.base, {}
        view._view = (self, pairs)
        return view

    def contains(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return which (row, column) are edges, bool [pairs]."""
        codes = rows * self.num_nodes + columns
        if self.num_nodes**2 > SMALL:
            return self.csr.find(codes) >= 0
        joined = self.base.memoize("bitmap", self.base._bitmap).index_select(0, codes)
        if self.removed is not None:
            # Few of those asked for are edges: only they are looked up among what the view lacks.
            hits = joined.nonzero().flatten()
            joined[hits] = self.removed.find(codes[hits]) < 0
        return joined

    def memoize(self, name: str, make: Callable[[], T], *inputs: object) -> T:
        """Return what `make` returns, made once for the same input objects."""
        made = self._made.get(name)
        if made is None or any(old is not new for old, new in zip(made[0], inputs, strict=True)):
            made = self._made[name] = (inputs, make())
        return cast(T, made[1])

    def _edges(self, pairs: Tensor) -> Tensor:
        places = self.csr.find(_codes(pairs, self.num_nodes))
        return places[places >= 0]

    def _bitmap(self) -> Tensor:
        bitmap = torch.zeros(self.num_nodes**2, dtype=torch.bool, device=self.device)
        bitmap[self.csr.codes] = True
        return bitmap


def as_adjacency(edge_index: Tensor | Adjacency, num_nodes: int) -> Adjacency:
    """Return the message graph of an edge index; one that is given stays what it is."""
    return edge_index if isinstance(edge_index, Adjacency) else Adjacency(edge_index, num_nodes)


def remove_edges(edge_index: Tensor | Adjacency, pairs: Tensor, num_nodes: int) -> Tensor | Adjacency:
    """Remove pairs from a graph in both directions, so that a model does not see the edges that it scores.

    Args:
        edge_index: edges, long [2, edges], or an adjacency.
        pairs: edges to remove, long [2, pairs]; pairs that are not edges are ignored.
        num_nodes: number of nodes.

    Returns:
        The other edges in their order, long [2, remaining]; of an adjacency, a view without the pairs.

    """
    if isinstance(edge_index, Adjacency):
        return edge_index.without(pairs)
    # Only edges between endpoints of the pairs can be among them, and those are few: only they are compared.
    is_endpoint = torch.zeros(num_nodes, dtype=torch.bool, device=edge_index.device)
    is_endpoint[pairs] = True
    candidates = (is_endpoint[edge_index[0]] & is_endpoint[edge_index[1]]).nonzero().flatten()
    row, col = edge_index[:, candidates]
    removed = candidates[torch.isin(row * num_nodes + col, _codes(pairs, num_nodes))]
    keep = torch.ones(edge_index.size(1), dtype=torch.bool, device=edge_index.device)
    keep[removed] = False
    return edge_index[:, keep]


def offsets_from_counts(count: Tensor) -> Tensor:
    """Return where each of several runs begins, and where the last ends: long [runs + 1]."""
    found = count.new_zeros(count.numel() + 1)
    torch.cumsum(count, 0, out=found[1:])
    return found


def _codes(pairs: Tensor, num_nodes: int) -> Tensor:
    return torch.cat([pairs[0] * num_nodes + pairs[1], pairs[1] * num_nodes + pairs[0]])
