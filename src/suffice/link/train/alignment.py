"""Alignment of representations with the node classes: how much class information a link predictor keeps."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch_geometric.utils import scatter

from suffice.arguments import check_names
from suffice.information.alignment import class_information, cluster_nmi, linear_probe, trace_ratio
from suffice.link.data.graph import Graph, Split
from suffice.link.models import LinkPredictor
from suffice.link.models.base import check_link_predictor
from suffice.link.train.inputs import message_edges, node_features

MEASURES = ("nmi", "trace_ratio", "probe", "class_information")


def alignment(
    model: LinkPredictor,
    graph: Graph,
    split: Split,
    *,
    measures: tuple[str, ...] = MEASURES,
    seed: int = 0,
    log: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Measure how well the representations of a model, trained or not, align with the node classes.

    Args:
        model: link predictor, evaluated in eval mode.
        graph: graph with a class for each node.
        split: edges of the graph.
        measures: names from `MEASURES`: `nmi` (k-means clusters against classes), `trace_ratio` (arXiv 2604.25978),
            `probe` (accuracy of a linear probe) and `class_information`.
        seed: seed of clustering and cross-validation.
        log: called with the name of each measure before it is computed, which may take minutes.

    Returns:
        each measure of both representations (see `representations`): `node_nmi`, `edge_nmi`, `node_trace_ratio`, …

    Raises:
        ValueError: the graph has no classes, or a measure is unknown.

    """
    return {
        f"{kind}_{name}": value
        for kind, (x, classes) in representations(model, graph, split).items()
        for name, value in measure_alignment(
            x, classes, measures=measures, seed=seed, log=None if log is None else _with_prefix(log, f"{kind}_")
        ).items()
    }


def feature_alignment(
    graph: Graph,
    *,
    measures: tuple[str, ...] = MEASURES,
    seed: int = 0,
    log: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Measure how well the node features align with the node classes: a reference that needs no model.

    Args:
        graph: graph with a class for each node.
        measures: names from `MEASURES`.
        seed: seed of clustering and cross-validation.
        log: called with the name of each measure before it is computed, which may take minutes.

    Returns:
        `feature_nmi`, `feature_trace_ratio`, …

    Raises:
        ValueError: the graph has no classes, or a measure is unknown.

    """
    log = None if log is None else _with_prefix(log, "feature_")
    values = measure_alignment(graph.x, graph.classes, measures=measures, seed=seed, log=log)
    return {f"feature_{name}": value for name, value in values.items()}


def representations(model: LinkPredictor, graph: Graph, split: Split) -> dict[str, tuple[Tensor, Tensor]]:
    """Return two representations of the nodes in eval mode, each with the classes of its nodes.

    Args:
        model: link predictor.
        graph: graph with a class for each node.
        split: edges of the graph.

    Returns:
        `node`: node embeddings of the encoder, [nodes, channels]. `edge`: mean embedding of the training edges at
        each node that has one, [nodes with an edge, channels] (see `incident_edge_means`).

    Raises:
        TypeError: the model is no `LinkPredictor`.
        ValueError: the graph has no classes, or only one.

    """
    check_link_predictor(model, "Pass the embeddings of any other module to measure_alignment")
    classes = graph.classes
    device = next(model.parameters()).device
    split = split.to(device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        edge_index = message_edges(model, split, graph.num_nodes)
        encoding = model.encode(node_features(graph, model, split).to(device), edge_index)
        chunks = [model.edge_embedding(encoding, pairs) for pairs in split.train.split(2**15, dim=1)]
        means, has_edge = incident_edge_means(torch.cat(chunks), split.train, graph.num_nodes)
    model.train(was_training)
    return {"node": (encoding.nodes.cpu(), classes), "edge": (means.cpu(), classes[has_edge.cpu()])}


def incident_edge_means(edge_embeddings: Tensor, pairs: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Average the embeddings of the edges at each node (arXiv 2604.25978).

    Args:
        edge_embeddings: [edges, channels].
        pairs: the edges, long [2, edges].
        num_nodes: number of nodes.

    Returns:
        means [nodes with an edge, channels], and a mask of these nodes, bool [nodes].

    """
    ends = torch.cat([pairs[0], pairs[1]])
    embeddings = torch.cat([edge_embeddings, edge_embeddings])
    has_edge = torch.zeros(num_nodes, dtype=torch.bool, device=pairs.device)
    has_edge[ends] = True
    return scatter(embeddings, ends, dim_size=num_nodes, reduce="mean")[has_edge], has_edge


def measure_alignment(
    x: Tensor,
    classes: Tensor,
    *,
    measures: tuple[str, ...] = MEASURES,
    seed: int = 0,
    log: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """Measure how well embeddings align with classes.

    The linear probe uses five folds, or as many as the smallest class has items. It is NaN if a class has a single
    item, which cannot be both in the training and in the test fold.

    Args:
        x: embeddings, [items, channels].
        classes: long [items].
        measures: names from `MEASURES`.
        seed: seed of clustering and cross-validation.
        log: called with the name of each measure before it is computed, which may take minutes.

    Returns:
        value of each measure by name.

    Raises:
        ValueError: a measure is unknown.

    """
    functions = {
        "nmi": lambda: cluster_nmi(x, classes, seed=seed),
        "trace_ratio": lambda: trace_ratio(x, classes),
        "probe": lambda: _linear_probe(x, classes, seed),
        "class_information": lambda: class_information(x, classes),
    }
    measures = tuple(check_names("measures", measures, "names of measures", "['nmi', 'probe']"))
    if unknown := set(measures) - functions.keys():
        raise ValueError(f"measures must be among {', '.join(MEASURES)}, got {sorted(unknown)}")
    values: dict[str, float] = {}
    for name in measures:
        if log is not None:
            log(name)
        values[name] = functions[name]()
    return values


def _with_prefix(log: Callable[[str], None], prefix: str) -> Callable[[str], None]:
    return lambda name: log(f"{prefix}{name}")


def _linear_probe(x: Tensor, classes: Tensor, seed: int) -> float:
    smallest = int(classes.unique(return_counts=True)[1].min())
    return linear_probe(x, classes, folds=min(5, smallest), seed=seed) if smallest > 1 else math.nan
