"""Weights from what future queries are expected to be: their mean, or a Gaussian."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.information import psd_cholesky
from suffice.information.weighted_set import CHUNK_SIZE
from suffice.kv.policy.attention_stats import Signals
from suffice.kv.policy.weights.base import Weights


class FromQueries(Weights):
    """Base of weights from the newest queries, or from all that were ever asked, older ones counting less."""

    recent: int | None
    half_life: float | None

    def __post_init__(self) -> None:
        if self.half_life is not None and not 0 < self.half_life < math.inf:
            raise ValueError(f"half_life is {self.half_life}; accepted: a positive number of tokens, or None")

    @property
    def observed(self) -> int | None:
        """The newest `recent`; all where that is None, or with a half-life."""
        return self.recent if self.half_life is None else None

    @property
    def remembers(self) -> bool:
        """With a half-life."""
        return self.half_life is not None


@dataclass(frozen=True)
class MeanQuery(FromQueries):
    """w = exp(τ k·μ/√d), μ the mean of the newest `recent` queries over the GQA group (2604.25975, Eq. 8).

    The paper writes exp(τ k·μ); the factor 1/√d of attention is kept here because without it the weights
    overflow float32 in most heads.

    Args:
        tau: temperature τ.
        recent: number of newest queries; None takes all.
        half_life: take the mean over all queries instead, the weight of each halved with every so many tokens.

    """

    tau: float = 1.0
    recent: int | None = 64
    half_life: float | None = None

    def log(self, signals: Signals) -> Tensor:
        """Return τ k·μ/√d."""
        if self.half_life is not None:
            mean = signals.grouped(signals.query_moments(self.half_life).mean).mean(2)
        else:
            recent = min(self.recent or signals.queries.shape[2], signals.queries.shape[2])
            queries = signals.grouped(signals.queries[:, :, -recent:].float()).mean(2)
            if signals.asked is None:
                mean = queries.mean(2)
            else:
                asked = signals.asked[:, None, -recent:, None]
                mean = (queries * asked).sum(2) / asked.sum(2).clamp_min(1)
        return (signals.keys32 @ mean[..., None]).squeeze(-1) * (self.tau * signals.scaling)

    def __str__(self) -> str:
        return f"exp({self.tau:g} k·μ/√d)"


@dataclass(frozen=True)
class ExpectedAttention(FromQueries):
    """Attention expected from future queries, taken as Gaussian: exp(k·μ/√d + kᵀΣk/2d) (2510.00636).

    Args:
        future: number of coming positions over which the rotary embedding is averaged; 0 takes mean and
            covariance of the queries as they are, rotated at their own positions.
        recent: estimate mean and covariance from this many last queries; None takes all.
        half_life: estimate them from all queries instead, the weight of each halved with every so many tokens;
            with `diagonal` only.
        pooled: one Gaussian for the queries of a GQA group together, instead of one for each query head
            and their mean attention. A group of g costs a g-th.
        diagonal: take the dimensions of a query as independent, so that kᵀΣk needs no product of matrices;
            with queries as they are (`future=0`) only.
        skip: first tokens, whose queries and keys are outliers, left out of the statistics.

    """

    future: int = 512
    recent: int | None = None
    pooled: bool = False
    diagonal: bool = False
    skip: int = 4
    half_life: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.half_life is not None and not self.diagonal:
            raise ValueError(f"half_life is {self.half_life} with diagonal=False; accepted: with diagonal=True")
        if self.diagonal and self.future:
            raise ValueError(f"diagonal is True with future={self.future}; accepted: future=0, as rotation mixes pairs")

    def log(self, signals: Signals) -> Tensor:
        """Return the log of the expected attention, averaged over the GQA group."""
        mean, covariance = self._statistics(signals)  # [batch, kv_heads, gaussians, dim, (dim)]
        keys, scale = signals.keys32, signals.scaling
        if self.diagonal:
            spread = torch.cat([part.square() @ covariance.mT for part in keys.split(CHUNK_SIZE, dim=2)], dim=2)
        else:
            # kᵀΣk = ‖kL‖²: one product [tokens, dim] x [dim, gaussians * dim] for all of them.
            # A single query has no covariance, and a matrix of zeros no factor.
            least = torch.finfo(covariance.dtype).tiny * torch.eye(signals.dim, device=signals.device)
            root = psd_cholesky(covariance + least).movedim(2, 3).flatten(3, 4)
            spread = (keys @ root).unflatten(-1, (-1, signals.dim)).norm(dim=-1).square_()
        logits = (keys @ (mean.mT * scale)).add_(spread, alpha=scale * scale / 2)
        if logits.shape[-1] == 1:
            return logits.squeeze(-1)
        # Normalised for each query head, over the tokens that are not sinks, before the group is averaged.
        left_out = signals.positions < self.skip
        left_out = left_out & (signals.counts > self.skip)[..., None] | (signals.positions < 0)
        inner = logits.masked_fill(left_out[..., None], float("-inf"))
        return (logits - inner.logsumexp(2, keepdim=True)).logsumexp(-1)

    def _statistics(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """Mean [batch, kv_heads, gaussians, dim] of future queries; covariance [..., dim, dim] or its diagonal."""
        if self.half_life is not None:
            moments = signals.query_moments(self.half_life)
            return self._over_group(signals, moments.mean, moments.square)
        count = min(self.recent or signals.queries.shape[2], signals.queries.shape[2])
        queries = signals.unrotated_queries(count) if self.future else signals.queries[:, :, -count:].float()
        positions = signals.query_positions[:, -count:]
        asked = positions >= self.skip
        # A row with nothing but first tokens has no better statistics than theirs.
        asked = torch.where(asked.any(-1, keepdim=True), asked, positions >= 0)
        if self.diagonal:
            return self._diagonal(signals, queries, asked)
        queries = signals.grouped(queries)
        if self.pooled:
            queries = queries.flatten(2, 3)[:, :, None]
            asked = asked.repeat(1, signals.group)
        share = (asked / asked.sum(-1, keepdim=True).clamp_min(1))[:, None, None, :, None]
        mean = (queries * share).sum(3)
        centred = (queries - mean[:, :, :, None]) * share.sqrt()
        covariance = centred.mT @ centred
        rotation = signals.mean_rotation(self.future)
        if rotation is not None:
            turn = rotation[:, None, None]
            mean = (turn @ mean[..., None]).squeeze(-1)
            covariance = turn @ covariance @ turn.mT
        return mean, covariance

    def _diagonal(self, signals: Signals, queries: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variances [batch, kv_heads, gaussians, dim], as products with a row: no pass of their own."""
        share = (asked / asked.sum(-1, keepdim=True).clamp_min(1))[:, None, None]  # [batch, 1, 1, m]
        mean, square = ((share @ x).squeeze(2) for x in (queries, queries.square()))
        return self._over_group(signals, mean, square)

    def _over_group(self, signals: Signals, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variances by group from the moments [batch, heads, dim] of each query head."""
        mean, square = signals.grouped(mean), signals.grouped(square)
        if self.pooled:
            mean, square = mean.mean(2, keepdim=True), square.mean(2, keepdim=True)
        return mean, (square - mean.square()).clamp_min(0)

    def __str__(self) -> str:
        return "expected attention"
