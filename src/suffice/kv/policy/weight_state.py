"""State of weights that also depend on queries from before the last eviction."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from suffice.kv.policy.query_moments import QueryMoments


@dataclass(frozen=True)
class WeightState:
    """What stateful weights carry from one eviction of a layer to the next.

    Args:
        attention_received: attention that each entry has received so far, [batch, num_key_value_heads, entries];
            None if no weight accumulates it.
        query_moments: exponentially weighted moments of all queries so far, by half-life.

    """

    attention_received: Tensor | None = None
    query_moments: dict[float, QueryMoments] = field(default_factory=dict[float, QueryMoments])

    def merge(self, other: WeightState) -> WeightState:
        """Return the union of two states of the same call."""
        received = self.attention_received if self.attention_received is not None else other.attention_received
        return WeightState(received, {**self.query_moments, **other.query_moments})

    def select_rows(self, index: Tensor) -> WeightState:
        """Keep, reorder or repeat rows of the batch: row j becomes what row index[j] was."""
        received = self.attention_received
        return WeightState(
            None if received is None else received.index_select(0, index.to(received.device)),
            {half_life: moments.select_rows(index) for half_life, moments in self.query_moments.items()},
        )
