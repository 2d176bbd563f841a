"""Weights from the attention that entries receive from a window, the last query, all queries or sampled queries.

`registry.py` lists the named policies that use them, with the window sizes of their papers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.arguments import check_int
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.sampled_attention import sampled_attention
from suffice.kv.policy.weight_state import WeightState
from suffice.kv.policy.weights.base import Weights


@dataclass(frozen=True)
class WindowAttention(Weights):
    """Attention from an observation window of the last queries, mean-pooled along the entries (SnapKV, 2404.14469).

    Args:
        window_size: number of queries in the observation window.
        kernel_size: width of the pooling, in entries; odd.
        prefix_only: give weight 0 to the entries in the window, as SnapKV does. SnapKV always keeps these entries.
        floor: added to the attention, so that scores still rank the entries that receive no attention.

    Raises:
        ValueError: `window_size` is below 1, or `kernel_size` is not a positive odd number.

    """

    window_size: int = 32
    kernel_size: int = 5
    prefix_only: bool = False
    floor: float = 0.0

    def __post_init__(self) -> None:
        check_int("window_size", self.window_size, 1)
        if check_int("kernel_size", self.kernel_size) < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be a positive odd number, got {self.kernel_size!r}")

    def log_weights(self, stats: AttentionStats) -> Tensor:
        """Return the log of the pooled attention, averaged over the queries and heads of a GQA group."""
        attention = stats.window_attention(self.window_size)
        prefix = max(0, stats.num_entries - self.window_size)
        if self.prefix_only:
            attention = attention.clone()
            attention[..., prefix:] = 0
        if self.kernel_size > 1:
            padding = self.kernel_size // 2
            attention = torch.nn.functional.avg_pool1d(attention, self.kernel_size, stride=1, padding=padding)
        if self.prefix_only:
            attention[..., prefix:] = 0
        return (attention + self.floor).log()

    @property
    def num_queries_needed(self) -> int | None:
        """The size of the observation window."""
        return self.window_size

    def __str__(self) -> str:
        return f"attention of last {self.window_size} queries"


@dataclass(frozen=True)
class LastQueryAttention(Weights):
    """Attention of the last query, averaged over all heads of the layer (TOVA, 2401.06104)."""

    def log_weights(self, stats: AttentionStats) -> Tensor:
        """Return the log of the mean attention. It is the same for all heads, also if processes share the heads."""
        attention = stats.window_attention_weights(1).mean((1, 2, 3))  # [batch, entries]
        if stats.context.sharding is not None:
            attention = stats.context.sharding.all_reduce_mean(attention)
        return attention.log()[:, None].expand(-1, stats.num_key_value_heads, -1)

    @property
    def num_queries_needed(self) -> int | None:
        """Only the last query."""
        return 1

    def __str__(self) -> str:
        return "attention of last query"


@dataclass(frozen=True)
class AccumulatedAttention(Weights):
    """Sum of the attention that an entry has received from all queries so far (H2O, 2306.14048).

    It needs the attention of every query. The attention matrix is computed in blocks of queries.
    """

    def log_weights(self, stats: AttentionStats) -> Tensor:
        """Return the log of the accumulated attention, averaged over the heads of a GQA group."""
        return stats.attention_received().log()

    @property
    def num_queries_needed(self) -> int | None:
        """All queries since the last eviction."""
        return None

    @property
    def is_stateful(self) -> bool:
        """True: attention received before an eviction still counts after it."""
        return True

    def next_state(self, stats: AttentionStats) -> WeightState:
        """Return the attention received so far."""
        return WeightState(attention_received=stats.attention_received())

    def __str__(self) -> str:
        return "attention received, accumulated"


@dataclass(frozen=True)
class SampledAttention(Weights):
    """Mean attention from queries that are evenly spaced over the text to entries at a distance before each of them.

    Entries that were read from far away are likely to be read again. The entries right before a query are left out
    because every query gives most of its attention to them. The cost is that of an observation window with the same
    number of queries.

    Args:
        count: number of queries, sampled from those since the last eviction.
        min_distance: smallest distance in tokens from a query to an entry whose attention counts.

    Raises:
        ValueError: an argument is below 1.

    """

    count: int = 16
    min_distance: int = 32

    def __post_init__(self) -> None:
        for name in ("count", "min_distance"):
            check_int(name, getattr(self, name), 1)

    def log_weights(self, stats: AttentionStats) -> Tensor:
        """Return the log of the mean attention; see `suffice.kv.policy.sampled_attention.sampled_attention`."""
        return sampled_attention(stats, self.count, self.min_distance).log()

    @property
    def num_queries_needed(self) -> int | None:
        """All queries since the last eviction."""
        return None

    def __str__(self) -> str:
        return f"attention of {self.count} spread queries"
