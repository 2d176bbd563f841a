"""What the representation of a link predictor keeps of the classes of nodes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch_geometric.utils import scatter

from suffice.information.alignment import class_information, cluster_nmi, linear_probe, trace_ratio
from suffice.link.data.graph import Graph, Split
from suffice.link.models import LinkPredictor
from suffice.link.train.trainer import features, message_edges

MEASURES = ("nmi", "trace_ratio", "probe", "class_information")


def incident_means(edge_embeddings: Tensor, pairs: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Average the embeddings of the edges at each node (arXiv 2604.25978).

    Args:
        edge_embeddings: [edges, d].
        pairs: [2, edges].
        num_nodes: nodes of the graph.

    Returns:
        Means [nodes with an edge, d] and which nodes those are, bool [nodes].

    """
    ends = torch.cat([pairs[0], pairs[1]])
    both = torch.cat([edge_embeddings, edge_embeddings])
    has = torch.zeros(num_nodes, dtype=torch.bool, device=pairs.device)
    has[ends] = True
    return scatter(both, ends, dim_size=num_nodes, reduce="mean")[has], has


def embeddings(model: LinkPredictor, graph: Graph, split: Split) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what a model makes of the nodes, in eval mode: embeddings and the classes of their nodes.

    Returns:
        `node`: the nodes' embeddings; `edge`: means of the last hidden layer over training edges.

    Raises:
        ValueError: the data set has no labels.

    """
    classes = graph.classes
    device = next(model.parameters()).device
    split = split.to(device)
    training = model.training
    model.eval()
    with torch.no_grad():
        messages = message_edges(model, split, graph.num_nodes)
        encoding = model.encode(features(graph, model).to(device), messages)
        parts = [model.edge_embedding(encoding, part) for part in split.train.split(2**15, dim=1)]
        means, has = incident_means(torch.cat(parts), split.train, graph.num_nodes)
    model.train(training)
    return {"node": (encoding.nodes.cpu(), classes), "edge": (means.cpu(), classes[has.cpu()])}


def measure(x: Tensor, classes: Tensor, *, measures: tuple[str, ...] = MEASURES, seed: int = 0) -> dict[str, float]:
    """Return the measures of alignment by name.

    The linear probe takes fewer folds than five where the smallest class has fewer items; it is NaN where a class
    has a single item, which can't be both learned and tested.

    Raises:
        ValueError: there is no such measure.

    """
    known = {
        "nmi": lambda: cluster_nmi(x, classes, seed=seed),
        "trace_ratio": lambda: trace_ratio(x, classes),
        "probe": lambda: _probe(x, classes, seed),
        "class_information": lambda: class_information(x, classes),
    }
    if wrong := set(measures) - known.keys():
        raise ValueError(f"measures is {sorted(wrong)}; accepted: {', '.join(MEASURES)}")
    return {name: known[name]() for name in measures}


def _probe(x: Tensor, classes: Tensor, seed: int) -> float:
    smallest = int(classes.unique(return_counts=True)[1].min())
    return linear_probe(x, classes, folds=min(5, smallest), seed=seed) if smallest > 1 else math.nan


def alignment(
    model: LinkPredictor,
    graph: Graph,
    split: Split,
    *,
    measures: tuple[str, ...] = MEASURES,
    seed: int = 0,
) -> dict[str, float]:
    """Return `node_nmi`, `edge_nmi`, `node_trace_ratio`, … of a trained or untrained model."""
    return {
        f"{kind}_{name}": value
        for kind, (x, classes) in embeddings(model, graph, split).items()
        for name, value in measure(x, classes, measures=measures, seed=seed).items()
    }


def raw_alignment(graph: Graph, *, measures: tuple[str, ...] = MEASURES, seed: int = 0) -> dict[str, float]:
    """Return the same measures of the raw features, the reference that needs no model."""
    found = measure(graph.x, graph.classes, measures=measures, seed=seed)
    return {f"raw_{name}": value for name, value in found.items()}
