"""Choice of the items to keep: the highest scores, the highest leverages, or the greedy best capacity."""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.information.arguments import check_count, check_floating, check_mask, check_ridge, check_vectors
from suffice.information.capacity import noise_variance, row_leverage
from suffice.information.items import collect_items
from suffice.information.linalg import matmul, working_dtype


@torch.no_grad()
def select_top(scores: Tensor, budget: int, *, valid: Tensor | None = None, protected: Tensor | None = None) -> Tensor:
    """Keep the protected items and the highest scores; among equal scores the first.

    Args:
        scores: [..., n]; infinite scores rank as such.
        budget: Items to keep, from 1 to n.
        valid: Bool [..., n]; all if not given. Invalid items are never kept, whatever their score.
        protected: Bool [..., n], kept whatever their score and counted in the budget; none if not given.

    Returns:
        Indices of the kept items in ascending order, long, [..., budget].

    Raises:
        TypeError: An input has the wrong type or dtype.
        ValueError: Shapes do not fit, the score of a valid item is NaN, the budget is out of range or less
            than the protected items or more than the valid ones, or a protected item is not valid.

    Example:
        >>> select_top(torch.tensor([0.3, 0.1, 0.9, 0.7]), 2, protected=torch.arange(4) == 1)
        tensor([1, 2])

    """
    scores = check_floating("scores", scores)
    if scores.ndim == 0 or scores.numel() == 0:
        raise ValueError(f"scores must have shape [..., n] with every size at least 1 (got {tuple(scores.shape)})")
    valid, protected = _check_candidates(scores.shape, scores.device, budget, valid, protected)
    if bad := int((scores.isnan() & valid).sum()):
        raise ValueError(f"scores must not be NaN (got {bad} NaN)")
    count = torch.full((*scores.shape[:-1], 1), budget, device=scores.device)
    return _indices(_highest(scores, count, valid, protected), budget)


@torch.no_grad()
def select_by_leverage(
    vectors: Tensor,
    weights: Tensor | None,
    budget: int,
    *,
    rounds: int = 1,
    valid: Tensor | None = None,
    protected: Tensor | None = None,
    ridge: float = 0.1,
    relative: bool = True,
) -> Tensor:
    """Keep the highest leverages, in one go (arXiv 2604.25975, Algorithm 1) or in rounds.

    In one go two equal items halve each other's leverage and may both be dropped. In rounds the set shrinks
    from the valid items to the budget by equal factors, and leverages are computed anew on what is left,
    with the σ² of the full set.

    Args:
        vectors: u, [..., n, d].
        weights: w ≥ 0, [..., n]; all 1 if None.
        budget: Items to keep, from 1 to n.
        rounds: Number of rounds, at least 1.
        valid: Bool [..., n]; all if not given.
        protected: Bool [..., n], always kept and counted in the budget; none if not given.
        ridge: λ of `noise_variance`.
        relative: Whether σ² follows the trace (see `noise_variance`).

    Returns:
        Indices of the kept items in ascending order, long, [..., budget].

    Raises:
        TypeError: An input has the wrong type or dtype.
        ValueError: Shapes do not fit, an input is NaN, infinite or negative, the Gram matrix overflows, the
            budget is out of range or less than the protected items or more than the valid ones, or a
            protected item is not valid.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.6]])
        >>> select_by_leverage(vectors, None, 2)
        tensor([0, 2])

    """
    check_ridge(ridge)
    check_count("rounds", rounds)
    vectors = check_vectors(vectors)
    candidates, protected = _check_candidates(vectors.shape[:-1], vectors.device, budget, valid, protected)
    items = collect_items(vectors, weights, valid, relative)
    noise = noise_variance(items.gram, ridge, relative)
    rows, gram, kept = items.rows, items.gram, candidates
    total = candidates.sum(-1, keepdim=True)  # [..., 1]
    for step in range(1, rounds + 1):
        if step > 1:
            rows *= kept.unsqueeze(-1)
            gram = matmul(rows.mT, rows)
        size = (total * (budget / total.double()) ** (step / rounds)).round().long()  # the budget in the last
        kept = _highest(row_leverage(rows, gram, noise), size, kept, protected)
    return _indices(kept, budget)


@torch.no_grad()
def select_greedy(
    vectors: Tensor,
    weights: Tensor | None,
    budget: int,
    *,
    valid: Tensor | None = None,
    protected: Tensor | None = None,
    ridge: float = 0.1,
    relative: bool = True,
) -> Tensor:
    """Keep the items that greedily raise the capacity most, starting from the protected ones.

    Capacity is monotone submodular, so that the greedy set has at least (1 − 1/e) of the best gain over
    the protected items. Works in float64 with rank-one updates: O(n d) for each item that is kept.

    Args:
        vectors: u, [..., n, d].
        weights: w ≥ 0, [..., n]; all 1 if None.
        budget: Items to keep, from 1 to n.
        valid: Bool [..., n]; all if not given.
        protected: Bool [..., n], always kept and counted in the budget; none if not given.
        ridge: λ of `noise_variance`.
        relative: Whether σ² follows the trace (see `noise_variance`).

    Returns:
        Indices of the kept items in ascending order, long, [..., budget].

    Raises:
        TypeError: An input has the wrong type or dtype.
        ValueError: As for `select_by_leverage`; or the ridge is so small that w ‖u‖² / σ² overflows.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.6]])
        >>> select_greedy(vectors, None, 2)
        tensor([0, 2])

    """
    check_ridge(ridge)
    vectors = check_vectors(vectors)
    candidates, protected = _check_candidates(vectors.shape[:-1], vectors.device, budget, valid, protected)
    items = collect_items(vectors, weights, valid, relative, torch.float64)
    noise = noise_variance(items.gram, ridge, relative)
    rows = (items.rows / noise.sqrt()[..., None, None]).reshape(-1, *vectors.shape[-2:])  # √w u / σ [b, n, d]
    if not torch.linalg.vector_norm(rows, dim=-1).isfinite().all():
        raise ValueError(f"ridge must leave w ‖u‖² / σ² within the range of torch.float64 (got {ridge})")

    waiting = protected.reshape(rows.shape[:-1]).clone()  # [b, n]
    closed = ~candidates.reshape(rows.shape[:-1])  # [b, n]
    batch = torch.arange(len(rows), device=rows.device)
    for _ in range(budget):
        length = torch.linalg.vector_norm(rows, dim=-1)  # [b, n], gains ½ log(1 + length²) of capacity
        best = length.masked_fill(closed, -torch.inf).masked_fill(waiting, torch.inf).argmax(-1)  # [b]
        closed[batch, best], waiting[batch, best] = True, False
        # Rows become rows (I + xxᵀ)^(-1/2) with x the chosen one. The root loses half the digits that A⁻¹
        # would, and lengths stay real: the choice is sound even where σ² is below the rounding error of G.
        row = rows[batch, best].unsqueeze(-2)  # x [b, 1, d]
        root = (1 + row.square().sum(-1, keepdim=True)).sqrt()  # [b, 1, 1]
        rows.addcmul_((row @ rows.mT).mT, row / (root * (root + 1)), value=-1)
    return _indices(closed.reshape(candidates.shape) & candidates, budget)


def _check_candidates(
    shape: torch.Size, device: torch.device, budget: int, valid: Tensor | None, protected: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the masks of valid and of protected items, [..., n] each, once the budget is known to fit."""
    check_count("budget", budget, shape[-1])
    if valid is None:
        valid = torch.ones(shape, dtype=torch.bool, device=device)
    else:
        valid = check_mask("valid", valid, shape, device)
        if (fewest := int(valid.sum(-1).min())) < budget:
            raise ValueError(f"budget must be at most the number of valid items, {fewest} (got {budget})")
    if protected is None:
        protected = torch.zeros(shape, dtype=torch.bool, device=device)
    else:
        protected = check_mask("protected", protected, shape, device)
        if bad := int((protected & ~valid).sum()):
            raise ValueError(f"protected must mark valid items only (got {bad} that are not valid)")
        if (most := int(protected.sum(-1).max())) > budget:
            raise ValueError(f"budget must be at least the number of protected items, {most} (got {budget})")
    return valid, protected


def _highest(scores: Tensor, count: Tensor, valid: Tensor, protected: Tensor) -> Tensor:
    """Mask [..., n] of the `count` [..., 1] items to keep: protected, then by score, then by position."""
    limit = torch.finfo(working_dtype(scores.dtype)).max
    key = scores.to(working_dtype(scores.dtype)).clamp(-limit, limit)
    key = key.masked_fill(~valid, -torch.inf).masked_fill(protected, torch.inf)
    threshold = key.topk(int(count.max()), dim=-1).values.gather(-1, count - 1)
    above, tied = key > threshold, key == threshold
    room = count - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


def _indices(kept: Tensor, budget: int) -> Tensor:
    """Positions [..., budget] of the `budget` true entries in each row of a mask [..., n]."""
    return kept.nonzero()[:, -1].reshape(*kept.shape[:-1], budget)
