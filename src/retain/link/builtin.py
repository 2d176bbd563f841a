"""Graphs that need no download: a contextual stochastic block model and scikit-learn's digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch_geometric.utils import stochastic_blockmodel_graph

from retain.link.graph import Graph


def block_model(
    nodes: int = 2000,
    classes: int = 5,
    degree: float = 8.0,
    *,
    edge_signal: float = 0.93,
    feature_signal: float = 1.0,
    features: int = 64,
    seed: int = 0,
) -> Graph:
    """Draw a contextual stochastic block model: edges and features that tell of the class as much as asked.

    Args:
        nodes: nodes, in classes of equal size.
        classes: number of classes.
        degree: expected degree.
        edge_signal: 0 if edges know nothing of the classes, 1 if they join nodes of one class only.
        feature_signal: distance of the class means from the origin, in standard deviations of the noise of
            one feature; 0 if features know nothing.
        features: number of features.
        seed: the same seed gives the same graph.

    Raises:
        ValueError: a dial is out of range, or the degree asks for more edges than a class can hold.

    """
    if classes < 2 or nodes < 2 * classes:
        raise ValueError(f"classes is {classes} with {nodes} nodes; accepted: at least 2, of 2 nodes or more")
    if not 0 <= edge_signal <= 1:
        raise ValueError(f"edge_signal is {edge_signal}; accepted: 0 to 1")
    if feature_signal < 0:
        raise ValueError(f"feature_signal is {feature_signal}; accepted: at least 0")
    # With p_in and p_out = (1 − edge_signal)·p_in, the expected degree fixes p_in.
    size = nodes / classes
    inside = degree / (size - 1 + (1 - edge_signal) * (nodes - size))
    if not 0 < inside <= 1:
        raise ValueError(f"degree is {degree}; accepted: above 0, up to what classes of {size:g} nodes hold")
    sizes = torch.full((classes,), nodes // classes)
    sizes[: nodes % classes] += 1
    probabilities = torch.full((classes, classes), (1 - edge_signal) * inside)
    probabilities.fill_diagonal_(inside)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        edges = stochastic_blockmodel_graph(sizes, probabilities)
        y = torch.arange(classes).repeat_interleave(sizes)
        means = torch.nn.functional.normalize(torch.randn(classes, features), dim=1)
        x = feature_signal * means[y] + torch.randn(nodes, features)
    return Graph("block-model", x, edges[:, edges[0] < edges[1]], y)


def digits(neighbours: int = 6) -> Graph:
    """Return scikit-learn's digits as a graph: images joined to their nearest neighbours, pixels as features.

    Args:
        neighbours: nearest neighbours of each image; the graph is symmetrised.

    Raises:
        ValueError: `neighbours` is out of range.

    """
    loaded: Any = load_digits(return_X_y=True)
    pixels, target = np.asarray(loaded[0]), np.asarray(loaded[1])
    if not 1 <= neighbours < len(pixels):
        raise ValueError(f"neighbours is {neighbours}; accepted: 1 to {len(pixels) - 1}")
    joined = kneighbors_graph(pixels, neighbours, include_self=False)
    rows, columns = (joined + joined.T).nonzero()
    edges = torch.from_numpy(np.stack([rows, columns])).long()
    edges = edges[:, edges[0] < edges[1]]
    x = torch.from_numpy(pixels / 16).float()
    return Graph("digits", x, edges, torch.from_numpy(target).long())
