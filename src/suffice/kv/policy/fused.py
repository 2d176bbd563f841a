"""Which scores the kernels can compute, and for which signals; None from here means plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from suffice.gpu import KernelFallbackError
from suffice.kv.kernels import usable
from suffice.kv.policy.attention_stats import Signals
from suffice.kv.policy.sampled_attention import sample
from suffice.kv.policy.weights import ExpectedAttention, KeySalience, SampledAttention, Sum, Weights, WindowAttention

_MOST_ROWS = 128  # queries of a window, or of a sample, times heads of a group that one program holds
_LEAST_RIDGE = 1e-3


def fused_log_weights(weights: Weights, signals: Signals) -> Tensor | None:
    """Return log weights of window attention + expected attention + salience, with sampled attention or without.

    Returns:
        [batch, kv_heads, tokens], −inf where there is no entry; None for other weights, for attention weights that
        are given, and where no kernel can be used.

    """
    if not isinstance(weights, Sum) or signals.attention is not None or not usable(signals.queries, signals.keys):
        return None
    factors = {type(term): factor for factor, term in weights.terms}
    terms = {type(term): term for term in weights.parts}
    kinds = (WindowAttention, ExpectedAttention, KeySalience, SampledAttention)
    window, expected, salience, sampled = (terms.get(kind) for kind in kinds)
    if (
        len(weights.terms) != len(terms)
        or len(terms) != 3 + (sampled is not None)
        or not isinstance(window, WindowAttention)
        or not isinstance(expected, ExpectedAttention)
        or not isinstance(salience, KeySalience)
        or not (sampled is None or isinstance(sampled, SampledAttention))
        or (window.prefix_only or window.floor != 0)
        or not expected.diagonal
        or expected.half_life is not None
    ):
        return None
    count = signals.queries.shape[2]
    width = min(window.window, count)
    if max(width, sampled.count if sampled else 0) * signals.group > _MOST_ROWS:
        return None
    from suffice.kv.kernels.observation import Observation, Terms, observed_log_weights

    recent = min(expected.recent or count, count)
    starts, ends = signals.spans(width)
    places = None
    if sampled is not None:
        places = sample(signals, sampled.count)
        ends = torch.cat((ends, _sampled_ends(signals, places, sampled.apart, starts)), dim=-1)
    seen = Observation(
        signals.queries,
        signals.keys,
        signals.scaling,
        width,
        recent,
        _left_out(signals, recent, expected.skip),
        starts,
        ends,
        places,
        None if expected.pooled or signals.group == 1 else _inner(signals, expected.skip, starts),
    )
    order = (factors[kind] for kind in kinds[:3])
    mixed = Terms(window.pool, salience.beta, *order, sampled=factors.get(SampledAttention, 1.0))
    return observed_log_weights(seen, mixed)


class FusedFactor:
    """A = σ²I + Σ w v vᵀ of a whole cache, factorised by kernels, with σ² relative to the trace.

    Args:
        log_weights: [batch, kv_heads, tokens].
        ridge: λ.
        signals: of the layer.

    """

    def __init__(self, log_weights: Tensor, ridge: float, signals: Signals) -> None:
        from suffice.kv.kernels.leverage import factorize

        self._log_weights, self._signals = log_weights, signals
        self._factor = factorize(signals.values, log_weights, ridge)
        self._inner: Tensor | None = None  # until it is asked for

    @classmethod
    def of(cls, log_weights: Tensor, ridge: float, signals: Signals) -> FusedFactor | None:
        """Return it; None where no kernel can be used, or where the values call for more than float32 and one scale.

        If the latter is not to be asked at once, what settles the signals' verdicts gets `KernelFallbackError`.
        """
        if ridge < _LEAST_RIDGE or not usable(signals.values):
            return None
        own = cls(log_weights, ridge, signals)
        try:
            own._require(own._factor)
        except KernelFallbackError:
            return None
        return own

    def _require(self, factor: Any) -> None:
        self._signals.require(~factor.failed.any(), KernelFallbackError())

    def inner_products(self) -> Tensor:
        """Return vᵀA⁻¹v, [batch, kv_heads, tokens]."""
        from suffice.kv.kernels.leverage import inner_products

        self._inner = inner_products(self._signals.values, self._log_weights, self._factor)
        return self._inner

    def scores(self, power: float) -> Tensor:
        """Return log (w · (vᵀA⁻¹v)^power), [batch, kv_heads, tokens]."""
        if self._inner is not None:  # shares were asked for before: the values need not be read again
            return self._log_weights + power * self._inner.log()
        from suffice.kv.kernels.leverage import inner_products

        return inner_products(self._signals.values, self._log_weights, self._factor, power)

    def share(self, kept: Tensor) -> Tensor:
        """Return the share of the capacity that the kept entries carry; long [batch, kv_heads, width], −1 for none."""
        from suffice.kv.kernels.leverage import part_factor

        part = part_factor(self._signals.values, self._log_weights, kept, self._factor)
        self._require(part)
        return part.capacity / self._factor.capacity


def _left_out(signals: Signals, recent: int, skip: int) -> Tensor:
    """How many of the newest `recent` queries are padding or first tokens, int32 [batch]."""
    if signals.plain:
        first = max(0, skip - (signals.tokens - recent))
        # Nothing but first tokens: their statistics are all there are.
        first = first if first < recent else 0
        return torch.full((1,), first, dtype=torch.int32, device=signals.device).expand(signals.batch)
    positions = signals.query_positions[:, -recent:]
    asked = (positions >= skip).sum(-1)
    asked = torch.where(asked > 0, asked, (positions >= 0).sum(-1))
    return (recent - asked).int()


def _sampled_ends(signals: Signals, places: Tensor, apart: int, starts: Tensor) -> Tensor:
    """One past the last entry that each sampled query reads, int32 [batch, kv_heads, sampled]."""
    if signals.plain:
        own = places + (signals.tokens - signals.queries.shape[2] - apart + 1)
        return own.clamp_min(0).int()[:, None].expand(-1, signals.kv_heads, -1)
    latest = signals.query_positions.gather(1, places)[:, None, :, None] - apart
    positions = signals.positions[:, :, None]
    before = ((positions <= latest) & (positions >= 0)).sum(-1, dtype=torch.int32)
    return starts[..., None] + before


def _inner(signals: Signals, skip: int, starts: Tensor) -> Tensor:
    """First entry that is no first token of the text, int32 [batch, kv_heads]; the first one if there is no other."""
    positions = signals.positions
    left_out = ((positions < skip) & (positions >= 0)).sum(-1, dtype=torch.int32)
    return starts + torch.where(signals.counts > skip, left_out, 0)
