"""Alignment of embeddings with classes: Trace Ratio, class information, cluster NMI and linear probe.

All functions share two arguments: `embeddings`, a finite floating point tensor [n, d], and `classes`, the class labels,
a long tensor [n] with at least two distinct values. Every function raises:

* `TypeError` if the embeddings are not a floating point tensor.
* `ValueError` if shapes do not match, values are not finite, or there are fewer than two classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from suffice.information.capacity import capacity, noise_variance
from suffice.information.linalg import gram_matrix, working_dtype
from suffice.information.validation import check_floating, check_ridge


def trace_ratio(embeddings: Tensor, classes: Tensor) -> float:
    """Return the Trace Ratio tr(S_between) / tr(S_within) of the scatter matrices (arXiv 2604.25978).

    Args:
        embeddings: [n, d].
        classes: [n].

    Returns:
        At least 0. Infinite if the embeddings are equal within each class but not between classes; 0 if all embeddings
        are equal.

    Example:
        >>> trace_ratio(torch.tensor([[0.0], [2.0], [4.0], [6.0]]), torch.tensor([0, 0, 1, 1]))
        4.0

    """
    points, labels = _check_inputs(embeddings, classes)
    points = points.double()
    center = points.mean(0)
    between = within = 0.0
    for label in labels:
        members = points[classes == label]
        mean = members.mean(0)
        between += len(members) * float((mean - center).square().sum())
        within += float((members - mean).square().sum())
    if within == 0:
        return float("inf") if between > 0 else 0.0
    return between / within


def class_information(embeddings: Tensor, classes: Tensor, ridge: float = 0.1) -> float:
    """Return the Gaussian class information ½ log det(I + αΣ) − Σ_c π_c ½ log det(I + αΣ_c) in nats.

    Σ is the covariance of all embeddings, Σ_c the covariance of class c, π_c the share of class c, and
    1/α = `ridge` · tr Σ / d.

    Args:
        embeddings: [n, d].
        classes: [n].
        ridge: noise variance relative to the mean variance of the embeddings, above 0.

    Returns:
        At least 0, because log det is concave. 0 if all classes have the same mean and covariance.

    Raises:
        ValueError: `ridge` is not above 0.

    """
    check_ridge(ridge)
    points, labels = _check_inputs(embeddings, classes)
    points = points.double()
    centered = points - points.mean(0)
    weights = torch.full((len(points),), 1 / len(points), dtype=points.dtype)
    noise = float(noise_variance(gram_matrix(centered, weights), ridge))
    total = float(capacity(centered, weights, ridge=noise, relative=False))
    for label in labels:
        members = points[classes == label]
        weights = torch.full((len(members),), 1 / len(members), dtype=points.dtype)
        within = capacity(members - members.mean(0), weights, ridge=noise, relative=False)
        total -= len(members) / len(points) * float(within)
    return max(total, 0.0)


def cluster_nmi(embeddings: Tensor, classes: Tensor, *, restarts: int = 10, seed: int = 0) -> float:
    """Return the normalized mutual information of k-means clusters and classes, with as many clusters as classes.

    Args:
        embeddings: [n, d].
        classes: [n].
        restarts: number of runs of k-means with different initial centers. The run with the least inertia is used.
        seed: seed of the initial centers.

    Returns:
        From 0 to 1.

    Raises:
        ImportError: scikit-learn is not installed.

    """
    points, labels = _check_inputs(embeddings, classes)
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import normalized_mutual_info_score
    except ImportError as error:
        raise ImportError("cluster_nmi needs scikit-learn: pip install 'suffice[graph]'") from error
    array = points.double().numpy()
    num_clusters = min(len(labels), len(np.unique(array, axis=0)))
    if num_clusters < 2:
        return 0.0
    kmeans = KMeans(num_clusters, n_init=restarts, random_state=seed)  # pyright: ignore[reportArgumentType]
    return float(normalized_mutual_info_score(classes.numpy(), kmeans.fit_predict(array)))


def linear_probe(embeddings: Tensor, classes: Tensor, *, folds: int = 5, seed: int = 0) -> float:
    """Return the cross-validated accuracy of a ridge classifier whose regularization is chosen inside each fold.

    Args:
        embeddings: [n, d].
        classes: [n]. Every class needs at least `folds` items.
        folds: number of stratified folds.
        seed: seed of the folds.

    Returns:
        From 0 to 1.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: a class is smaller than the number of folds.

    """
    points, labels = _check_inputs(embeddings, classes)
    smallest = min(int((classes == label).sum()) for label in labels)
    if not 2 <= folds <= smallest:
        raise ValueError(f"folds must be from 2 to {smallest}, the size of the smallest class, got {folds}")
    try:
        from sklearn.linear_model import RidgeClassifierCV
        from sklearn.model_selection import StratifiedKFold, cross_val_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("linear_probe needs scikit-learn: pip install 'suffice[graph]'") from error
    classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(-2, 4, 7)))
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return float(cross_val_score(classifier, points.double().numpy(), classes.numpy(), cv=splitter).mean())


def _check_inputs(embeddings: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the embeddings on the CPU, and the distinct class labels."""
    check_floating("embeddings", embeddings)
    if embeddings.ndim != 2 or embeddings.numel() == 0:
        raise ValueError(f"embeddings must have shape [n, d] with every size at least 1, got {tuple(embeddings.shape)}")
    if classes.shape != (len(embeddings),):
        raise ValueError(f"classes must have shape ({len(embeddings)},), got {tuple(classes.shape)}")
    points = embeddings.detach().to(working_dtype(embeddings.dtype)).cpu()
    if not bool(points.isfinite().all()):
        raise ValueError(f"embeddings must be finite, got {int((~points.isfinite()).sum())} NaN or infinite entries")
    labels = classes.unique()
    if len(labels) < 2:
        raise ValueError(f"classes must contain at least two classes, got {len(labels)}")
    return points, labels
