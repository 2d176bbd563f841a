"""Selection of the items to keep: by score, by leverage score, or greedily by capacity.

`budget` is the number of items that each function keeps in each batch element.
"""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.arguments import check_int
from suffice.information.capacity import noise_variance, prepare_set, row_leverage
from suffice.information.linalg import matmul, working_dtype
from suffice.information.validation import check_floating, check_mask, check_ridge, check_vectors
from suffice.information.weighted_set import WeightedSet


@torch.no_grad()
def select_top(scores: Tensor, budget: int, *, valid: Tensor | None = None, protected: Tensor | None = None) -> Tensor:
    """Keep the protected items and the items with the highest scores. Ties are broken by position, first item first.

    Args:
        scores: [..., n]. Scores may be infinite.
        budget: number of items to keep, from 1 to n.
        valid: boolean [..., n]; all valid if None. Invalid items are never kept.
        protected: boolean [..., n]; none protected if None. Protected items are always kept, as part of the budget.

    Returns:
        Indices of the kept items in ascending order, long, [..., budget].

    Raises:
        TypeError: an input has the wrong type or dtype.
        ValueError: shapes do not match, the score of a valid item is NaN, the budget is out of range, smaller than the
            number of protected items or larger than the number of valid items, or a protected item is not valid.

    Example:
        >>> select_top(torch.tensor([0.3, 0.1, 0.9, 0.7]), 2, protected=torch.arange(4) == 1)
        tensor([1, 2])

    """
    scores = check_floating("scores", scores)
    if scores.ndim == 0 or scores.numel() == 0:
        raise ValueError(f"scores must have shape [..., n] with every size at least 1, got {tuple(scores.shape)}")
    valid, protected = _check_candidates(scores.shape, scores.device, budget, valid, protected)
    if num_nan := int((scores.isnan() & valid).sum()):
        raise ValueError(f"scores must be numbers, got {num_nan} NaN")
    count = torch.full((*scores.shape[:-1], 1), budget, device=scores.device)
    return _mask_to_indices(_top_mask(scores, count, valid, protected), budget)


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
    """Keep the items with the highest leverage scores, in one round (arXiv 2604.25975, Algorithm 1) or in several.

    In one round, two equal items halve each other's leverage score, and both may be dropped. With several rounds, the
    set shrinks by the same factor in each round, from the valid items to the budget, and the leverage scores are
    recomputed for the remaining items. σ² is always that of the full set.

    Args:
        vectors: u, [..., n, d].
        weights: w ≥ 0, [..., n]; all 1 if None.
        budget: number of items to keep, from 1 to n.
        rounds: number of rounds, at least 1.
        valid: boolean [..., n]; all valid if None. Invalid items are never kept.
        protected: boolean [..., n]; none protected if None. Protected items are always kept, as part of the budget.
        ridge: λ of `noise_variance`.
        relative: whether σ² is relative to the trace (see `noise_variance`).

    Returns:
        Indices of the kept items in ascending order, long, [..., budget].

    Raises:
        TypeError: an input has the wrong type or dtype.
        ValueError: shapes do not match, an input is NaN, infinite or negative, the Gram matrix overflows, the budget is
            out of range, smaller than the number of protected items or larger than the number of valid items, or a
            protected item is not valid.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.6]])
        >>> select_by_leverage(vectors, None, 2)
        tensor([0, 2])

    """
    check_int("rounds", rounds, 1)
    vectors = check_vectors(vectors)
    candidates, protected = _check_candidates(vectors.shape[:-1], vectors.device, budget, valid, protected)
    items, noise, _ = prepare_set(vectors, weights, valid, ridge, relative)
    rows, gram, kept = items.rows, items.gram, candidates
    total = candidates.sum(-1, keepdim=True)  # [..., 1]
    for step in range(1, rounds + 1):
        if step > 1:
            rows *= kept.unsqueeze(-1)
            gram = matmul(rows.mT, rows)
        size = (total * (budget / total.double()) ** (step / rounds)).round().long()  # `budget` in the last round
        kept = _top_mask(row_leverage(rows, gram, noise), size, kept, protected)
    return _mask_to_indices(kept, budget)


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
    """Start from the protected items, and repeatedly add the item that increases the capacity most.

    Capacity is monotone and submodular. The greedy set therefore gains at least (1 − 1/e) of the best possible gain
    over the protected items. The computation uses float64 and rank-one updates, O(n d) for each kept item.

    Args:
        vectors: u, [..., n, d].
        weights: w ≥ 0, [..., n]; all 1 if None.
        budget: number of items to keep, from 1 to n.
        valid: boolean [..., n]; all valid if None. Invalid items are never kept.
        protected: boolean [..., n]; none protected if None. Protected items are always kept, as part of the budget.
        ridge: λ of `noise_variance`.
        relative: whether σ² is relative to the trace (see `noise_variance`).

    Returns:
        Indices of the kept items in ascending order, long, [..., budget].

    Raises:
        TypeError: an input has the wrong type or dtype.
        ValueError: as for `select_by_leverage`, or the ridge is so small that w ‖u‖² / σ² overflows.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.6]])
        >>> select_greedy(vectors, None, 2)
        tensor([0, 2])

    """
    check_ridge(ridge)
    vectors = check_vectors(vectors)
    candidates, protected = _check_candidates(vectors.shape[:-1], vectors.device, budget, valid, protected)
    items = WeightedSet.from_vectors(vectors, weights, valid, relative, torch.float64)
    noise = noise_variance(items.gram, ridge, relative)
    rows = (items.rows / noise.sqrt()[..., None, None]).reshape(-1, *vectors.shape[-2:])  # √w u / σ [b, n, d]
    if not torch.linalg.vector_norm(rows, dim=-1).isfinite().all():
        raise ValueError(f"ridge must leave w ‖u‖² / σ² within the range of torch.float64, got {ridge}")

    pending = protected.reshape(rows.shape[:-1]).clone()  # [b, n], protected items that are not selected yet
    closed = ~candidates.reshape(rows.shape[:-1])  # [b, n], items that are invalid or selected
    batch = torch.arange(len(rows), device=rows.device)
    for _ in range(budget):
        norm = torch.linalg.vector_norm(rows, dim=-1)  # [b, n]; the gain in capacity is ½ log(1 + norm²)
        best = norm.masked_fill(closed, -torch.inf).masked_fill(pending, torch.inf).argmax(-1)  # [b]
        closed[batch, best], pending[batch, best] = True, False
        # Multiply the rows by (I + xxᵀ)^(-1/2), with x the selected row. The square root loses half as many digits as
        # A⁻¹, and norms stay real, so the selection is sound even if σ² is below the rounding error of G.
        row = rows[batch, best].unsqueeze(-2)  # x [b, 1, d]
        root = (1 + row.square().sum(-1, keepdim=True)).sqrt()  # [b, 1, 1]
        rows.addcmul_((row @ rows.mT).mT, row / (root * (root + 1)), value=-1)
    return _mask_to_indices(closed.reshape(candidates.shape) & candidates, budget)


def _check_candidates(
    shape: torch.Size, device: torch.device, budget: int, valid: Tensor | None, protected: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Check that the budget fits, and return the masks of the valid and of the protected items, [..., n] each."""
    check_int("budget", budget, 1, shape[-1])
    if valid is None:
        valid = torch.ones(shape, dtype=torch.bool, device=device)
    else:
        valid = check_mask("valid", valid, shape, device)
        if (num_valid := int(valid.sum(-1).min())) < budget:
            raise ValueError(f"budget must be at most the number of valid items, {num_valid}, got {budget}")
    if protected is None:
        protected = torch.zeros(shape, dtype=torch.bool, device=device)
    else:
        protected = check_mask("protected", protected, shape, device)
        if num_invalid := int((protected & ~valid).sum()):
            raise ValueError(f"protected must mark valid items only, got {num_invalid} that are not valid")
        if (num_protected := int(protected.sum(-1).max())) > budget:
            raise ValueError(f"budget must be at least the number of protected items, {num_protected}, got {budget}")
    return valid, protected


def _top_mask(scores: Tensor, count: Tensor, valid: Tensor, protected: Tensor) -> Tensor:
    """Return the mask [..., n] of the `count` [..., 1] items that rank first.

    Protected items rank before all others, then items with higher scores, then items at earlier positions.
    """
    limit = torch.finfo(working_dtype(scores.dtype)).max
    key = scores.to(working_dtype(scores.dtype)).clamp(-limit, limit)
    key = key.masked_fill(~valid, -torch.inf).masked_fill(protected, torch.inf)
    threshold = key.topk(int(count.max()), dim=-1).values.gather(-1, count - 1)
    above, tied = key > threshold, key == threshold
    num_tied_kept = count - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= num_tied_kept))


def _mask_to_indices(mask: Tensor, count: int) -> Tensor:
    """Return the positions [..., count] of the true entries of a mask [..., n] with `count` of them in each row."""
    return mask.nonzero()[:, -1].reshape(*mask.shape[:-1], count)
