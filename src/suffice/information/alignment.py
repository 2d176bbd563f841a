"""How well embeddings align with classes: Trace Ratio, NMI, linear probe, class information.

Everywhere: `embeddings` are [items, d], floating and finite; `classes` are long [items], at least two.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from suffice.information.arguments import check_ridge, check_vectors
from suffice.information.capacity import capacity, noise_variance
from suffice.information.linalg import gram, working_dtype


def trace_ratio(embeddings: Tensor, classes: Tensor) -> float:
    """Trace Ratio tr(S_between) / tr(S_within) of the scatter matrices (arXiv 2604.25978).

    Returns:
        At least 0; infinite if every class is a point and they differ, 0 if all items are one point.

    Raises:
        TypeError: the embeddings are not floating.
        ValueError: shapes don't fit, values are not finite, or there are fewer than two classes.

    Example:
        >>> trace_ratio(torch.tensor([[0.0], [2.0], [4.0], [6.0]]), torch.tensor([0, 0, 1, 1]))
        4.0

    """
    x, groups = _check(embeddings, classes)
    x = x.double()
    center = x.mean(0)
    between = within = 0.0
    for group in groups:
        own = x[classes == group]
        mean = own.mean(0)
        between += len(own) * float((mean - center).square().sum())
        within += float((own - mean).square().sum())
    if within == 0:
        return float("inf") if between > 0 else 0.0
    return between / within


def class_information(embeddings: Tensor, classes: Tensor, ridge: float = 0.1) -> float:
    """Gaussian class information ½ log det(I + αΣ) − Σ_c π_c ½ log det(I + αΣ_c), in nats.

    Σ is the covariance of all items, Σ_c that of class c, and 1/α = `ridge` · tr Σ / d.

    Returns:
        At least 0 (log det is concave); 0 if the classes have one mean and covariance.

    Raises:
        TypeError: the embeddings are not floating.
        ValueError: as for `trace_ratio`, or `ridge` is not above 0.

    """
    check_ridge(ridge)
    x, groups = _check(embeddings, classes)
    x = x.double()
    centered = x - x.mean(0)
    weights = torch.full((len(x),), 1 / len(x), dtype=x.dtype)
    noise = float(noise_variance(gram(centered, weights), ridge))
    total = float(capacity(centered, weights, ridge=noise, relative=False))
    for group in groups:
        own = x[classes == group]
        share = torch.full((len(own),), 1 / len(own), dtype=x.dtype)
        inside = capacity(own - own.mean(0), share, ridge=noise, relative=False)
        total -= len(own) / len(x) * float(inside)
    return max(total, 0.0)


def cluster_nmi(embeddings: Tensor, classes: Tensor, *, restarts: int = 10, seed: int = 0) -> float:
    """Normalised mutual information of k-means clusters with the classes, k the number of classes.

    Args:
        embeddings: [items, d].
        classes: [items].
        restarts: runs of k-means from new centres; the one of least inertia counts.
        seed: of the restarts.

    Returns:
        From 0 to 1.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: as for `trace_ratio`.

    """
    x, groups = _check(embeddings, classes)
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import normalized_mutual_info_score
    except ImportError as error:
        raise ImportError("cluster_nmi needs scikit-learn: pip install 'suffice[graph]'") from error
    points = x.double().numpy()
    clusters = min(len(groups), len(np.unique(points, axis=0)))
    if clusters < 2:
        return 0.0
    found = KMeans(clusters, n_init=restarts, random_state=seed).fit_predict(points)  # pyright: ignore[reportArgumentType]
    return float(normalized_mutual_info_score(classes.numpy(), found))


def linear_probe(embeddings: Tensor, classes: Tensor, *, folds: int = 5, seed: int = 0) -> float:
    """Cross-validated accuracy of a ridge classifier, its regularisation chosen inside each fold.

    Args:
        embeddings: [items, d].
        classes: [items]; every class must have at least `folds` items.
        folds: stratified folds.
        seed: of the folds.

    Returns:
        From 0 to 1.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: as for `trace_ratio`, or a class is smaller than the number of folds.

    """
    x, groups = _check(embeddings, classes)
    smallest = min(int((classes == group).sum()) for group in groups)
    if not 2 <= folds <= smallest:
        raise ValueError(f"folds must be from 2 to {smallest}, the smallest class (got {folds})")
    try:
        from sklearn.linear_model import RidgeClassifierCV
        from sklearn.model_selection import StratifiedKFold, cross_val_score
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("linear_probe needs scikit-learn: pip install 'suffice[graph]'") from error
    probe = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(-2, 4, 7)))
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return float(cross_val_score(probe, x.double().numpy(), classes.numpy(), cv=parts).mean())


def _check(embeddings: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    x = check_vectors(embeddings).detach().to(working_dtype(embeddings.dtype)).cpu()
    if x.ndim != 2:
        raise ValueError(f"embeddings must have shape [items, d] (got {tuple(x.shape)})")
    if classes.shape != (len(x),):
        raise ValueError(f"classes must have shape ({len(x)},) (got {tuple(classes.shape)})")
    if not bool(x.isfinite().all()):
        raise ValueError(f"embeddings must be finite (got {int((~x.isfinite()).sum())} that are not)")
    groups = classes.unique()
    if len(groups) < 2:
        raise ValueError(f"classes must hold at least two classes (got {len(groups)})")
    return x, groups
