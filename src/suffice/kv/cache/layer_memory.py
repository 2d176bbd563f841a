"""The memory of one layer: how many entries and queries it may hold if the bytes of the cache are limited."""

from __future__ import annotations

from dataclasses import dataclass, replace

from suffice.kv.attention.call import AttentionCall
from suffice.kv.cache.memory import LayerShape, MemoryPlan
from suffice.kv.cache.settings import CacheSettings
from suffice.kv.cache.state import LayerState
from suffice.kv.storage.quantized import QuantizedStorage


def layer_shape(call: AttentionCall) -> LayerShape:
    """Return the sizes of the tensors of a layer whose entries are scored as they are stored."""
    query_dim = call.query.shape[1] * call.query.shape[3]
    return LayerShape(
        num_heads=call.key.shape[1],
        key_dim=call.key.shape[-1],
        value_dim=call.value.shape[-1],
        element_size=call.key.element_size(),
        query_bytes=query_dim * call.query.element_size(),
        scored_query_dim=query_dim,
    )


@dataclass(frozen=True)
class LayerMemory:
    """The memory of a layer, and how the layer uses it.

    Args:
        settings: settings of the cache.
        shape: sizes of the tensors of the layer; None before the first token, and if the memory is not limited.
        plan: how the layer uses its memory in the current attention call; None if it is not limited then.

    """

    settings: CacheSettings
    shape: LayerShape | None = None
    plan: MemoryPlan | None = None

    def begin_call(self, shape: LayerShape, state: LayerState, max_readable: int | None) -> LayerMemory:
        """Return the memory for an attention call.

        Args:
            shape: sizes of the tensors of the layer.
            state: state of the layer, in which the new tokens are counted.
            max_readable: number of entries that the next token can read; None if it can read all.

        Raises:
            ValueError: the memory is too small for the entries that are always kept.

        """
        memory = replace(self, shape=shape)
        return replace(memory, plan=memory.plan_after(0, state, max_readable))

    def plan_after(self, num_new: int, state: LayerState, max_readable: int | None) -> MemoryPlan | None:
        """Return how the layer uses its memory after more tokens; None if it is not limited, or not known yet.

        Args:
            num_new: number of tokens that `state` does not count yet.
            state: state of the layer.
            max_readable: number of entries that the next token can read; None if it can read all.

        Raises:
            ValueError: the memory is too small for the entries that are always kept.

        """
        memory, shape, storage = self.settings.memory, self.shape, state.storage
        if memory is None or shape is None or (storage is not None and not memory.evict_always):
            return None
        num_seen = state.num_seen + num_new
        num_parts = self._num_parts(shape.num_heads, len(state.rows))
        stored_bits = None if storage is None else storage.bits
        return memory.plan(shape, min(num_seen, max_readable or num_seen), num_parts, stored_bits)

    def _num_parts(self, num_heads: int, batch_size: int) -> int:
        """Return into how many parts a limit on the bytes of the whole cache is divided."""
        sharding = self.settings.sharding_of(num_heads)
        num_processes = 1 if sharding is None else sharding.world_size
        return self.settings.num_layers * batch_size * num_processes

    def num_queries(self, num_new: int) -> int | None:
        """Return how many of the newest queries the next eviction needs; None for all since the last eviction.

        Args:
            num_new: number of new tokens.

        """
        needed = self.settings.num_queries_needed
        needed = None if needed is None else max(1, needed)
        if self.plan is not None and num_new == 1:
            return min(needed or self.plan.num_queries, self.plan.num_queries)
        return needed

    def limit(self, state: LayerState) -> LayerState:
        """Return the state with fewer queries, and shorten the window of exact entries, as the plan says."""
        if self.plan is None:
            return state
        if isinstance(state.storage, QuantizedStorage):
            state.storage.quantization = self.plan.quantization
        if len(state.queries) > 2 * self.plan.num_queries:
            return replace(state, queries=state.queries.newest(self.plan.num_queries))
        return state

    def bytes_limit(self, state: LayerState, bytes_full: int) -> int | None:
        """Return the bytes that the layer may hold, with positions and what the policy remembers; None for no limit.

        Args:
            state: state of the layer.
            bytes_full: bytes of the keys and values of all tokens, including padding.

        """
        memory, num_rows, storage = self.settings.memory, len(state.rows), state.storage
        if memory is None or storage is None or (state.num_appended and not memory.evict_always):
            return None
        return num_rows * memory.bytes_of_row(bytes_full // num_rows, self._num_parts(storage.num_heads, num_rows))
