"""Weights from the entries alone: constant, by key, by position, at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.kv.policy.attention_stats import Signals
from suffice.kv.policy.weights.base import Weights


@dataclass(frozen=True)
class Uniform(Weights):
    """w = 1: every token is as likely to be read."""

    def log(self, signals: Signals) -> Tensor:
        """Return zeros."""
        return torch.zeros(signals.batch, signals.kv_heads, signals.tokens, device=signals.device)

    def __str__(self) -> str:
        return "1"


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
        heads = signals.kv_heads if signals.sharding is None else signals.sharding.num_kv_heads
        drawn = torch.rand(int(signals.seen.max()), heads, generator=generator).log().mT
        drawn = drawn if signals.sharding is None else signals.sharding.local_part(drawn, 0)
        places = signals.positions.clamp_min(0).expand(-1, signals.kv_heads, -1)
        return drawn.to(signals.device).expand(signals.batch, -1, -1).gather(2, places)

    def __str__(self) -> str:
        return "random"
