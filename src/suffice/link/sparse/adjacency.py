"""The adjacency of an undirected graph in compressed sparse rows, and views of it without some edges."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Result = TypeVar("Result")

MAX_DENSE_ENTRIES = 2**26
"""Largest num_nodes² for which dense matrices over pairs of nodes are kept: graphs of up to 8,192 nodes.

A dense matrix of bytes then has at most 64 MiB.
"""


class CompressedRows:
    """Directed edges in compressed sparse rows (CSR).

    Args:
        codes: row · num_nodes + column of each edge, ascending and unique, long [edges].
        num_nodes: number of nodes.

    Attributes:
        row: row of each edge, ascending, long [edges].
        col: column of each edge, ascending within a row, long [edges].
        degree: number of edges of each row, long [nodes].
        rowptr: where each row starts in `col`, followed by the number of edges, long [nodes + 1].

    """

    def __init__(self, codes: Tensor, num_nodes: int) -> None:
        self.codes = codes
        self.num_nodes = num_nodes
        self.row = torch.div(codes, max(num_nodes, 1), rounding_mode="floor")
        self.col = codes - self.row * num_nodes
        self.degree = torch.bincount(self.row, minlength=num_nodes)
        self.rowptr = offsets_from_counts(self.degree)

    def drop(self, positions: Tensor) -> CompressedRows:
        """Return the rows without the edges at some positions, long, ascending and unique."""
        keep = torch.ones_like(self.codes, dtype=torch.bool)
        keep[positions] = False
        kept = keep.nonzero().flatten()
        result = CompressedRows.__new__(CompressedRows)
        result.num_nodes = self.num_nodes
        result.codes, result.row, result.col = (part.index_select(0, kept) for part in (self.codes, self.row, self.col))
        result.degree = self.degree - torch.bincount(self.row[positions], minlength=self.num_nodes)
        result.rowptr = offsets_from_counts(result.degree)
        return result

    def expand(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the neighbors of nodes.

        Args:
            nodes: long [n], with repeats.

        Returns:
            The neighbors of the first node, then those of the second, and so on, long [total]; and for each neighbor
            the position in `nodes` of the node that it belongs to, long [total].

        """
        start, count = self.rowptr.index_select(0, nodes), self.degree.index_select(0, nodes)
        owner = torch.repeat_interleave(count)
        position = (start - offsets_from_counts(count)[:-1]).index_select(0, owner)
        position += torch.arange(owner.numel(), device=owner.device)
        return self.col.index_select(0, position), owner

    def find(self, codes: Tensor) -> Tensor:
        """Return the position of each code [n] among the edges, -1 if it is not an edge: long [n]."""
        if self.codes.numel() == 0:
            return torch.full_like(codes, -1)
        positions = torch.searchsorted(self.codes, codes).clamp_(max=self.codes.numel() - 1)
        return torch.where(self.codes.index_select(0, positions) == codes, positions, -1)


class Adjacency:
    """The adjacency matrix A of an undirected graph: both directions of every edge, no self-loops, no duplicates.

    A view without some edges refers to the graph that it was made from as its `base`, and shares the results that are
    cached for it.

    Args:
        edge_index: edges in one direction or both, in any order, long [2, edges].
        num_nodes: number of nodes.
        hash_keys: a number for each node that sketches hash instead of its id, long [nodes]. Sketches do not change
            when nodes and keys are permuted in the same way.

    Raises:
        ValueError: a shape is wrong, or a node id is out of range.

    """

    _parent_and_removed_pairs: tuple[Adjacency, Tensor]  # of a view

    def __init__(self, edge_index: Tensor, num_nodes: int, *, hash_keys: Tensor | None = None) -> None:
        if edge_index.ndim != 2 or edge_index.size(0) != 2:
            raise ValueError(f"edge_index must have shape [2, edges], got {tuple(edge_index.shape)}")
        if edge_index.numel() and not (int(edge_index.min()) >= 0 and int(edge_index.max()) < num_nodes):
            raise ValueError(
                f"edge_index must hold node ids from 0 to {num_nodes - 1}, "
                f"got {int(edge_index.min())} to {int(edge_index.max())}"
            )
        if hash_keys is not None and hash_keys.shape != (num_nodes,):
            raise ValueError(
                f"hash_keys must have shape ({num_nodes},), one for each node, got {tuple(hash_keys.shape)}"
            )
        self.num_nodes = num_nodes
        self._csr_and_removed = CompressedRows(_codes_of_graph(edge_index, num_nodes), num_nodes), None
        self.hash_keys = torch.arange(num_nodes, device=edge_index.device) if hash_keys is None else hash_keys
        self.base = self
        self._memo: dict[str, tuple[tuple[object, ...], Any]] = {}

    @cached_property
    def _csr_and_removed(self) -> tuple[CompressedRows, CompressedRows | None]:
        # Computed when a view is first read: models that use sketches read only the base.
        parent, pairs = self._parent_and_removed_pairs
        positions = parent.csr.find(_codes(pairs, self.num_nodes))
        positions = positions[positions >= 0].unique()
        removed = parent.csr.codes[positions]
        if parent.removed is not None:
            removed = torch.cat([parent.removed.codes, removed]).sort().values
        return parent.csr.drop(positions), CompressedRows(removed, self.num_nodes)

    @property
    def csr(self) -> CompressedRows:
        """The edges in compressed sparse rows."""
        return self._csr_and_removed[0]

    @property
    def removed(self) -> CompressedRows | None:
        """The edges of the base that a view lacks; None if this is not a view."""
        return self._csr_and_removed[1]

    @property
    def edge_index(self) -> Tensor:
        """Both directions of every edge, sorted, long [2, edges]."""
        return torch.stack([self.csr.row, self.csr.col])

    @property
    def degree(self) -> Tensor:
        """Number of neighbors of each node, long [nodes]."""
        return self.csr.degree

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.hash_keys.device

    def without(self, pairs: Tensor) -> Adjacency:
        """Return a view without some edges in both directions; pairs that are not edges are ignored.

        Args:
            pairs: long [2, pairs].

        """
        view = Adjacency.__new__(Adjacency)
        view.num_nodes, view.hash_keys, view.base, view._memo = self.num_nodes, self.hash_keys, self.base, {}
        view._parent_and_removed_pairs = (self, pairs)
        return view

    def contains(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return which pairs (row, column) are edges, bool [pairs].

        Args:
            rows: long [pairs].
            columns: long [pairs].

        """
        codes = rows * self.num_nodes + columns
        if self.num_nodes**2 > MAX_DENSE_ENTRIES:
            return self.csr.find(codes) >= 0
        is_edge = self.base.memoize("dense", self.base._dense).index_select(0, codes)
        if self.removed is not None:
            # Few of the pairs are edges of the base, and only these are searched among the removed edges.
            edges = is_edge.nonzero().flatten()
            is_edge[edges] = self.removed.find(codes[edges]) < 0
        return is_edge

    def memoize(self, name: str, compute: Callable[[], Result], *inputs: object) -> Result:
        """Return what `compute` returns, computed once for the same input objects.

        Args:
            name: key of the result; a result for other inputs is replaced.
            compute: computes the result.
            inputs: objects other than this adjacency that the result depends on.

        """
        known = self._memo.get(name)
        if known is None or any(old is not new for old, new in zip(known[0], inputs, strict=True)):
            known = self._memo[name] = (inputs, compute())
        return cast(Result, known[1])

    def _dense(self) -> Tensor:
        dense = torch.zeros(self.num_nodes**2, dtype=torch.bool, device=self.device)
        dense[self.csr.codes] = True
        return dense


def as_adjacency(edge_index: Tensor | Adjacency, num_nodes: int) -> Adjacency:
    """Return the adjacency of an edge index [2, edges]; an adjacency is returned as it is."""
    return edge_index if isinstance(edge_index, Adjacency) else Adjacency(edge_index, num_nodes)


def remove_edges(edge_index: Tensor | Adjacency, pairs: Tensor, num_nodes: int) -> Tensor | Adjacency:
    """Remove pairs from a graph in both directions, so that a model does not see the edges that it scores.

    All pairs are removed from one graph. This differs from `propagate_without_own_edge` and `count_by_distance`, which
    remove from the graph of each pair only this pair.

    Args:
        edge_index: edges, long [2, edges], or an adjacency.
        pairs: edges to remove, long [2, pairs]; pairs that are not edges are ignored.
        num_nodes: number of nodes.

    Returns:
        The other edges in their order, long [2, remaining]; of an adjacency, a view without the pairs.

    """
    if isinstance(edge_index, Adjacency):
        return edge_index.without(pairs)
    # An edge can be one of the pairs only if both of its nodes are. Such edges are few, and only they are compared.
    is_endpoint = torch.zeros(num_nodes, dtype=torch.bool, device=edge_index.device)
    is_endpoint[pairs] = True
    candidates = (is_endpoint[edge_index[0]] & is_endpoint[edge_index[1]]).nonzero().flatten()
    row, col = edge_index[:, candidates]
    removed = candidates[torch.isin(row * num_nodes + col, _codes(pairs, num_nodes))]
    keep = torch.ones(edge_index.size(1), dtype=torch.bool, device=edge_index.device)
    keep[removed] = False
    return edge_index[:, keep]


def offsets_from_counts(counts: Tensor) -> Tensor:
    """Return the start of each of several consecutive lists, followed by the end of the last one.

    Args:
        counts: length of each list, long [lists].

    Returns:
        Long [lists + 1].

    """
    offsets = counts.new_zeros(counts.numel() + 1)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def _codes_of_graph(edge_index: Tensor, num_nodes: int) -> Tensor:
    """Return the codes of both directions of every edge but self-loops, ascending and unique, long [edges]."""
    # Duplicates are removed from one direction, which takes a third of the memory.
    low, high = torch.minimum(*edge_index), torch.maximum(*edge_index)
    codes = low * num_nodes + high
    if bool((is_loop := low == high).any()):
        codes = codes[~is_loop]
    del low, high, is_loop
    codes = codes.unique()
    row = torch.div(codes, max(num_nodes, 1), rounding_mode="floor")
    return torch.cat([codes, (codes - row * num_nodes) * num_nodes + row]).sort().values


def _codes(pairs: Tensor, num_nodes: int) -> Tensor:
    """Return the codes of pairs [2, pairs] in both directions, long [2·pairs]."""
    return torch.cat([pairs[0] * num_nodes + pairs[1], pairs[1] * num_nodes + pairs[0]])
