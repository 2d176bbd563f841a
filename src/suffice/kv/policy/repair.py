"""Repair of kept entries: weights and values with which they replace all entries (Attention Matching, 2602.16284).

An eviction removes the evicted entries' share of the attention. The repair gives each kept entry j a weight w_j ≥ 0,
whose log is added to the logit, and a new value. Both are fitted to the attention of reference queries, which are the
prompt's own queries, moved to the positions right behind the prompt, and the last queries where they are. A part of
them is held out: it decides how far values may move, and whether the head keeps the repair at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.gpu import async_tensor
from suffice.kv.attention.softmax import softmax_with_sinks
from suffice.kv.policy.attention_stats import AttentionStats

MIN_QUERIES = 8
"""Smallest number of queries of a row from which a repair is fitted."""
NUM_QUERIES = 64
"""Number of queries, evenly spaced over the prompt, that are moved behind it."""
WINDOW = 16
"""Number of last queries that are used where they are."""
NUM_REMEMBERED = 128
"""Number of last queries that a cache remembers for later evictions."""
WINDOW_WEIGHT = 4.0
"""Weight of each of the last queries. That of the others is 1."""
HELD_OUT = 4
"""One of so many queries is held out."""
NUM_UPDATES = 6
"""Number of updates of the weights. More of them fit the queries better and later queries worse."""
MAX_BIAS = 1.0
"""Largest absolute value of a log weight. Larger ones fit the queries better and questions that follow worse."""
RIDGES = (0.03, 0.3)
"""Strengths with which new values are pulled towards the old ones, relative to the mean diagonal of their matrix."""
MARGIN = 0.05
"""A head keeps its repair if it lowers the held-out error by at least this share."""

_BLOCK = 2**24  # number of logits that are in memory at a time


@dataclass(frozen=True)
class Repair:
    """Repaired entries of a layer.

    Args:
        values: the values of all entries, with new ones of repaired entries, shaped like the values.
        logit_bias: what is added to the logits of all entries, float32 [batch, num_key_value_heads, entries].
        errors: relative error of the output of the held-out queries before and after the repair, float32 [batch,
            num_key_value_heads, 2]. Both are equal if a head does not keep its repair, and NaN if none was fitted.

    """

    values: Tensor
    logit_bias: Tensor
    errors: Tensor


@dataclass(frozen=True)
class _References:
    """Queries by which the heads are repaired: those of all query heads of a KV head. The held-out ones come last.

    Args:
        queries: multiplied by the scaling, float32 [batch, num_key_value_heads, references, head_dim].
        last_position: position of the last entry that each query reads, long [batch, references].
        weights: weight of each query, float32 [batch, references]; 0 for slots without a query.
        num_fitted: number of queries that are not held out.
        num_partly_read: number of last entries that not every query reads; all read the earlier ones.
        is_enough: whether a row has enough queries, bool [batch].

    """

    queries: Tensor
    last_position: Tensor
    weights: Tensor
    num_fitted: int
    num_partly_read: int
    is_enough: Tensor


def repair_entries(stats: AttentionStats, kept: Tensor, *, refit_values: bool = True) -> Repair:
    """Fit weights and values of kept entries, of each row and head on its own.

    Args:
        stats: statistics of the attention call over all entries.
        kept: indices of the kept entries, long [batch, num_key_value_heads, width], ascending; −1 in empty slots.
        refit_values: False to fit the weights only.

    """
    logit_bias = torch.zeros(*kept.shape[:2], stats.num_entries, device=stats.device)
    if stats.logit_bias is not None:
        logit_bias += stats.logit_bias
    values = stats.values.clone()
    errors = torch.full((*kept.shape[:2], 2), torch.nan, device=stats.device)
    references = _select_references(stats)
    counts = (kept >= 0).sum(-1)
    is_fitted = (counts > 0) & (counts < stats.counts) & references.is_enough[:, None]
    for heads, width in _parts(counts, is_fitted, kept.shape[-1]):
        fit = _Fit(stats, kept[..., kept.shape[-1] - width :], heads, references)
        own_values, own_bias, own_errors = fit.best(is_fitted[heads].flatten(), refit_values)
        index = fit.index.view(*errors[heads].shape[:2], -1)
        own_values = own_values.view(*index.shape, -1)
        values[heads].scatter_(2, index[..., None].expand_as(own_values), own_values)
        logit_bias[heads].scatter_(2, index, own_bias.view(index.shape))
        errors[heads] = own_errors.view(*index.shape[:2], 2)
    return Repair(values, logit_bias, errors)


def _parts(counts: Tensor, is_fitted: Tensor, width: int) -> Iterator[tuple[tuple[slice, slice], int]]:
    """Return which rows and heads of a layer are fitted together, and the largest number of their kept entries.

    On a CPU, each head is fitted on its own, without padding. On other devices, all heads are fitted in one batch: the
    number of kernels does not depend on the number of heads, and the host does not wait for the counts.
    """
    if counts.device.type != "cpu":
        yield (slice(None), slice(None)), width
        return
    for (row, head), count in zip(is_fitted.nonzero().tolist(), counts[is_fitted].tolist(), strict=True):
        yield (slice(row, row + 1), slice(head, head + 1)), count


def _select_references(stats: AttentionStats) -> _References:
    """Return the reference queries of all rows."""
    num_queries, group, device = stats.num_queries, stats.num_key_value_groups, stats.device
    num_sampled, num_window = min(NUM_QUERIES, num_queries), min(WINDOW, num_queries)
    if stats.valid_queries is None:
        num_valid = torch.full((stats.batch_size, 1), num_queries, device=device)
    else:
        num_valid = stats.valid_queries.sum(-1, keepdim=True)
    # The valid queries are the last ones. Indices are rounded to the nearest integer.
    step, last_step = torch.arange(num_sampled, device=device), num_valid.clamp(1, num_sampled) - 1
    index = (2 * step * (num_valid - 1) + last_step) // (2 * last_step).clamp_min(1) + num_queries - num_valid
    window = torch.arange(num_queries - num_window, num_queries, device=device).expand(stats.batch_size, -1)
    weights = torch.cat((step <= last_step, (window >= num_queries - num_valid) * WINDOW_WEIGHT), dim=1)
    index = torch.cat((index.clamp(0, num_queries - 1), window), dim=1)

    gathered = index[:, None, :, None].expand(-1, stats.queries.shape[1], -1, stats.head_dim)
    queries, last = stats.queries.gather(2, gathered).float(), stats.query_positions.gather(1, index)
    if stats.can_move_queries:
        target = stats.num_seen[:, None] + step
        if stats.rotary is not None:
            moved = stats.rotary.rotate(queries[:, :, :num_sampled], (target - last[:, :num_sampled])[:, None])
            queries = torch.cat((moved, queries[:, :, num_sampled:]), dim=2)
        last = torch.cat((target, last[:, num_sampled:]), dim=1)

    # Queries of the window are numbered from its end, so that padding does not change which ones are held out.
    numbers = [*range(num_sampled), *range(WINDOW - num_window, WINDOW)]
    is_held_out = [number % HELD_OUT == HELD_OUT - 1 for number in numbers]
    order = async_tensor(sorted(range(len(numbers)), key=is_held_out.__getitem__), device)
    queries = stats.group_heads(queries * stats.scaling).index_select(3, order).transpose(2, 3).flatten(2, 3)
    last, weights = (x.index_select(1, order).repeat_interleave(group, 1) for x in (last, weights))
    return _References(
        queries,
        last,
        weights,
        num_fitted=is_held_out.count(False) * group,
        num_partly_read=min(num_window if stats.can_move_queries else num_queries, stats.num_entries),
        is_enough=num_valid[:, 0] >= MIN_QUERIES,
    )


class _Fit:
    """The fit of the kept entries of some heads. The first axis of all tensors is that of rows and heads.

    Shares and outputs of each query are multiplied by the root of its weight.

    Args:
        stats: statistics of the attention call over all entries.
        kept: indices of the kept entries, long [batch, num_key_value_heads, width], ascending; −1 in empty slots.
        heads: which rows and heads are fitted.
        references: reference queries.

    Attributes:
        index: indices of the kept entries, long [fitted heads, width]. An empty slot has that of the last one.

    """

    def __init__(
        self, stats: AttentionStats, kept: Tensor, heads: tuple[slice, slice], references: _References
    ) -> None:
        self._stats, self._heads, self._num_fitted = stats, heads, references.num_fitted
        kept = self._of_heads(kept)
        self._is_empty = kept < 0
        self.index = torch.where(self._is_empty, kept[:, -1:], kept).clamp_min_(0)
        self._scale = self._of_heads(references.weights[:, None, :, None]).sqrt()
        self._earlier = torch.zeros(kept.shape, device=kept.device)
        if stats.logit_bias is not None:
            self._earlier = self._of_heads(stats.logit_bias).gather(1, self.index)
        values = self._of_heads(stats.values).float()
        self._values = values.gather(1, self.index[..., None].expand(-1, -1, values.shape[-1]))
        shares, totals, outputs = self._read_all_entries(values, references)
        self._shares, self._targets, self._sinks = shares.mul_(self._scale), outputs.mul_(self._scale), None
        if totals is not None:  # shares without the attention sinks, and what the sinks would add to their sum
            totals = totals.clamp_min_(torch.finfo(totals.dtype).tiny)
            self._shares /= totals
            self._sinks = (1 - totals) / totals * self._scale

    def _of_heads(self, x: Tensor) -> Tensor:
        """Select the heads of x [batch, 1 or num_key_value_heads, ...]; rows and heads become one axis."""
        return x.expand(-1, self._stats.num_key_value_heads, *x.shape[2:])[self._heads].flatten(0, 1)

    def _read_all_entries(self, values: Tensor, references: _References) -> tuple[Tensor, Tensor | None, Tensor]:
        """Read all entries, with some of the queries at a time, so that the memory does not grow with their number.

        Returns:
            The shares of the kept entries in the attention of each query, [heads, queries, width], those of all entries
            together, [heads, queries, 1], or None without attention sinks, and the outputs of the queries, [heads,
            queries, value_dim]. All are 0 for a query that reads no entry.

        """
        stats = self._stats
        keys, queries = self._of_heads(stats.keys).float(), self._of_heads(references.queries)
        bias = None if stats.logit_bias is None else self._of_heads(stats.logit_bias)[:, None]
        is_empty = None if stats.valid is None else ~self._of_heads(stats.valid)[:, None]
        positions = self._of_heads(stats.positions[..., stats.num_entries - references.num_partly_read :])[:, None]
        last = self._of_heads(references.last_position[:, None, :, None])
        sinks = stats.sink_logits
        if sinks is not None:
            sinks = self._of_heads(stats.group_heads(sinks.float()[None]).expand(stats.batch_size, -1, -1))
            sinks = sinks.repeat(1, queries.shape[1] // stats.num_key_value_groups)[..., None]
        shares: list[Tensor] = []
        totals: list[Tensor] = []
        outputs: list[Tensor] = []
        size = max(1, _BLOCK // (keys.shape[0] * keys.shape[1]))
        for start in range(0, queries.shape[1], size):
            part = slice(start, start + size)
            logits = stats.cap_logits(torch.bmm(queries[:, part], keys.mT))
            if bias is not None:
                logits += bias
            if is_empty is not None:
                logits.masked_fill_(is_empty, -torch.inf)
            logits[..., -positions.shape[-1] :].masked_fill_(positions > last[:, part], -torch.inf)
            weights = logits.softmax(-1) if sinks is None else softmax_with_sinks(logits, sinks[:, part])
            shares.append(weights.gather(2, self.index[:, None].expand(-1, weights.shape[1], -1)))
            outputs.append(torch.bmm(weights, values))
            if sinks is not None:
                totals.append(weights.sum(-1, keepdim=True))
        # The softmax of a query that reads no entry is NaN.
        of_kept = torch.cat(shares, dim=1).masked_fill_(self._is_empty[:, None], 0.0).nan_to_num_(0.0)
        return of_kept, torch.cat(totals, dim=1) if totals else None, torch.cat(outputs, dim=1).nan_to_num_(0.0)

    def best(self, is_fitted: Tensor, refit_values: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the kept entries as they are after the repair.

        Args:
            is_fitted: whether a head can be repaired, bool [heads].
            refit_values: False to fit the weights only.

        Returns:
            Values [heads, width, value_dim] in their dtype, numbers to add to the logits, [heads, width], and errors
            before and after the repair, [heads, 2].

        """
        held_out, dtype = slice(self._num_fitted, None), self._stats.values.dtype
        weights = self._fit_weights()
        before = _sum_of_squares(self._read_kept(None, held_out)[-1])
        if refit_values:
            values, after = self._fit_values(weights)
        else:
            values, after = self._values, _sum_of_squares(self._read_kept(weights, held_out)[-1])
        values = values.to(dtype)
        is_better = is_fitted & (after <= before * (1 - MARGIN) ** 2) & values.isfinite().all(2).all(1)
        # An empty slot has the same results as the entry whose index it has.
        values = torch.where(is_better[:, None, None], values, self._values.to(dtype))
        values = torch.where(self._is_empty[..., None], values[:, -1:], values)
        bias = self._earlier + torch.where(is_better[:, None], weights[..., 0].log(), 0.0)
        bias = torch.where(self._is_empty, bias[:, -1:], bias)
        size = _sum_of_squares(self._targets[:, held_out]).clamp_min_(torch.finfo(before.dtype).tiny)
        errors = torch.stack((before, torch.where(is_better, after, before)), dim=1).div_(size[:, None]).sqrt_()
        return values, bias, torch.where(is_fitted[:, None], errors, torch.nan)

    def _read_kept(self, weights: Tensor | None, queries: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Read the weighted kept entries; without weights, as they are.

        Returns:
            The shares of some queries times the weights, [heads, queries, width], the factor with which they become
            the attention of the queries, [heads, queries, 1], and the errors of the outputs with the present values,
            [heads, queries, value_dim].

        """
        shares = self._shares[:, queries]
        if weights is not None:
            shares = shares * weights.mT
        total = shares.sum(-1, keepdim=True)
        if self._sinks is not None:
            total += self._sinks[:, queries]
        # The factor of a query that reads no kept entry is 0.
        factor = torch.where(total > torch.finfo(total.dtype).tiny, self._scale[:, queries] / total, 0.0)
        return shares, factor, self._targets[:, queries] - torch.bmm(shares, self._values).mul_(factor)

    def _fit_weights(self) -> Tensor:
        """Return weights with which the kept entries' shares of the attention sum to about 1, [heads, width, 1].

        They minimize the weighted sum of squares of 1 − Σ w p over the queries. Multiplicative updates keep them
        positive. An entry that no query reads keeps a weight of 1.
        """
        shares = self._shares[:, : self._num_fitted]
        shares_of_entries = shares.mT
        lowest, highest = ((sign * MAX_BIAS - self._earlier[..., None]).exp_() for sign in (-1, 1))
        tiny = shares.new_full((), torch.finfo(shares.dtype).tiny)
        goal = torch.baddbmm(tiny, shares_of_entries, self._scale[:, : self._num_fitted])
        weights = torch.ones_like(goal)
        for _ in range(NUM_UPDATES):
            product = torch.baddbmm(tiny, shares_of_entries, torch.bmm(shares, weights))
            weights.mul_(goal).div_(product).clamp_(lowest, highest)
        return weights

    def _fit_values(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Fit the values by a ridge regression, whose strength is chosen by the held-out queries.

        Returns:
            Values that are fitted to all queries, [heads, width, value_dim], and the error of the outputs of the
            held-out queries with values that are fitted to the others, [heads].

        """
        shares, factor, errors = self._read_kept(weights, slice(None))
        fitted, held_out = slice(self._num_fitted), slice(self._num_fitted, None)
        is_dual = shares.shape[1] < shares.shape[2]
        if is_dual:
            matrix = torch.bmm(shares, shares.mT).mul_(factor).mul_(factor.mT)
            goal, fitted_matrix, fitted_goal = errors, matrix[:, fitted, fitted], errors[:, fitted]
            readers = matrix[:, held_out, fitted]
        else:
            attention = shares.mul_(factor)
            readers, of_fitted = attention[:, held_out], attention[:, fitted]
            fitted_matrix, fitted_goal = of_fitted.mT @ of_fitted, of_fitted.mT @ errors[:, fitted]
            matrix = torch.baddbmm(fitted_matrix, readers.mT, readers)
            goal = torch.baddbmm(fitted_goal, readers.mT, errors[:, held_out])
        # Ridges are relative to the mean diagonal of the matrix of the entries.
        ridges = async_tensor(RIDGES, shares.device) / (~self._is_empty).sum(-1).clamp_min_(1)[:, None]
        changes = _solve_ridges(fitted_matrix, fitted_goal, ridges)
        left = errors[:, None, held_out] - readers[:, None] @ changes
        all_errors = torch.cat((errors[:, None, held_out], left), dim=1).square_().sum((2, 3))
        after, number = all_errors.nan_to_num_(torch.inf, torch.inf).min(1, keepdim=True)
        # The strength of the ridge is known now, so that the held-out queries can be fitted too.
        change = _solve_ridges(matrix, goal, ridges.gather(1, (number - 1).clamp_min(0)))[:, 0]
        if is_dual:
            change = shares.mT @ change.mul_(factor)
        return torch.where(number[..., None] > 0, self._values + change, self._values), after[:, 0]


def _solve_ridges(matrix: Tensor, goal: Tensor, ridges: Tensor) -> Tensor:
    """Return (A + r tr(A) I)⁻¹ B for several r, [heads, ridges, n, columns].

    Args:
        matrix: A, symmetric and positive semidefinite, [heads, n, n].
        goal: B, [heads, n, columns].
        ridges: r, [heads, ridges].

    """
    trace = matrix.diagonal(dim1=1, dim2=2).sum(-1, keepdim=True)
    matrices = matrix[:, None].repeat(1, ridges.shape[1], 1, 1)
    matrices.diagonal(dim1=2, dim2=3).add_((ridges * trace)[..., None])
    factor = torch.linalg.cholesky_ex(matrices)[0]
    half = torch.linalg.solve_triangular(factor, goal[:, None], upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def _sum_of_squares(x: Tensor) -> Tensor:
    """Return the sum of the squares of each head of x [heads, queries, dim]."""
    return x.square().sum((1, 2))
