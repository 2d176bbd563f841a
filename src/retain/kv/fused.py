"""Which scores the kernels can compute, and for which signals; None from here means plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from retain.kv.kernels import usable
from retain.kv.signals import Signals
from retain.kv.weights import ExpectedAttention, KeySalience, Sum, Weights, WindowAttention

_MOST_ROWS = 128  # queries of a window times heads of a group that one program holds
_LEAST_RIDGE = 1e-3


def fused_log_weights(weights: Weights, signals: Signals) -> Tensor | None:
    """Return log weights of window attention + expected attention + salience, as the policy `capkv` takes them.

    Returns:
        [batch, kv_heads, tokens], −inf where there is no entry; None for other weights, for attention weights that
        are given, and where no kernel can be used.

    """
    if not isinstance(weights, Sum) or signals.attention is not None or not usable(signals.queries, signals.keys):
        return None
    factors = {type(term): factor for factor, term in weights.terms}
    terms = {type(term): term for term in weights.parts}
    window, expected, salience = (terms.get(kind) for kind in (WindowAttention, ExpectedAttention, KeySalience))
    if (
        len(weights.terms) != 3
        or not isinstance(window, WindowAttention)
        or not isinstance(expected, ExpectedAttention)
        or not isinstance(salience, KeySalience)
        or (window.prefix_only or window.floor != 0)
        or not (expected.pooled and expected.diagonal and expected.half_life is None)
    ):
        return None
    count = signals.queries.shape[2]
    width = min(window.window, count)
    if width * signals.group > _MOST_ROWS:
        return None
    from retain.kv.kernels.observation import Observation, observed_log_weights

    recent = min(expected.recent or count, count)
    seen = Observation(
        signals.queries,
        signals.keys,
        signals.scaling,
        width,
        recent,
        _left_out(signals, recent, expected.skip),
        *signals.spans(width),
    )
    order = (factors[WindowAttention], factors[ExpectedAttention], factors[KeySalience])
    return observed_log_weights(seen, pool=window.pool, beta=salience.beta, factors=order)


def fused_inner_products(log_weights: Tensor, ridge: float, signals: Signals) -> Tensor | None:
    """Return vᵀA⁻¹v with A = σ²I + Σ w v vᵀ and σ² relative to the trace, [batch, kv_heads, tokens].

    None where no kernel can be used, or where the values call for more than float32 and one scale.
    """
    if ridge < _LEAST_RIDGE or not usable(signals.values):
        return None
    from retain.kv.kernels.leverage import inner_products

    return inner_products(signals.values, log_weights, ridge)


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
