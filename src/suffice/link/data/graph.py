"""A graph with features and classes, and its split into training, validation and test edges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.transforms import LargestConnectedComponents
from torch_geometric.utils import to_edge_index, to_undirected

from suffice.arguments import check_flag, check_number
from suffice.link.batches.negatives import NegativeSampler, edge_keys, sample_negatives
from suffice.link.data.edge_rules import EdgeRules, check_range, find_copies, refuse_edges

FEATURES = ("given", "degree", "learned")
"""Where the features of the nodes come from."""


@dataclass(frozen=True)
class Graph:
    """An undirected graph.

    Args:
        name: name of the graph, shown in tables.
        x: features, float32 [nodes, features].
        edges: each edge once, the smaller node id first, long [2, edges].
        y: class of each node, long [nodes]; None if the data set has no classes.
        official_split: the split that comes with the data set; None if there is none.
        node_ids: id of each node in the user's files or graph, numbers or texts, [nodes]; None if the nodes already had
            the numbers 0 to nodes - 1. A graph that a study saves is without them.
        features: `given` in `x`; or, for a graph without features, `degree` (the logarithm of the number of training
            edges of a node) or `learned` (one embedding for each node, which is trained with the model). `x` is then a
            column of zeros.
        num_left: number of nodes of the first side of a bipartite graph, which come first. Every edge then joins a node
            of each side, and so does every sampled negative. None for other graphs.

    Raises:
        ValueError: a node id is out of range, there are self-loops or duplicates, features are not finite, or `y` does
            not fit the nodes.

    """

    name: str
    x: Tensor
    edges: Tensor
    y: Tensor | None = None
    official_split: Split | None = None
    node_ids: NDArray[Any] | None = None
    features: str = "given"
    num_left: int | None = None

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise ValueError(f"features must be one of {', '.join(FEATURES)}, got {self.features!r}")
        _check_features(self.x)
        check_edges(self.edges, self.num_nodes)
        if self.num_left is not None:
            is_left = self.edges < self.num_left
            refuse_edges(self.edges, is_left[0] == is_left[1], "join a node of each side", "within one side")
        if self.y is not None and self.y.shape != (self.num_nodes,):
            raise ValueError(
                f"y must have shape ({self.num_nodes},), one class for each node, got {tuple(self.y.shape)}"
            )
        if self.y is not None and bool((self.y < 0).any()):
            raise ValueError(
                f"y must hold a class of at least 0 for each node, got {int((self.y < 0).sum())} negative numbers. "
                f"Remove the nodes without a class, or leave the classes out"
            )

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.x.size(0)

    @property
    def num_features(self) -> int:
        """Number of features of a node, which is `in_channels` of a model."""
        return self.num_nodes if self.features == "learned" else self.x.size(1)

    @property
    def sides(self) -> int | tuple[int, int]:
        """Number of nodes, or those of both sides if the graph is bipartite, as `NegativeSampler` takes it."""
        return self.num_nodes if self.num_left is None else (self.num_left, self.num_nodes - self.num_left)

    @property
    def classes(self) -> Tensor:
        """Class of each node, long [nodes], to measure the alignment with them.

        Raises:
            ValueError: the data set has no classes, or only one.

        """
        if self.y is None:
            raise ValueError(f"y must be the class of each node of {self.name}, got None")
        if bool((self.y == self.y[0]).all()):
            raise ValueError(
                f"y must hold at least two classes, got only class {int(self.y[0])} in {self.name}. Leave the classes "
                f"out to train without them"
            )
        return self.y

    @classmethod
    def from_data(cls, data: Data, name: str, *, features: str = "given", rules: EdgeRules | None = None) -> Graph:
        """Make an undirected graph from PyG's `Data`.

        Args:
            data: graph with `edge_index` or `adj_t`, and optionally `x` and `y`. A `y` that is not one class for each
                node is left out.
            name: name of the graph, shown in tables.
            features: `given` in `x`; `degree` or `learned` for a graph without features (see `Graph`).
            rules: what becomes of duplicate edges, self-loops and weights; by default, `EdgeRules()`.

        Raises:
            TypeError: `data` is not a `Data`, for example a `HeteroData`, or does not hold tensors or integer node ids.
            ValueError: `data` has no edges or no features, the number of nodes differs, `y` is made of fractions, or an
                edge is refused by the rules.

        """
        if not isinstance(data, Data):
            raise TypeError(
                f"data must be a torch_geometric.data.Data with one type of nodes and of edges, got "
                f"{type(data).__name__}. A HeteroData has to_homogeneous()"
            )
        for key in ("edge_index", "x"):
            if not isinstance(getattr(data, key), Tensor | None):
                raise TypeError(f"{key} of {name} must be a tensor, got {type(getattr(data, key)).__name__}")
        adjacency = None if data.edge_index is not None or "adj_t" not in data else to_edge_index(data.adj_t)
        edge_index = data.edge_index if adjacency is None else adjacency[0].flip(0)
        x = data.x if features == "given" else torch.zeros(int(data.num_nodes or 0), 1)
        if edge_index is None or x is None:
            raise ValueError(
                f"data must have edge_index and x, got {sorted(data.to_dict())} for {name}. Use features='degree' or "
                f"'learned' for a graph without x"
            )
        rules = rules or EdgeRules()
        if data.num_nodes != x.size(0):
            raise ValueError(
                f"x must have num_nodes={data.num_nodes} rows, one for each node, got {x.size(0)} for {name}"
            )
        values = [key for key in data.edge_attrs() if key not in ("edge_index", "adj_t")]
        values += ["values of adj_t"] if adjacency is not None and bool((adjacency[1] != 1).any()) else []
        rules.check_weights(", ".join(values) or None)
        check_range(edge_index, x.size(0))
        edges = rules.apply(edge_index.long(), x.size(0))
        edges = edges[:, edge_keys(edges, x.size(0)).argsort()]
        y = data.y.flatten() if isinstance(data.y, Tensor) and data.y.numel() == x.size(0) else None
        if y is not None and y.is_floating_point() and not bool((y == y.round()).all()):
            raise ValueError(f"y must hold the class of each node, got fractions or NaN for {name}. Set data.y = None")
        return cls(name, x.float(), edges, None if y is None else y.long(), features=features)

    def to_data(self) -> Data:
        """Return PyG's `Data` with both directions of every edge."""
        return Data(x=self.x, edge_index=to_undirected(self.edges, num_nodes=self.num_nodes), y=self.y)


@dataclass(frozen=True)
class SplitConfig:
    """How a graph is split and which edges a model may see; recorded with every result.

    Args:
        validation: fraction of the edges for validation.
        test: fraction of the edges for the test.
        largest_component: keep only the largest connected component.
        validation_edges_at_test: use validation edges for message passing when test edges are scored.
        negatives: number of validation and test negatives for each positive.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a fraction is not above 0, no edges are left for training, or `negatives` is not above 0.

    """

    validation: float = 0.05
    test: float = 0.10
    largest_component: bool = False
    validation_edges_at_test: bool = False
    negatives: float = 1.0

    def __post_init__(self) -> None:
        for name in ("validation", "test"):
            object.__setattr__(self, name, check_number(name, getattr(self, name)))
        for name in ("largest_component", "validation_edges_at_test"):
            check_flag(name, getattr(self, name))
        object.__setattr__(self, "negatives", check_number("negatives", self.negatives, above=0))
        if self.validation <= 0 or self.test <= 0 or self.validation + self.test >= 1:
            raise ValueError(
                f"validation and test must be above 0 with a sum below 1, got {self.validation} and {self.test}"
            )


@dataclass(frozen=True)
class Split:
    """The edges of a split: every positive is in one part, and validation and test share no negatives.

    Args:
        train: positives for training, long [2, edges].
        validation: positives for validation, long [2, edges].
        test: positives for the test, long [2, edges].
        validation_negatives: pairs without an edge for validation, long [2, pairs].
        test_negatives: pairs without an edge for the test, long [2, pairs].

    Raises:
        ValueError: a part is empty.

    """

    train: Tensor
    validation: Tensor
    test: Tensor
    validation_negatives: Tensor
    test_negatives: Tensor

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name).size(1) == 0:
                raise ValueError(f"{name} must hold at least one edge, got none")

    @property
    def known(self) -> Tensor:
        """All edges and all held-out negatives, which must not be sampled as training negatives, long [2, pairs]."""
        return torch.cat(
            [self.train, self.validation, self.test, self.validation_negatives, self.test_negatives], dim=1
        )

    def message_edges(self, *, validation: bool = False) -> Tensor:
        """Return the edges for message passing, all in one direction and then all in the other, long [2, 2·edges].

        Args:
            validation: whether to include the validation edges.

        """
        edges = torch.cat([self.train, self.validation], dim=1) if validation else self.train
        return torch.cat([edges, edges.flip(0)], dim=1)

    def to(self, device: torch.device | str) -> Split:
        """Return the split on a device."""
        return Split(**{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})


def prepare_graph(graph: Graph, config: SplitConfig) -> Graph:
    """Return the graph, or only its largest connected component if `config.largest_component` is set."""
    if not config.largest_component:
        return graph
    data = graph.to_data()
    data.number = torch.arange(graph.num_nodes)
    kept = LargestConnectedComponents()(data)
    return replace(
        Graph.from_data(kept, graph.name),
        official_split=None,
        node_ids=None if graph.node_ids is None else graph.node_ids[kept.number.numpy()],
        features=graph.features,
        num_left=None if graph.num_left is None else int((kept.number < graph.num_left).sum()),
    )


def order_sides(graph: Graph, is_left: Tensor) -> Graph:
    """Return a bipartite graph, whose nodes are ordered by side; `node_ids` tells their numbers or ids from before.

    Args:
        graph: a graph without an official split.
        is_left: whether a node is on the first side, bool [nodes].

    Raises:
        ValueError: an edge joins nodes of one side.

    """
    order = torch.cat([is_left.nonzero().flatten(), (~is_left).nonzero().flatten()])
    position = torch.empty_like(order)
    position[order] = torch.arange(graph.num_nodes)
    ids = order.numpy() if graph.node_ids is None else graph.node_ids[order.numpy()]
    edges = position[graph.edges].sort(dim=0).values
    y = None if graph.y is None else graph.y[order]
    return replace(graph, x=graph.x[order], edges=edges, y=y, node_ids=ids, num_left=int(is_left.sum()))


def with_enough_negatives(config: SplitConfig, graph: Graph, k: int) -> SplitConfig:
    """Return settings with which the validation and the test have at least `k` negatives, as Hits@K needs.

    The settings are returned as they are if the negatives suffice, if the graph has an official split, or if it has too
    few pairs without an edge.

    Args:
        config: settings of the split.
        graph: a graph that `prepare_graph` returned.
        k: K of Hits@K.

    """
    num_edges = graph.edges.size(1)
    sizes = [int(config.validation * num_edges), int(config.test * num_edges)]  # as RandomLinkSplit rounds
    if graph.official_split is not None or min(sizes) < 1 or min(sizes) * config.negatives >= k:
        return config
    negatives = k / min(sizes)
    num_available = NegativeSampler(graph.edges, graph.sides).num_available
    return replace(config, negatives=negatives) if sum(sizes) * negatives <= num_available / 2 else config


def split_edges(graph: Graph, config: SplitConfig, seed: int) -> Split:
    """Split the edges as PyG's `RandomLinkSplit` does, and sample distinct negatives for validation and test.

    The official split of a data set is returned as it is.

    Args:
        graph: a graph that `prepare_graph` returned.
        config: fractions and number of negatives.
        seed: seed of the split. The state of the global random generators does not change.

    Raises:
        ValueError: a part would be empty, or there are too few pairs without an edge.

    """
    if graph.official_split is not None:
        return graph.official_split
    for name in ("validation", "test"):
        if int(getattr(config, name) * graph.edges.size(1)) < 1:
            raise ValueError(
                f"{name} must be a fraction that contains at least one of the {graph.edges.size(1)} edges, "
                f"got {getattr(config, name)}"
            )
    # As PyG's RandomLinkSplit divides the sorted edges, without its copies of all message-passing edges for each part.
    edges = graph.edges[:, edge_keys(graph.edges, graph.num_nodes).argsort()]
    edges = edges[:, torch.randperm(edges.size(1), generator=torch.Generator().manual_seed(seed))]
    sizes = [int(fraction * edges.size(1)) for fraction in (config.validation, config.test)]
    train, validation, test = edges.split([edges.size(1) - sum(sizes), *sizes], dim=1)
    counts = [max(1, round(part.size(1) * config.negatives)) for part in (validation, test)]
    # One draw for both parts, whose pairs are distinct: RandomLinkSplit can repeat negatives (PyG issue 10706).
    negatives = sample_negatives(graph.edges, graph.sides, sum(counts), seed)
    negatives = negatives[:, torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed))]
    return Split(train, validation, test, negatives[:, : counts[0]], negatives[:, counts[0] :])


def _check_features(x: Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"x must have shape [nodes, features], got {tuple(x.shape)}")
    if not bool(x.sum().isfinite()):  # cheaper than a mask of all features, but the sum of finite features may overflow
        is_wrong = ~x.isfinite()
        if bool(is_wrong.any()):
            node, feature = is_wrong.nonzero()[0].tolist()
            raise ValueError(
                f"x must be finite, got {int(is_wrong.sum())} NaN or infinite values, the first one is feature "
                f"{feature} of node {node}"
            )


def check_edges(edges: Tensor, num_nodes: int) -> None:
    """Raise unless edges [2, edges] are distinct, join two different nodes, and have node ids in range.

    Raises:
        ValueError: an edge is not accepted; the message gives the reason, the number of such edges and the first one.

    """
    check_range(edges, num_nodes)
    refuse_edges(edges, edges[0] == edges[1], "join two different nodes", "self-loops")
    refuse_edges(edges, find_copies(edges, num_nodes), "be listed once each", "duplicates")
