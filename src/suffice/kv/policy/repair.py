"""Repair of kept entries: weights and values with which they replace all entries (Attention Matching, 2602.16284).

An eviction removes the evicted entries' share of the attention. The repair gives each kept entry j a weight w_j ≥ 0,
whose log is added to the logit, and a new value. Both are fitted to the attention of reference queries, which are the
prompt's own queries, moved to the positions right behind the prompt, and the last queries where they are. A part of
them is held out: it decides how far values may move, and whether the head keeps the repair at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.kv.policy.attention_stats import AttentionStats

MIN_QUERIES = 8
"""Smallest number of queries of a row from which a repair is fitted."""
NUM_QUERIES = 128
"""Number of queries, evenly spaced over the prompt, that are moved behind it."""
WINDOW = 32
"""Number of last queries that are used where they are."""
WINDOW_WEIGHT = 4.0
"""Weight of each of the last queries. That of the others is 1."""
HELD_OUT = 4
"""One of so many queries is held out."""
NUM_UPDATES = 12
"""Number of updates of the weights. More of them fit the queries better and later queries worse."""
MAX_BIAS = 1.0
"""Largest absolute value of a log weight. Larger ones fit the queries better and questions that follow worse."""
RIDGES = (0.01, 0.1, 1.0)
"""Strengths with which new values are pulled towards the old ones, relative to the mean diagonal of their matrix."""
MARGIN = 0.05
"""A head keeps its repair if it lowers the held-out error by at least this share."""

_BLOCK = 8192  # number of entries whose logits are in memory at a time
_LOWEST = -1e30  # below all logits; finite, so that a query that reads no entry does not get NaN


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
    """Queries of one row by which its heads are repaired. The held-out ones come last.

    Args:
        queries: float32 [references, heads, head_dim].
        last_position: position of the last entry that each query reads, long [references].
        weights: weight of each query, float32 [references].
        num_held_out: number of queries that are held out.

    """

    queries: Tensor
    last_position: Tensor
    weights: Tensor
    num_held_out: int


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
    counts, num_valid = (kept >= 0).sum(-1).tolist(), stats.num_valid.tolist()
    for row in range(stats.batch_size):
        references = _select_references(stats, row)
        for head in range(stats.num_key_value_heads):
            count = counts[row][head]
            if references is None or not 0 < count < num_valid[row][head]:
                continue
            index = kept[row, head, -count:]
            fit = _HeadFit(stats, row, head, index, references)
            own_values, own_bias, errors[row, head] = fit.best(refit_values)
            values[row, head, index] = own_values.to(values.dtype)
            logit_bias[row, head, index] += own_bias
    return Repair(values, logit_bias, errors)


def _select_references(stats: AttentionStats, row: int) -> _References | None:
    """Return the reference queries of a row; None if it has too few queries."""
    positions = stats.query_positions[row]
    index = torch.arange(stats.num_queries, device=stats.device)
    if stats.valid_queries is not None:
        index = index[stats.valid_queries[row]]
    if len(index) < MIN_QUERIES:
        return None
    sampled = index[torch.linspace(0, len(index) - 1, min(NUM_QUERIES, len(index)), device=stats.device).round().long()]
    window = index[-WINDOW:]
    queries = stats.queries[row : row + 1, :, sampled].float()
    last = positions[sampled]
    if stats.can_move_queries:
        target = stats.num_seen[row] + torch.arange(len(sampled), device=stats.device)
        if stats.rotary is not None:
            queries = stats.rotary.rotate(queries, (target - last)[None, None])
        last = target
    weights = torch.ones(len(sampled) + len(window), device=stats.device)
    weights[len(sampled) :] = WINDOW_WEIGHT
    queries = torch.cat((queries[0], stats.queries[row, :, window].float()), dim=1).transpose(0, 1)
    last = torch.cat((last, positions[window]))
    is_held_out = torch.arange(len(last)) % HELD_OUT == HELD_OUT - 1
    order = is_held_out.long().argsort(stable=True).to(stats.device)
    return _References(queries[order], last[order], weights[order], int(is_held_out.sum()))


class _HeadFit:
    """The fit of the kept entries of one row and KV head.

    Args:
        stats: statistics of the attention call over all entries.
        row: index of the row.
        head: index of the KV head.
        index: indices of the kept entries, long [kept].
        references: reference queries of the row.

    """

    def __init__(self, stats: AttentionStats, row: int, head: int, index: Tensor, references: _References) -> None:
        self._stats, self._row, self._head, self._references = stats, row, head, references
        group = stats.num_key_value_groups
        self._dtype, self._values = stats.values.dtype, stats.values[row, head, index].float()
        bias = stats.logit_bias
        self._earlier = torch.zeros(len(index), device=index.device) if bias is None else bias[row, head, index]
        largest, total, outputs = self._read_all_entries()
        self._shares = self._logits(index).sub_(largest).exp_().div_(total)
        # Exponential of the attention sink, relative to the sum of those of all entries.
        self._sinks = torch.zeros_like(total)
        if stats.sink_logits is not None:
            own = stats.sink_logits[head * group : (head + 1) * group].float()
            self._sinks = (own.repeat(len(references.weights))[:, None] - largest).exp() / total
        self._targets = outputs / (1 + self._sinks)
        self._weights = references.weights.repeat_interleave(group)
        num_fitted = (len(references.weights) - references.num_held_out) * group
        self._fitted, self._held_out = slice(num_fitted), slice(num_fitted, None)

    def _logits(self, entries: Tensor | slice) -> Tensor:
        """Return the logits of some entries, [queries, entries]; −∞ for entries that a query does not read."""
        stats, row, head, group = self._stats, self._row, self._head, self._stats.num_key_value_groups
        queries = self._references.queries[:, head * group : (head + 1) * group].flatten(0, 1)
        logits = stats.cap_logits(queries @ stats.keys[row, head, entries].float().mT * stats.scaling)
        if stats.logit_bias is not None:
            logits += stats.logit_bias[row, head, entries]
        positions = stats.positions[row, min(head, stats.positions.shape[1] - 1), entries]
        is_read = (positions >= 0) & (positions <= self._references.last_position[:, None])
        logits.view(-1, group, len(positions)).masked_fill_(~is_read[:, None], -torch.inf)
        return logits

    def _read_all_entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Read all entries, block by block, so that the memory does not grow with their number.

        Returns:
            The largest logit of each query and the sum of the exponentials of all logits minus the largest one,
            [queries, 1] each, and the output without an attention sink, [queries, value_dim].

        """
        values = self._stats.values[self._row, self._head]
        num_queries = len(self._references.weights) * self._stats.num_key_value_groups
        largest = torch.full((num_queries, 1), _LOWEST, device=values.device)
        total, outputs = torch.zeros_like(largest), torch.zeros(num_queries, values.shape[-1], device=values.device)
        for start in range(0, len(values), _BLOCK):
            block = slice(start, start + _BLOCK)
            logits = self._logits(block)
            new_largest = torch.maximum(largest, logits.amax(-1, keepdim=True))
            decay, largest = (largest - new_largest).exp(), new_largest
            shares = logits.sub_(largest).exp_()
            total = total * decay + shares.sum(-1, keepdim=True)
            outputs = (outputs * decay).addmm_(shares, values[block].float())
        total = total.clamp_min(torch.finfo(total.dtype).tiny)
        return largest, total, outputs / total

    def best(self, refit_values: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the values [kept, value_dim], what to add to the logits [kept], and the errors [2]."""
        unchanged = torch.ones_like(self._earlier)
        weights = self._fit_weights(self._fitted)
        held_out = self._attention(weights, self._held_out)
        ridges = (None, *RIDGES) if refit_values else (None,)
        before = self._error(self._attention(unchanged, self._held_out), self._values)
        errors = [
            self._error(held_out, self._values),
            *(self._error(held_out, values) for values in self._fit_values(weights, self._fitted, ridges[1:])),
        ]
        after, number = torch.stack(errors).nan_to_num(torch.inf, torch.inf).min(0)
        if not bool(after <= before * (1 - MARGIN) ** 2):
            values, weights, after = self._values, unchanged, before
        else:
            # The strength of the ridge is known now, so that the held-out queries can be fitted too.
            ridge, rows = ridges[int(number)], slice(None)
            weights = self._fit_weights(rows)
            if ridge is None:
                values = self._values
            else:
                values = next(self._fit_values(weights, rows, (ridge,)))
                values = torch.where(values.isfinite(), values, self._values)
        return values, weights.log(), torch.stack((before, after)).div(self._size_of_targets).sqrt()

    def _attention(self, weights: Tensor, rows: slice) -> Tensor:
        """Return the attention of some queries over the weighted kept entries."""
        shares = self._shares[rows] * weights
        total = shares.sum(-1, keepdim=True).add_(self._sinks[rows])
        return shares.div_(total.clamp_min_(torch.finfo(total.dtype).tiny))

    def _error(self, attention: Tensor, values: Tensor) -> Tensor:
        """Return the error of the outputs of the held-out queries."""
        errors = torch.addmm(self._targets[self._held_out], attention, values, beta=-1)
        return errors.square_().sum(-1) @ self._weights[self._held_out]

    @property
    def _size_of_targets(self) -> Tensor:
        sizes = self._targets[self._held_out].square().sum(-1) @ self._weights[self._held_out]
        return sizes.clamp_min(torch.finfo(sizes.dtype).tiny)

    def _fit_weights(self, rows: slice) -> Tensor:
        """Return weights of the kept entries with which their shares of some queries' attention sum to about 1, [kept].

        The weights minimize the weighted sum of squares of 1 − Σ w p over the queries. Multiplicative updates keep them
        positive.
        """
        shares, importance = self._shares[rows], self._weights[rows]
        lowest, highest = ((sign * MAX_BIAS - self._earlier).exp() for sign in (-1, 1))
        tiny = torch.finfo(shares.dtype).tiny
        shares = shares * importance.sqrt()[:, None]
        goal = shares.mT @ importance.sqrt()
        is_small = shares.shape[1] < shares.shape[0]
        gram = shares.mT @ shares if is_small else shares
        weights = torch.ones_like(self._earlier)
        for _ in range(NUM_UPDATES):
            product = gram @ weights if is_small else shares.mT @ (shares @ weights)
            weights = (weights * goal).div_(product.clamp_min_(tiny))
            weights = torch.minimum(torch.maximum(weights, lowest), highest)
        return weights

    def _fit_values(self, weights: Tensor, rows: slice, ridges: Sequence[float]) -> Iterator[Tensor]:
        """Return values fitted to some queries, [kept, value_dim], for each strength of the ridge."""
        scale = self._weights[rows].sqrt()[:, None]
        attention = self._attention(weights, rows)
        errors = torch.addmm(self._targets[rows], attention, self._values, alpha=-1).mul_(scale)
        attention.mul_(scale)
        is_dual = attention.shape[0] < attention.shape[1]
        gram = attention @ attention.mT if is_dual else attention.mT @ attention
        size = gram.diagonal().sum() / len(self._values)  # mean diagonal of the matrix of the entries
        projected = errors if is_dual else attention.mT @ errors
        added = 0.0
        for ridge in ridges:
            gram.diagonal().add_(ridge * size - added)
            added = ridge * size
            change = torch.cholesky_solve(projected, torch.linalg.cholesky_ex(gram)[0])
            values = self._values + (attention.mT @ change if is_dual else change)
            yield values.to(self._dtype).float()  # infinite values in a short dtype have an infinite error
