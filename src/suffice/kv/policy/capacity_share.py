"""The share of the capacity that a selection keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.information import gram_matrix, psd_cholesky
from suffice.kv.policy.attention_stats import Signals
from suffice.kv.policy.estimators import Leverage, capacity_factor, fused_factor, linear_weights
from suffice.kv.policy.registry import DEFAULT_POLICY, policies


def capacity_share(signals: Signals, kept: Tensor) -> Tensor:  # long [batch, kv_heads, width]
    """Return the share of the capacity that the kept tokens carry, [batch, kv_heads].

    The objective is the default policy's, whatever chose the tokens: C(kept) / C(all) with the noise variance
    of the whole cache (2604.25975; C is its closed-form capacity).
    """
    reference = policies()[DEFAULT_POLICY]
    estimator = reference.estimator
    assert isinstance(estimator, Leverage)
    objective = (reference.weights, reference.directions, estimator.ridge, estimator.relative, signals)
    fused = fused_factor(*objective)
    if fused is not None:
        return fused.share(kept)
    factor = capacity_factor(*objective)
    index = kept.clamp_min(0)
    weights = linear_weights(reference.weights, signals).gather(2, index).masked_fill(kept < 0, 0)
    vectors = reference.directions.vectors(signals)
    vectors = vectors.gather(2, index[..., None].expand(-1, -1, -1, vectors.shape[-1]))
    # In the units of the factor, as its noise is.
    vectors = vectors / factor.vector_scale[..., None, None]
    ratio = gram_matrix(vectors, weights / factor.weight_scale[..., None]) / factor.noise[..., None, None]
    identity = torch.eye(ratio.shape[-1], device=ratio.device)
    part = psd_cholesky(identity + ratio).diagonal(dim1=-2, dim2=-1).log().sum(-1)
    # A head without any capacity has nothing to lose.
    return torch.where(factor.capacity > 0, part / factor.capacity, torch.ones_like(part))
