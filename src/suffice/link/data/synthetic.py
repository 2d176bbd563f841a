"""Graphs that need no download: a contextual stochastic block model and scikit-learn's digits."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch import Tensor

from suffice.link.data.graph import Graph


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
    edges = _block_edges(sizes.tolist(), inside, (1 - edge_signal) * inside, np.random.default_rng(seed))
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat_interleave(sizes)
    means = torch.nn.functional.normalize(torch.randn(classes, features, generator=generator), dim=1)
    x = feature_signal * means[y] + torch.randn(nodes, features, generator=generator)
    return Graph("block-model", x, edges, y)


def _block_edges(sizes: list[int], inside: float, across: float, rng: np.random.Generator) -> Tensor:
    # PyG's generator draws a number for every pair of nodes, which ends at some 20,000 nodes.
    starts = np.cumsum([0, *sizes])
    parts: list[NDArray[np.int64]] = []
    for first, second in combinations_with_replacement(range(len(sizes)), 2):
        rows, columns = sizes[first], sizes[second]
        same = first == second
        pairs = rows * (rows - 1) // 2 if same else rows * columns
        count = rng.binomial(pairs, inside if same else across)
        drawn = rng.choice(pairs, count, replace=False, shuffle=False)
        if same:  # pair k of the triangle below the diagonal, row by row
            larger = ((1 + np.sqrt(1 + 8 * drawn.astype(np.float64))) // 2).astype(np.int64)
            ends = drawn - larger * (larger - 1) // 2, larger
        else:
            ends = drawn // columns, drawn % columns
        parts.append(np.stack([ends[0] + starts[first], ends[1] + starts[second]]))
    return torch.from_numpy(np.concatenate(parts, axis=1)).long()


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
