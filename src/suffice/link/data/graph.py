"""A graph with features and classes, and its split into training, validation and test edges."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.transforms import LargestConnectedComponents, RandomLinkSplit
from torch_geometric.utils import to_undirected

from suffice.link.batches.negatives import draw_negatives


@dataclass(frozen=True)
class Graph:
    """An undirected graph.

    Args:
        name: name in tables.
        x: features, float32 [nodes, features].
        edges: each edge once, the smaller id first, long [2, edges].
        y: class of each node, long [nodes]; None if the data set has none.
        official_split: split that comes with the data set, if one does.

    Raises:
        ValueError: ids out of range, self-loops, duplicates, or labels that don't fit the nodes.

    """

    name: str
    x: Tensor
    edges: Tensor
    y: Tensor | None = None
    official_split: Split | None = None

    def __post_init__(self) -> None:
        check_edges(self.edges, self.num_nodes)
        if self.y is not None and self.y.shape != (self.num_nodes,):
            raise ValueError(f"y has shape {tuple(self.y.shape)}; accepted: ({self.num_nodes},), one a node")

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.x.size(0)

    @property
    def classes(self) -> Tensor:
        """Class of each node.

        Raises:
            ValueError: the data set has no labels.

        """
        if self.y is None:
            raise ValueError(f"y of {self.name} is missing; accepted: a class for each node")
        return self.y

    @classmethod
    def from_data(cls, data: Data, name: str) -> Graph:
        """Make a graph from PyG's `Data`: undirected, without self-loops or repeated edges."""
        if data.edge_index is None or data.x is None:
            raise ValueError(f"{name} lacks edge_index or x; accepted: Data with both")
        edges = to_undirected(data.edge_index, num_nodes=data.num_nodes)
        y = data.y if isinstance(data.y, Tensor) and data.y.ndim == 1 else None
        return cls(name, data.x.float(), edges[:, edges[0] < edges[1]], None if y is None else y.long())

    def to_data(self) -> Data:
        """Return PyG's `Data` with both directions of every edge."""
        return Data(x=self.x, edge_index=to_undirected(self.edges, num_nodes=self.num_nodes), y=self.y)


@dataclass(frozen=True)
class SplitConfig:
    """How a graph is split and what a model may see; part of every result.

    Args:
        validation: share of the edges for validation.
        test: share of the edges for the test.
        largest_component: keep only the largest connected component.
        validation_edges_at_test: let messages pass over validation edges when test edges are scored.
        negatives: validation and test negatives for each positive.

    Raises:
        ValueError: a share is not above 0, or they leave nothing to train on.

    """

    validation: float = 0.05
    test: float = 0.10
    largest_component: bool = False
    validation_edges_at_test: bool = False
    negatives: float = 1.0

    def __post_init__(self) -> None:
        if self.validation <= 0 or self.test <= 0 or self.validation + self.test >= 1:
            raise ValueError(
                f"validation, test are {self.validation}, {self.test}; accepted: above 0, together below 1"
            )
        if self.negatives <= 0:
            raise ValueError(f"negatives is {self.negatives}; accepted: above 0")


@dataclass(frozen=True)
class Split:
    """Edges of a split, each positive once; negatives of validation and test are fixed and disjoint."""

    train: Tensor  # long [2, train]
    validation: Tensor
    test: Tensor
    validation_negatives: Tensor
    test_negatives: Tensor

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test", "validation_negatives", "test_negatives"):
            if getattr(self, name).size(1) == 0:
                raise ValueError(f"{name} holds no edge; accepted: at least one in every part of a split")

    @property
    def known(self) -> Tensor:
        """What must never be drawn as a training negative: all edges, and the negatives of other parts."""
        return torch.cat(
            [self.train, self.validation, self.test, self.validation_negatives, self.test_negatives], dim=1
        )

    def message_edges(self, *, validation: bool = False) -> Tensor:
        """Return the edges that messages pass over, both directions one after the other: long [2, 2·edges]."""
        edges = torch.cat([self.train, self.validation], dim=1) if validation else self.train
        return torch.cat([edges, edges.flip(0)], dim=1)

    def to(self, device: torch.device | str) -> Split:
        """Return the split on a device."""
        return Split(**{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})


def prepare_graph(graph: Graph, protocol: SplitConfig) -> Graph:
    """Return the graph that the protocol works on: all of it, or its largest component."""
    if not protocol.largest_component:
        return graph
    data = LargestConnectedComponents()(graph.to_data())
    return replace(Graph.from_data(data, graph.name), official_split=None)


def split_edges(graph: Graph, protocol: SplitConfig, seed: int) -> Split:
    """Split the edges (PyG's `RandomLinkSplit`) and draw negatives that no two parts share.

    A split that comes with the data set is taken as it is.

    Args:
        graph: already prepared for the protocol.
        protocol: shares and negatives.
        seed: the same seed gives the same split; no global generator is moved.

    Raises:
        ValueError: a part would hold no edge, or there are too few negatives.

    """
    if graph.official_split is not None:
        return graph.official_split
    for name in ("validation", "test"):
        if int(getattr(protocol, name) * graph.edges.size(1)) < 1:
            raise ValueError(
                f"{name} is {getattr(protocol, name)} of {graph.edges.size(1)} edges, an empty split; "
                "accepted: a share of at least one edge"
            )
    transform = RandomLinkSplit(
        protocol.validation,
        protocol.test,
        is_undirected=True,
        split_labels=True,
        add_negative_train_samples=False,
        neg_sampling_ratio=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = transform(Data(edge_index=to_undirected(graph.edges), num_nodes=graph.num_nodes))
    train, validation, test = (part.pos_edge_label_index for part in parts)
    count = [max(1, round(part.size(1) * protocol.negatives)) for part in (validation, test)]
    # One draw for both parts: its pairs are distinct, so that the parts share none (PyG issue 10706).
    negatives = draw_negatives(graph.edges, graph.num_nodes, sum(count), seed)
    negatives = negatives[:, torch.randperm(sum(count), generator=torch.Generator().manual_seed(seed))]
    return Split(train, validation, test, negatives[:, : count[0]], negatives[:, count[0] :])


def check_edges(edges: Tensor, num_nodes: int) -> None:
    """Raise unless every edge is there once, joins two different nodes, and its ids are in range.

    Raises:
        ValueError: what is wrong, how often, and the first case.

    """
    if edges.ndim != 2 or edges.size(0) != 2 or edges.size(1) == 0:
        raise ValueError(f"edges has shape {tuple(edges.shape)}; accepted: [2, edges] with at least one edge")

    def refuse(bad: Tensor, what: str) -> None:
        if bool(bad.any()):
            first = tuple(edges[:, int(bad.nonzero()[0])].tolist())
            raise ValueError(f"edges hold {int(bad.sum())} {what} (the first is {first})")

    outside = (edges < 0) | (edges >= num_nodes)
    refuse(outside.any(dim=0), f"with ids out of range; accepted: 0 to {num_nodes - 1}")
    refuse(edges[0] == edges[1], "self-loops; accepted: edges between two different nodes")
    keys = edges.min(dim=0).values * num_nodes + edges.max(dim=0).values
    order = keys.argsort(stable=True)
    again = torch.zeros_like(keys, dtype=torch.bool)
    again[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    refuse(again, "duplicates; accepted: every undirected edge once")
