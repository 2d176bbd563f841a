"""Weights: how likely each cached token is to be read by a future query.

A weight maps the signals of an attention call to log weights [batch, kv_heads, tokens], float32, up to a
constant for each head (only ratios within a head count). Weights add (each term first divided by its mean
over the head), multiply, and take a factor: `WindowAttention() + 2 * KeySalience()`.
"""

from __future__ import annotations

from suffice.kv.policy.weights.attention import (
    AccumulatedAttention,
    LastQueryAttention,
    SampledAttention,
    WindowAttention,
)
from suffice.kv.policy.weights.base import Product, Sum, Weights
from suffice.kv.policy.weights.expected import ExpectedAttention, MeanQuery
from suffice.kv.policy.weights.keys import KeyNorm, KeySalience, Random, Recency, Uniform

__all__ = [
    "AccumulatedAttention",
    "ExpectedAttention",
    "KeyNorm",
    "KeySalience",
    "LastQueryAttention",
    "MeanQuery",
    "Product",
    "Random",
    "Recency",
    "SampledAttention",
    "Sum",
    "Uniform",
    "Weights",
    "WindowAttention",
]
