"""Weights from attention that was paid: by a window, the last query, all queries, or some of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.kv.policy.attention_stats import Signals
from suffice.kv.policy.sampled_attention import sampled_attention
from suffice.kv.policy.weights.base import Weights


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
            attention = signals.sharding.all_reduce_mean(attention)
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
class SampledAttention(Weights):
    """Attention from queries evenly spaced over the text to what lies some way behind each, on average.

    What was asked for from afar will be asked for again; nearly all attention goes to the nearest tokens, which would
    say nothing but that. Costs as much as a window of as many queries.

    Args:
        count: number of queries, among those since the last eviction.
        apart: tokens right before a query, itself among them, whose attention doesn't count.

    """

    count: int = 16
    apart: int = 32

    def __post_init__(self) -> None:
        for name in ("count", "apart"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: at least 1")

    def log(self, signals: Signals) -> Tensor:
        """Return the log of that attention, averaged over queries and group."""
        return sampled_attention(signals, self.count, self.apart).log()

    @property
    def observed(self) -> int | None:
        """All since the last eviction."""
        return None

    def __str__(self) -> str:
        return f"attention of {self.count} spread queries"
