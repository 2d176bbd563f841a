"""Graphs that need no download: a contextual stochastic block model, and scikit-learn's digits."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch import Tensor

from suffice.arguments import check_int, check_number
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
    """Draw a contextual stochastic block model, whose edges and features depend on the classes.

    Args:
        nodes: number of nodes, in classes of equal size.
        classes: number of classes.
        degree: expected degree.
        edge_signal: 0 if edges are independent of the classes, 1 if they join only nodes of the same class.
        feature_signal: distance of the class means from the origin, in standard deviations of the noise of one
            feature; 0 if features are independent of the classes.
        features: number of features.
        seed: seed of the graph.

    Raises:
        ValueError: an argument is out of range, or a class is too small for the degree.

    """
    nodes, classes = check_int("nodes", nodes), check_int("classes", classes)
    features, seed = check_int("features", features, 1), check_int("seed", seed, 0)
    if classes < 2 or nodes < 2 * classes:
        raise ValueError(f"classes must be at least 2 with at least 2 nodes each, got {classes} with {nodes} nodes")
    edge_signal = check_number("edge_signal", edge_signal, minimum=0, maximum=1)
    feature_signal = check_number("feature_signal", feature_signal, minimum=0)
    degree = check_number("degree", degree)
    # The expected degree determines p_in, with p_out = (1 − edge_signal) · p_in.
    size = nodes / classes
    p_in = degree / (size - 1 + (1 - edge_signal) * (nodes - size))
    if not 0 < p_in <= 1:
        raise ValueError(f"degree must be above 0 and small enough for classes of {size:g} nodes, got {degree}")
    sizes = torch.full((classes,), nodes // classes)
    sizes[: nodes % classes] += 1
    edges = _draw_block_edges(sizes.tolist(), p_in, (1 - edge_signal) * p_in, np.random.default_rng(seed))
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat_interleave(sizes)
    means = torch.nn.functional.normalize(torch.randn(classes, features, generator=generator), dim=1)
    x = feature_signal * means[y] + torch.randn(nodes, features, generator=generator)
    return Graph("block-model", x, edges, y)


def _draw_block_edges(sizes: list[int], p_in: float, p_out: float, rng: np.random.Generator) -> Tensor:
    # PyG's generator draws a number for every pair of nodes, which limits it to about 20,000 nodes.
    starts = np.cumsum([0, *sizes])
    parts: list[NDArray[np.int64]] = []
    for first, second in combinations_with_replacement(range(len(sizes)), 2):
        rows, columns = sizes[first], sizes[second]
        is_same = first == second
        num_pairs = rows * (rows - 1) // 2 if is_same else rows * columns
        count = rng.binomial(num_pairs, p_in if is_same else p_out)
        drawn = rng.choice(num_pairs, count, replace=False, shuffle=False)
        if is_same:  # pair k of the triangle below the diagonal, row by row
            larger = ((1 + np.sqrt(1 + 8 * drawn.astype(np.float64))) // 2).astype(np.int64)
            pair = drawn - larger * (larger - 1) // 2, larger
        else:
            pair = drawn // columns, drawn % columns
        parts.append(np.stack([pair[0] + starts[first], pair[1] + starts[second]]))
    return torch.from_numpy(np.concatenate(parts, axis=1)).long()


def digits(neighbors: int = 6) -> Graph:
    """Return scikit-learn's digits as a graph: each image is joined to its nearest neighbors, pixels are its features.

    Args:
        neighbors: number of nearest neighbors of each image, before the graph is made undirected.

    Raises:
        ValueError: `neighbors` is out of range.

    """
    loaded: Any = load_digits(return_X_y=True)
    pixels, target = np.asarray(loaded[0]), np.asarray(loaded[1])
    if not 1 <= neighbors < len(pixels):
        raise ValueError(f"neighbors must be from 1 to {len(pixels) - 1}, got {neighbors}")
    directed = kneighbors_graph(pixels, neighbors, include_self=False)
    rows, columns = (directed + directed.T).nonzero()
    edges = torch.from_numpy(np.stack([rows, columns])).long()
    edges = edges[:, edges[0] < edges[1]]
    x = torch.from_numpy(pixels / 16).float()
    return Graph("digits", x, edges, torch.from_numpy(target).long())
