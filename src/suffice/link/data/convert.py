"""Graphs in memory of other libraries: NetworkX, and the dictionaries of OGB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Data

from suffice.link.data.edge_rules import EdgeRules
from suffice.link.data.graph import Graph


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
        ValueError: a node has no such attribute, there are no edges, or an edge is refused by the rules.

    """
    nodes = list(graph.nodes)
    position = {node: number for number, node in enumerate(nodes)}
    edges = torch.tensor([[position[u], position[v]] for u, v in graph.edges()], dtype=torch.long).reshape(-1, 2).T
    rules = rules or EdgeRules()
    attributes = {key for *_, values in graph.edges(data=True) for key in values}
    rules.check_weights(", ".join(map(str, sorted(attributes, key=str))) or None)

    def values_of(attribute: str) -> list[Any]:
        for node in nodes:
            if graph.nodes[node].get(attribute) is None:
                raise ValueError(f"nodes must all have the attribute {attribute!r}, got none for node {node!r}")
        return [graph.nodes[node][attribute] for node in nodes]

    is_made = isinstance(features, str)
    x = None
    if not is_made:
        columns = [np.asarray(values_of(one), dtype=np.float32).reshape(len(nodes), -1) for one in features]
        x = torch.from_numpy(np.concatenate(columns, axis=1))
    y = None
    if label is not None:
        y = torch.from_numpy(np.unique(np.asarray(values_of(label)), return_inverse=True)[1]).long()
    data = Data(x=x, edge_index=edges, y=y, num_nodes=len(nodes))
    found = Graph.from_data(data, name, features=str(features) if is_made else "given", rules=rules)
    ids = np.empty(len(nodes), dtype=object)
    ids[:] = nodes
    return Graph(name, found.x, found.edges, found.y, node_ids=ids, features=found.features)


def from_ogb_dict(
    graph: Mapping[str, Any], name: str, *, features: str = "given", rules: EdgeRules | None = None
) -> Graph:
    """Make an undirected graph from a dictionary of OGB, which its data sets return without PyG or DGL.

    Args:
        graph: arrays `edge_index` [2, edges] and `node_feat` [nodes, features] or None, `num_nodes`, and others.
        name: name of the graph, shown in tables.
        features: `given` in `node_feat`; `degree` or `learned` for a graph without features (see `Graph`).
        rules: what becomes of duplicate edges, self-loops and values of edges; by default, `EdgeRules()`.

    Raises:
        ValueError: an array is missing, or an edge is refused by the rules.

    """
    if missing := {"edge_index", "num_nodes"} - graph.keys():
        raise ValueError(
            f"graph must hold edge_index and num_nodes, got {sorted(graph)} without {sorted(missing)}. A graph with "
            f"several types of nodes or edges is not supported"
        )
    x = graph.get("node_feat")
    data = Data(
        x=None if x is None else torch.from_numpy(np.asarray(x)).float(),
        edge_index=torch.from_numpy(np.asarray(graph["edge_index"])).long(),
        num_nodes=int(graph["num_nodes"]),
    )
    values = [key for key in ("edge_feat", "edge_weight", "edge_year") if graph.get(key) is not None]
    rules = rules or EdgeRules()
    rules.check_weights(", ".join(values) or None)
    return Graph.from_data(data, name, features=features, rules=rules)
