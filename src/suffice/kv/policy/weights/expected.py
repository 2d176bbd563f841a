"""Weights from an estimate of future queries: their mean, or a Gaussian distribution.

These are the published formulas. They ignore a soft cap and attention sinks of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.arguments import check_number, check_optional_int
from suffice.information.linalg import psd_cholesky
from suffice.information.weighted_set import CHUNK_SIZE
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.weight_state import WeightState
from suffice.kv.policy.weights.base import Weights


class QueryEstimateWeights(Weights):
    """Base class of weights that estimate future queries from the newest queries, or from all queries so far.

    Attributes:
        recent: number of newest queries to use; None uses all since the last eviction.
        half_life: use all queries so far instead; the weight of a query halves every `half_life` tokens.

    """

    recent: int | None
    half_life: float | None

    def __post_init__(self) -> None:
        check_optional_int("recent", self.recent, 1, unit="token")
        if self.half_life is not None:
            check_number("half_life", self.half_life, above=0, unit="tokens")

    @property
    def num_queries_needed(self) -> int | None:
        """`recent`; None with a half-life."""
        return self.recent if self.half_life is None else None

    @property
    def is_stateful(self) -> bool:
        """True with a half-life: queries before an eviction still count after it."""
        return self.half_life is not None

    @property
    def half_lives(self) -> frozenset[float]:
        """The half-life, if there is one."""
        return frozenset() if self.half_life is None else frozenset((self.half_life,))

    def next_state(self, stats: AttentionStats) -> WeightState:
        """Return the moments of all queries so far, if there is a half-life."""
        if self.half_life is None:
            return WeightState()
        return WeightState(query_moments={self.half_life: stats.query_moments(self.half_life)})


@dataclass(frozen=True)
class MeanQuery(QueryEstimateWeights):
    """w = exp(τ k·μ/√d), where μ is the mean of the newest queries of a GQA group (2604.25975, Eq. 8).

    The paper has exp(τ k·μ). The factor 1/√d of the attention is added here, because without it the weights of most
    heads overflow float32.

    Args:
        tau: the temperature τ.
        recent: number of newest queries to average; None averages all since the last eviction.
        half_life: average all queries so far instead; the weight of a query halves every `half_life` tokens.

    Raises:
        ValueError: `half_life` is not a positive finite number.

    """

    tau: float = 1.0
    recent: int | None = 64
    half_life: float | None = None

    def log_weights(self, stats: AttentionStats) -> Tensor:
        """Return τ k·μ/√d, [batch, num_key_value_heads, entries]."""
        if self.half_life is not None:
            mean = stats.group_heads(stats.query_moments(self.half_life).mean).mean(2)
        else:
            recent = min(self.recent or stats.num_queries, stats.num_queries)
            # Mean over the group, [batch, num_key_value_heads, recent, head_dim].
            queries = stats.group_heads(stats.queries[:, :, -recent:].float()).mean(2)
            if stats.valid_queries is None:
                mean = queries.mean(2)
            else:
                valid = stats.valid_queries[:, None, -recent:, None]
                mean = (queries * valid).sum(2) / valid.sum(2).clamp_min(1)
        return (stats.keys32 @ mean[..., None]).squeeze(-1) * (self.tau * stats.scaling)

    def __str__(self) -> str:
        return f"exp({self.tau:g} k·μ/√d)"


@dataclass(frozen=True)
class ExpectedAttention(QueryEstimateWeights):
    """Expected attention of Gaussian future queries, w ∝ exp(k·μ/√d + kᵀΣk/(2d)) (Expected Attention, 2510.00636).

    Args:
        future: number of future positions over which the rotary embedding is averaged. 0 uses the queries
            after the rotary embedding at their own positions.
        recent: number of newest queries that μ and Σ are estimated from; None uses all since the last eviction.
        pooled: estimate one Gaussian from all query heads of a GQA group. Otherwise there is one for each query head
            and their expected attention is averaged, which costs `num_key_value_groups` times as much.
        diagonal: use only the diagonal of Σ, which avoids a matrix product. Requires `future=0`.
        skip: number of first tokens of the text that are left out of the estimate and of the normalization, because
            their queries and keys are outliers.
        half_life: use all queries so far instead; the weight of a query halves every `half_life` tokens. Requires
            `diagonal`.

    Raises:
        ValueError: `half_life` is not a positive finite number, or the arguments exclude each other.

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
            raise ValueError(f"half_life must be None if diagonal=False, got {self.half_life!r}. Use diagonal=True")
        if self.diagonal and self.future:
            raise ValueError(
                f"future must be 0 if diagonal=True, got {self.future!r}, because the mean rotation mixes dimensions"
            )

    @property
    def needs_rotary(self) -> bool:
        """Whether the rotary embedding is averaged over future positions."""
        return self.future > 0

    def log_weights(self, stats: AttentionStats) -> Tensor:
        """Return the log of the expected attention, averaged over the heads of a GQA group."""
        mean, covariance = self._estimate_queries(stats)
        keys, scale = stats.keys32, stats.scaling
        # The entries are the last dimension, [batch, num_key_value_heads, gaussians, entries]: products and sums over
        # contiguous numbers are faster.
        if self.diagonal:
            quadratic = torch.cat([covariance @ chunk.square().mT for chunk in keys.split(CHUNK_SIZE, dim=2)], dim=3)
        else:
            # kᵀΣk = ‖kᵀL‖² with Σ = LLᵀ: one product [entries, head_dim] × [head_dim, gaussians · head_dim] for all
            # Gaussians. The covariance of a single query is 0, which has no Cholesky factor.
            tiny = torch.finfo(covariance.dtype).tiny * torch.eye(stats.head_dim, device=stats.device)
            cholesky = psd_cholesky(covariance + tiny).movedim(2, 3).flatten(3, 4)
            quadratic = (keys @ cholesky).unflatten(-1, (-1, stats.head_dim)).norm(dim=-1).square_().mT
        logits = ((mean * scale) @ keys.mT).add_(quadratic, alpha=scale * scale / 2)
        if stats.logit_bias is not None:
            logits = logits + stats.logit_bias[:, :, None]
        if logits.shape[2] == 1:
            return logits.squeeze(2)
        # Each query head is normalized over the entries after the first tokens, then the group is averaged.
        if stats.is_complete:
            total = logits[..., self.skip if stats.num_entries > self.skip else 0 :].logsumexp(-1, keepdim=True)
        else:
            left_out = stats.positions < self.skip
            left_out = left_out & (stats.counts > self.skip)[..., None] | (stats.positions < 0)
            total = logits.masked_fill(left_out[:, :, None], -torch.inf).logsumexp(-1, keepdim=True)
        return (logits - total).logsumexp(2)

    def _estimate_queries(self, stats: AttentionStats) -> tuple[Tensor, Tensor]:
        """Estimate mean and covariance of future queries.

        Returns:
            The means, [batch, num_key_value_heads, gaussians, head_dim], and the covariances,
            [batch, num_key_value_heads, gaussians, head_dim, head_dim], or their diagonals without the last dimension.
            There is one Gaussian if `pooled`, otherwise `num_key_value_groups`.

        """
        if self.half_life is not None:
            moments = stats.query_moments(self.half_life)
            return self._mean_and_variance(stats, moments.mean, moments.square)
        count = min(self.recent or stats.num_queries, stats.num_queries)
        queries = stats.unrotated_queries(count) if self.future else stats.queries[:, :, -count:].float()
        positions = stats.query_positions[:, -count:]
        used = positions >= self.skip
        # A row that has only first tokens uses them.
        used = torch.where(used.any(-1, keepdim=True), used, positions >= 0)
        if self.diagonal:
            share = (used / used.sum(-1, keepdim=True).clamp_min(1))[:, None, None]  # [batch, 1, 1, count]
            # Products with a row vector do not need a masked copy of the queries.
            mean, square = ((share @ x).squeeze(2) for x in (queries, queries.square()))
            return self._mean_and_variance(stats, mean, square)
        queries = stats.group_heads(queries)
        if self.pooled:
            queries = queries.flatten(2, 3)[:, :, None]
            used = used.repeat(1, stats.num_key_value_groups)
        share = (used / used.sum(-1, keepdim=True).clamp_min(1))[:, None, None, :, None]
        mean = (queries * share).sum(3)
        centered = (queries - mean[:, :, :, None]) * share.sqrt()
        covariance = centered.mT @ centered
        rotation = stats.mean_rotation(self.future)
        if rotation is not None:
            rotation = rotation[:, None, None]
            mean = (rotation @ mean[..., None]).squeeze(-1)
            covariance = rotation @ covariance @ rotation.mT
        return mean, covariance

    def _mean_and_variance(self, stats: AttentionStats, mean: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance, [batch, num_key_value_heads, gaussians, head_dim].

        Args:
            stats: statistics of the attention call.
            mean: mean of the queries of each query head, [batch, heads, head_dim].
            square: mean of their squares, [batch, heads, head_dim].

        """
        mean, square = stats.group_heads(mean), stats.group_heads(square)
        if self.pooled:
            mean, square = mean.mean(2, keepdim=True), square.mean(2, keepdim=True)
        return mean, (square - mean.square()).clamp_min(0)

    def __str__(self) -> str:
        return "expected attention"
