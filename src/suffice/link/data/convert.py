"""Graphs in memory of other libraries: NetworkX, DGL, and the dictionaries of OGB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_geometric.data import Data

from suffice.arguments import check_instance, check_int, shown
from suffice.link.data.edge_rules import EdgeRules
from suffice.link.data.graph import Graph

_MADE_FEATURES = ("degree", "learned")


def from_networkx(
    graph: Any,
    name: str,
    *,
    features: str | Sequence[str] = "degree",
    label: str | None = None,
    rules: EdgeRules | None = None,
) -> Graph:
    """Make an undirected graph from a graph of NetworkX; `node_ids` keeps its nodes.

    Args:
        graph: a `networkx.Graph`, `DiGraph`, `MultiGraph` or `MultiDiGraph`.
        name: name of the graph, shown in tables.
        features: names of the attributes of nodes that are their features, numbers or sequences of numbers; or `degree`
            or `learned` (see `Graph`).
        label: name of the attribute of nodes that is their class; None for a graph without classes.
        rules: what becomes of duplicate edges, self-loops and attributes of edges; by default, `EdgeRules()`.

    Raises:
        TypeError: `graph` is not a graph of NetworkX.
        ValueError: a node has no such attribute, an attribute is not made of numbers, there are no edges, or an edge is
            refused by the rules.

    """
    if not (hasattr(graph, "nodes") and hasattr(graph, "adj") and callable(getattr(graph, "edges", None))):
        raise TypeError(f"graph must be a graph of NetworkX, got {type(graph).__name__}")
    nodes = list(graph.nodes)
    columns = _check_names(features)
    rules = _check_rules(rules)
    attributes = {key for *_, values in graph.edges(data=True) for key in values}
    rules.check_weights(", ".join(map(str, sorted(attributes, key=str))) or None)

    def values_of(attribute: str) -> list[Any]:
        for node in nodes:
            if graph.nodes[node].get(attribute) is None:
                raise ValueError(f"nodes must all have the attribute {attribute!r}, got none for node {node!r}")
        return [graph.nodes[node][attribute] for node in nodes]

    x = None if columns is None else _as_features({one: values_of(one) for one in columns}, len(nodes))
    y = None if label is None else _as_classes(label, values_of(label), len(nodes))
    position = {node: number for number, node in enumerate(nodes)}
    edges = torch.tensor([[position[u], position[v]] for u, v in graph.edges()], dtype=torch.long).reshape(-1, 2).T
    data = Data(x=x, edge_index=edges, y=y, num_nodes=len(nodes))
    found = Graph.from_data(data, name, features="given" if columns is not None else str(features), rules=rules)
    ids = np.empty(len(nodes), dtype=object)
    ids[:] = nodes
    return Graph(name, found.x, found.edges, found.y, node_ids=ids, features=found.features)


def from_dgl(
    graph: Any,
    name: str,
    *,
    features: str | Sequence[str] = ("feat",),
    label: str | None = None,
    rules: EdgeRules | None = None,
) -> Graph:
    """Make an undirected graph from a graph of DGL, which is not imported.

    Args:
        graph: a `dgl.DGLGraph` with one type of nodes and of edges, or any object with its methods `edges()` and
            `num_nodes()` and its mappings `ndata` and, optionally, `edata`.
        name: name of the graph, shown in tables.
        features: names of the data of nodes that are their features, [nodes] or [nodes, features]; or `degree` or
            `learned` (see `Graph`).
        label: name of the data of nodes that is their class, often `label`; None for a graph without classes.
        rules: what becomes of duplicate edges, self-loops and data of edges; by default, `EdgeRules()`.

    Raises:
        TypeError: `graph` is not a graph of DGL.
        ValueError: `graph` has several types of nodes or edges, no such data or no edges, or an edge is refused by the
            rules.

    """
    methods = ("edges", "num_nodes")
    if not all(callable(getattr(graph, one, None)) for one in methods) or not hasattr(graph, "ndata"):
        raise TypeError(
            f"graph must be a graph of DGL, with edges(), num_nodes() and ndata, got {type(graph).__name__}"
        )
    types = {kind: list(getattr(graph, kind, ())) for kind in ("ntypes", "etypes")}
    if any(len(found) > 1 for found in types.values()):
        raise ValueError(
            f"graph must have one type of nodes and of edges, got {', '.join(types['ntypes'])} with "
            f"{', '.join(types['etypes'])}. dgl.to_homogeneous converts a graph"
        )
    count = int(graph.num_nodes())
    found = dict(graph.ndata)
    columns = _check_names(features, found)
    if label is not None and label not in found:
        raise ValueError(
            f"label must be among the data of the nodes ({_join(found) or 'there are none'}), got {label!r}"
        )
    x = None if columns is None else _as_features({one: found[one] for one in columns}, count)
    y = None if label is None else _as_classes(label, found[label], count)
    rules = _check_rules(rules)
    rules.check_weights(_join(key for key in getattr(graph, "edata", ()) if key != "_ID") or None)
    sources, targets = (torch.as_tensor(ends).cpu() for ends in graph.edges())
    if sources.shape != targets.shape:
        raise ValueError(
            f"graph must have a target for each source in edges(), got shapes {tuple(sources.shape)} and "
            f"{tuple(targets.shape)}"
        )
    data = Data(x=x, edge_index=torch.stack([sources, targets]), y=y, num_nodes=count)
    return Graph.from_data(data, name, features="given" if columns is not None else str(features), rules=rules)


def from_ogb_dict(
    graph: Mapping[str, Any],
    name: str,
    *,
    features: str = "given",
    labels: Any = None,
    rules: EdgeRules | None = None,
) -> Graph:
    """Make an undirected graph from a dictionary of OGB, which its data sets return without PyG or DGL.

    Args:
        graph: arrays `edge_index` [2, edges] and `node_feat` [nodes, features] or None, `num_nodes`, and others.
        name: name of the graph, shown in tables.
        features: `given` in `node_feat`; `degree` or `learned` for a graph without features (see `Graph`).
        labels: class of each node, [nodes] or [nodes, 1], which OGB returns beside the dictionary; None for a graph
            without classes.
        rules: what becomes of duplicate edges, self-loops and values of edges; by default, `EdgeRules()`.

    Raises:
        TypeError: `graph` is not a dictionary, or node ids are not integers.
        ValueError: an array is missing or has the wrong shape, or an edge is refused by the rules.

    """
    if not isinstance(graph, Mapping):
        raise TypeError(
            f"graph must be a dictionary, got {type(graph).__name__}. Of a pair of OGB, pass the first part as graph "
            f"and the second as labels"
        )
    if missing := {"edge_index", "num_nodes"} - graph.keys():
        raise ValueError(
            f"graph must hold edge_index and num_nodes, got {sorted(graph)} without {sorted(missing)}. A graph with "
            f"several types of nodes or edges is not supported"
        )
    count, x = check_int("graph['num_nodes']", graph["num_nodes"], 1), graph.get("node_feat")
    edges = np.asarray(graph["edge_index"])
    if edges.dtype.kind not in "biufc":  # texts and objects
        raise TypeError(f"graph['edge_index'] must hold integer node ids, got {edges.dtype}")
    data = Data(
        x=None if x is None or features != "given" else _as_features({"node_feat": x}, count),
        edge_index=torch.as_tensor(edges),
        y=None if labels is None else _as_classes("labels", labels, count),
        num_nodes=count,
    )
    values = [key for key in ("edge_feat", "edge_weight", "edge_year") if graph.get(key) is not None]
    rules = _check_rules(rules)
    rules.check_weights(", ".join(values) or None)
    return Graph.from_data(data, name, features=features, rules=rules)


def _check_rules(rules: EdgeRules | None) -> EdgeRules:
    return EdgeRules() if rules is None else check_instance("rules", rules, EdgeRules, "EdgeRules()", optional=True)


def _check_names(features: str | Sequence[str], found: Mapping[str, Any] | None = None) -> list[str] | None:
    """Return the names of features; None if features are made.

    Args:
        features: argument of the user.
        found: data of the nodes by name, among which the features must be; None to check that later.

    Raises:
        ValueError: a text is not `degree` or `learned`, there are no names, or nodes have no such data.

    """
    if isinstance(features, str) and features in _MADE_FEATURES:
        return None
    if isinstance(features, str) or not isinstance(features, Sequence) or not features:
        raise ValueError(f"features must be degree, learned or a list of names, got {features!r}")
    if found is not None and (unknown := [one for one in features if one not in found]):
        raise ValueError(
            f"features must be degree, learned or among the data of the nodes ({_join(found) or 'there are none'}), "
            f"got {unknown[0]!r}"
        )
    return list(features)


def _as_features(columns: Mapping[str, Any], num_nodes: int) -> Tensor:
    """Return the data of nodes side by side, float32 [nodes, features].

    Raises:
        ValueError: data are not real numbers, or have another number of rows.

    """
    arrays: list[NDArray[Any]] = []
    for name, values in columns.items():
        array = _as_array(name, values, num_nodes)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{name!r} must hold real numbers, got {array.dtype} such as {array.flat[0]!r}")
        arrays.append(array.astype(np.float32).reshape(num_nodes, int(np.prod(array.shape[1:]))))
    return torch.from_numpy(np.concatenate(arrays, axis=1))


def _as_classes(name: str, values: Any, num_nodes: int) -> Tensor:
    """Return the number of the class of each node, long [nodes], in the order of the classes.

    Raises:
        ValueError: there is not one class for each node.

    """
    array = _as_array(name, values, num_nodes)
    if array.size != num_nodes:
        raise ValueError(f"{name!r} must hold one class for each of {num_nodes} nodes, got shape {array.shape}")
    array = array.reshape(-1)
    if array.dtype.kind == "f" and (np.isnan(array) | (array % 1 != 0)).any():
        raise ValueError(f"{name!r} must hold classes, got NaN or fractions")
    if array.dtype.kind in "if" and (array < 0).any():
        raise ValueError(f"{name!r} must hold a class for each node, got {int((array < 0).sum())} negative numbers")
    try:
        return torch.from_numpy(np.unique(array, return_inverse=True)[1]).long()
    except TypeError:  # objects without an order
        raise ValueError(f"{name!r} must hold numbers or texts, got {shown(array.tolist())}") from None


def _as_array(name: str, values: Any, num_nodes: int) -> NDArray[Any]:
    """Return data of nodes, of which the first dimension is that of the nodes.

    Raises:
        ValueError: data have different lengths, or another number of rows.

    """
    try:
        array = _to_numpy(values) if isinstance(values, Tensor) else np.asarray(values)
    except ValueError:
        raise ValueError(f"{name!r} must hold as many numbers for each node, got different lengths") from None
    if array.ndim == 0 or len(array) != num_nodes:
        raise ValueError(f"{name!r} must have {num_nodes} rows, one for each node, got shape {array.shape}")
    return array


def _to_numpy(values: Tensor) -> NDArray[Any]:
    """Return a tensor of any layout as an array, with bfloat16, which NumPy lacks, as float32."""
    dense = values.detach().cpu().to_dense() if values.layout != torch.strided else values.detach().cpu()
    return (dense.float() if dense.dtype == torch.bfloat16 else dense).numpy()


def _join(names: Any) -> str:
    return ", ".join(sorted(map(str, names)))
