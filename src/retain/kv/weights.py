"""Weights: how likely each cached token is to be read by a future query.

A weight maps the signals of an attention call to log weights [batch, kv_heads, tokens], float32, up to a
constant for each head (only ratios within a head count). Weights add (each term first divided by its mean
over the head), multiply, and take a factor: `WindowAttention() + 2 * KeySalience()`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from retain.information.items import CHUNK
from retain.information.linalg import psd_cholesky
from retain.kv.signals import Signals


class Weights(ABC):
    """Base of all weights; a new one defines `log`, as a frozen dataclass so that it prints and compares."""

    @property
    def observed(self) -> int | None:
        """How many of the newest queries the weight looks at; None for all since the last eviction."""
        return 0

    @property
    def remembers(self) -> bool:
        """Whether what queries before the last eviction showed counts too."""
        return False

    @abstractmethod
    def log(self, signals: Signals) -> Tensor:
        """Return log weights [batch, kv_heads, tokens], float32; what stands on padding is ignored."""

    def __add__(self, other: Weights) -> Sum:
        return Sum((*_terms(self), *_terms(other)))

    def __rmul__(self, factor: float) -> Sum:
        return Sum(tuple((factor * old, term) for old, term in _terms(self)))

    def __mul__(self, other: Weights) -> Product:
        return Product((self, other))


def _most(counts: list[int | None]) -> int | None:
    """Return the largest number of queries; None, which stands for all, is larger than any."""
    known = [count for count in counts if count is not None]
    return None if len(known) < len(counts) else max(known)


def _terms(weights: Weights) -> tuple[tuple[float, Weights], ...]:
    return weights.terms if isinstance(weights, Sum) else ((1.0, weights),)


@dataclass(frozen=True)
class Sum(Weights):
    """Σ c_j w_j / mean(w_j): terms of different scales, each divided by its mean over the head's tokens."""

    terms: tuple[tuple[float, Weights], ...]

    def __post_init__(self) -> None:
        for factor, _ in self.terms:
            if not factor > 0 or math.isinf(factor):
                raise ValueError(f"factor of a weight is {factor}; accepted: a positive number")

    def log(self, signals: Signals) -> Tensor:
        """Return the log of the sum."""
        parts: list[Tensor] = []
        for factor, term in self.terms:
            own = signals.masked(term.log(signals))
            total = own.logsumexp(-1, keepdim=True)
            # A term may be 0 everywhere, as a window's attention to a text that is shorter than the window.
            parts.append(own - total.masked_fill(total == float("-inf"), 0) + math.log(factor))
        return torch.stack(parts).logsumexp(0)

    @property
    def observed(self) -> int | None:
        """The most that any part looks at."""
        return _most([part.observed for part in self.parts])

    @property
    def remembers(self) -> bool:
        """Whether any part does."""
        return any(part.remembers for part in self.parts)

    @property
    def parts(self) -> tuple[Weights, ...]:
        """The terms without their factors."""
        return tuple(term for _, term in self.terms)

    def __str__(self) -> str:
        return " + ".join(f"{'' if f == 1 else f'{f:g} '}{t}" for f, t in self.terms)


@dataclass(frozen=True)
class Product(Weights):
    """The product of weights."""

    factors: tuple[Weights, ...]

    def log(self, signals: Signals) -> Tensor:
        """Return the sum of the factors' logs."""
        total = self.factors[0].log(signals)
        for factor in self.factors[1:]:
            total = total + factor.log(signals)
        return total

    @property
    def observed(self) -> int | None:
        """The most that any part looks at."""
        return _most([part.observed for part in self.factors])

    @property
    def remembers(self) -> bool:
        """Whether any part does."""
        return any(part.remembers for part in self.factors)

    def __str__(self) -> str:
        return " × ".join(str(factor) for factor in self.factors)


@dataclass(frozen=True)
class Uniform(Weights):
    """w = 1: every token is as likely to be read."""

    def log(self, signals: Signals) -> Tensor:
        """Return zeros."""
        return torch.zeros(signals.batch, signals.kv_heads, signals.tokens, device=signals.device)

    def __str__(self) -> str:
        return "1"


@dataclass(frozen=True)
class MeanQuery(Weights):
    """w = exp(τ k·μ/√d), μ the mean of the newest `recent` queries over the GQA group (2604.25975, Eq. 8).

    The paper writes exp(τ k·μ); the factor 1/√d of attention is kept here because without it the weights
    overflow float32 in most heads.

    Args:
        tau: temperature τ.
        recent: number of newest queries.
        half_life: take the mean over all queries instead, the weight of each halved with every so many tokens.

    """

    tau: float = 1.0
    recent: int = 64
    half_life: float | None = None

    def __post_init__(self) -> None:
        _check_half_life(self.half_life)

    def log(self, signals: Signals) -> Tensor:
        """Return τ k·μ/√d."""
        if self.half_life is not None:
            mean = signals.grouped(signals.query_moments(self.half_life).mean).mean(2)
        else:
            recent = min(self.recent, signals.queries.shape[2])
            queries = signals.grouped(signals.queries[:, :, -recent:].float()).mean(2)
            if signals.asked is None:
                mean = queries.mean(2)
            else:
                asked = signals.asked[:, None, -recent:, None]
                mean = (queries * asked).sum(2) / asked.sum(2).clamp_min(1)
        return (signals.keys32 @ mean[..., None]).squeeze(-1) * (self.tau * signals.scaling)

    @property
    def observed(self) -> int | None:
        """The newest `recent`."""
        return self.recent if self.half_life is None else None

    @property
    def remembers(self) -> bool:
        """With a half-life."""
        return self.half_life is not None

    def __str__(self) -> str:
        return f"exp({self.tau:g} k·μ/√d)"


def _check_half_life(half_life: float | None) -> None:
    if half_life is not None and not 0 < half_life < math.inf:
        raise ValueError(f"half_life is {half_life}; accepted: a positive number of tokens, or None")


@dataclass(frozen=True)
class WindowAttention(Weights):
    """Attention from an observation window of last queries, mean-pooled along the tokens (SnapKV, 2404.14469).

    Args:
        window: number of last queries that observe.
        pool: odd width of the pooling.
        prefix_only: leave the window's own tokens out, as SnapKV does because it always keeps them.
        floor: added to the attention, so that what multiplies it counts for tokens without any.

    """

    window: int = 32
    pool: int = 5
    prefix_only: bool = False
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is {self.window}; accepted: at least 1")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool is {self.pool}; accepted: an odd number of tokens")

    def log(self, signals: Signals) -> Tensor:
        """Return the log of the pooled attention, averaged over queries and group."""
        attention = signals.attention_from_last(self.window)
        inner = max(0, signals.tokens - self.window)
        if self.prefix_only:
            attention = attention.clone()
            attention[..., inner:] = 0
        if self.pool > 1:
            attention = torch.nn.functional.avg_pool1d(attention, self.pool, stride=1, padding=self.pool // 2)
        if self.prefix_only:
            attention[..., inner:] = 0
        return (attention + self.floor).log()

    @property
    def observed(self) -> int | None:
        """The window."""
        return self.window

    def __str__(self) -> str:
        return f"attention of last {self.window} queries"


@dataclass(frozen=True)
class LastQueryAttention(Weights):
    """Attention of the last query, averaged over all heads of the layer (TOVA, 2401.06104)."""

    def log(self, signals: Signals) -> Tensor:
        """Return the log of that attention, the same for every head; processes that share the heads add theirs up."""
        attention = signals.attention_of_last(1).mean((1, 2, 3))
        if signals.sharding is not None:
            attention = signals.sharding.mean(attention)
        return attention.log()[:, None].expand(-1, signals.kv_heads, -1)

    @property
    def observed(self) -> int | None:
        """The last."""
        return 1

    def __str__(self) -> str:
        return "attention of last query"


@dataclass(frozen=True)
class AccumulatedAttention(Weights):
    """Attention received from all queries so far, summed (H2O, 2306.14048).

    The only weight that needs the whole attention matrix; it is formed in blocks of queries.
    """

    def log(self, signals: Signals) -> Tensor:
        """Return the log of the accumulated attention."""
        return signals.attention_received().log()

    @property
    def observed(self) -> int | None:
        """All."""
        return None

    @property
    def remembers(self) -> bool:
        """Attention adds up over evictions."""
        return True

    def __str__(self) -> str:
        return "attention received, accumulated"


@dataclass(frozen=True)
class ExpectedAttention(Weights):
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
        _check_half_life(self.half_life)
        if self.half_life is not None and not self.diagonal:
            raise ValueError(f"half_life is {self.half_life} with diagonal=False; accepted: with diagonal=True")
        if self.diagonal and self.future:
            raise ValueError(f"diagonal is True with future={self.future}; accepted: future=0, as rotation mixes pairs")

    def log(self, signals: Signals) -> Tensor:
        """Return the log of the expected attention, averaged over the GQA group."""
        mean, covariance = self._statistics(signals)  # [batch, kv_heads, gaussians, dim, (dim)]
        keys, scale = signals.keys32, signals.scaling
        if self.diagonal:
            spread = torch.cat([part.square() @ covariance.mT for part in keys.split(CHUNK, dim=2)], dim=2)
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

    @property
    def observed(self) -> int | None:
        """The newest `recent`, or all."""
        return self.recent if self.half_life is None else None

    @property
    def remembers(self) -> bool:
        """With a half-life."""
        return self.half_life is not None

    def __str__(self) -> str:
        return "expected attention"


@dataclass(frozen=True)
class KeyNorm(Weights):
    """w = exp(−‖k‖): keys of small norm attract attention (2406.11430)."""

    def log(self, signals: Signals) -> Tensor:
        """Return −‖k‖₂."""
        return -signals.keys32.norm(dim=-1)

    def __str__(self) -> str:
        return "exp(−‖k‖)"


@dataclass(frozen=True)
class KeySalience(Weights):
    """w = exp(−β cos(k, mean of the unit keys)): keys that differ from the rest."""

    beta: float = 4.0

    def log(self, signals: Signals) -> Tensor:
        """Return −β times the cosine."""
        return signals.cosine_to_mean(signals.keys32) * -self.beta

    def __str__(self) -> str:
        return f"exp(−{self.beta:g} cos(k, k̄))"


@dataclass(frozen=True)
class Recency(Weights):
    """The newer, the likelier; with protected sinks, StreamingLLM's window (2309.17453)."""

    def log(self, signals: Signals) -> Tensor:
        """Return the token's position."""
        return signals.positions.float().expand(-1, signals.kv_heads, -1)

    def __str__(self) -> str:
        return "recency"


@dataclass(frozen=True)
class Random(Weights):
    """Independent uniform weights, the same for the same seed, layer and position."""

    seed: int = 0

    def log(self, signals: Signals) -> Tensor:
        """Return log weights drawn on the CPU, so that every device gets the same."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + signals.layer)
        # One number for each position, whatever was evicted before: drawn position by position.
        heads = signals.kv_heads if signals.sharding is None else signals.sharding.heads
        drawn = torch.rand(int(signals.seen.max()), heads, generator=generator).log().mT
        drawn = drawn if signals.sharding is None else signals.sharding.part(drawn, 0)
        places = signals.positions.clamp_min(0).expand(-1, signals.kv_heads, -1)
        return drawn.to(signals.device).expand(signals.batch, -1, -1).gather(2, places)

    def __str__(self) -> str:
        return "random"
