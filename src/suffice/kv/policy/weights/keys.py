"""Weights that need no queries: uniform, from the keys, from the positions, or random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.arguments import check_number
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.weights.base import Weights


@dataclass(frozen=True)
class Uniform(Weights):
    """w = 1: all entries are equally likely to be read."""

    def log_weights(self, stats: AttentionStats) -> Tensor:
        """Return zeros, [batch, num_key_value_heads, entries]."""
        return torch.zeros(stats.batch_size, stats.num_key_value_heads, stats.num_entries, device=stats.device)

    def __str__(self) -> str:
        return "1"


@dataclass(frozen=True)
class KeyNorm(Weights):
    """w = exp(−‖k‖₂): keys with a small norm attract attention (2406.11430)."""

    def log_weights(self, stats: AttentionStats) -> Tensor:
        """Return −‖k‖₂, [batch, num_key_value_heads, entries]."""
        return -stats.keys32.norm(dim=-1)

    def __str__(self) -> str:
        return "exp(−‖k‖)"


@dataclass(frozen=True)
class KeySalience(Weights):
    """w = exp(−β cos(k, k̄)), where k̄ is the mean of the unit vectors k/‖k‖: keys that differ from the others.

    Args:
        beta: β, the strength of the preference.

    """

    beta: float = 4.0

    def __post_init__(self) -> None:
        check_number("beta", self.beta)

    def log_weights(self, stats: AttentionStats) -> Tensor:
        """Return −β cos(k, k̄), [batch, num_key_value_heads, entries]."""
        cosines = stats.memoize("cosines of keys", lambda: stats.cosine_to_mean(stats.keys32))
        return cosines * -self.beta

    def __str__(self) -> str:
        return f"exp(−{self.beta:g} cos(k, k̄))"


@dataclass(frozen=True)
class Recency(Weights):
    """The newest entries have the largest weights; with protected sinks, this is StreamingLLM (2309.17453)."""

    def log_weights(self, stats: AttentionStats) -> Tensor:
        """Return the position of each entry, [batch, num_key_value_heads, entries]."""
        return stats.positions.float().expand(-1, stats.num_key_value_heads, -1)

    def __str__(self) -> str:
        return "recency"


@dataclass(frozen=True)
class Random(Weights):
    """Independent random weights, uniform in [0, 1), as a baseline.

    Args:
        seed: the weights are a function of seed, layer, head and position.

    """

    seed: int = 0

    def log_weights(self, stats: AttentionStats) -> Tensor:
        """Return the log of numbers drawn from [0, 1), [batch, num_key_value_heads, entries]."""
        # Drawn on the CPU, so that all devices get the same numbers, and for all positions so far, so that the number
        # of an entry does not depend on earlier evictions.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + stats.context.layer)
        sharding = stats.context.sharding
        num_heads = stats.num_key_value_heads if sharding is None else sharding.num_key_value_heads
        log_drawn = torch.rand(int(stats.num_seen.max()), num_heads, generator=generator).log().mT
        log_drawn = log_drawn if sharding is None else sharding.local_part(log_drawn, 0)
        positions = stats.positions.clamp_min(0).expand(-1, stats.num_key_value_heads, -1)
        return log_drawn.to(stats.device).expand(stats.batch_size, -1, -1).gather(2, positions)

    def __str__(self) -> str:
        return "random"
