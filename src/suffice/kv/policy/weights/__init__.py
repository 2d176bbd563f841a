"""Weights: how likely each cached entry is to be read by a future query.

A weight maps the statistics of an attention call to log weights, float32 [batch, num_key_value_heads, entries]. Only
ratios within a head matter, so the log weights of a head are defined up to a constant. Weights can be scaled, added and
multiplied: `WindowAttention() + 2 * KeySalience()`. In a sum, each term is first divided by its mean over the head.
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
from suffice.kv.policy.weights.replay import KINDS, ReplayAttention

__all__ = [
    "KINDS",
    "AccumulatedAttention",
    "ExpectedAttention",
    "KeyNorm",
    "KeySalience",
    "LastQueryAttention",
    "MeanQuery",
    "Product",
    "Random",
    "Recency",
    "ReplayAttention",
    "SampledAttention",
    "Sum",
    "Uniform",
    "Weights",
    "WindowAttention",
]
