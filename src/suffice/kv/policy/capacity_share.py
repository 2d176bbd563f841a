"""The share of the capacity that the kept entries carry, under one objective for all policies."""

from __future__ import annotations

from torch import Tensor

from suffice.kv.backend.torch_backend import TORCH_BACKEND, TorchBackend
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.estimators import Leverage
from suffice.kv.policy.registry import policies

_REFERENCE = "capkv-profile"  # the policy whose objective is measured


def capacity_share(stats: AttentionStats, kept: Tensor, backend: TorchBackend = TORCH_BACKEND) -> Tensor:
    """Return C(kept) / C(all), with C the capacity in closed form (2604.25975) under the objective of `capkv-profile`.

    The objective, including the noise variance of the whole cache, is the same whichever policy chose the entries, so
    that policies can be compared.

    Args:
        stats: statistics of the attention call.
        kept: indices of the kept entries, long [batch, num_key_value_heads, width], −1 in empty slots.
        backend: computes the capacities.

    Returns:
        [batch, num_key_value_heads].

    """
    reference = policies()[_REFERENCE]
    estimator = reference.estimator
    assert isinstance(estimator, Leverage)
    return reference.objective(stats, backend).factor(estimator.ridge, estimator.relative).capacity_share(kept)
