"""A budget in bytes: how many entries of a layer fit into it, and with how many bits they are stored.

The rule, for one layer and one row of the batch with M bytes:

1. If all entries fit in the model's dtype, they are kept as they are.
2. Otherwise, entries are quantized. If all entries fit with one of the bits of `ALL_ENTRIES`, all are kept, with the
   most bits that fit.
3. Otherwise, entries are evicted, and as many are kept as fit. The bits of keys and values are 5 and 3 if two thirds of
   the entries fit with them, otherwise 4 and 3 if a quarter fits, otherwise 3 and 2 (`SOME_ENTRIES`): with little
   memory, it is better to keep more entries than to store them with more bits, as measured on two models
   (docs/results/kv-bits.md). All entries that are always kept must fit, too.

Everything that the cache stores is counted: exact and quantized entries, means and scales, positions and other numbers
of each entry, slots for new tokens until the next eviction, and the queries that the policy needs for it. Heads may
hold different numbers of exact entries; all are counted with the largest number, so the limit is never exceeded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from torch import nn

from suffice.kv.budget.allocation import AdaKV, Equal
from suffice.kv.budget.protection import Protection
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.repair import NUM_REMEMBERED
from suffice.kv.storage.base import num_spare_slots
from suffice.kv.storage.quantization import Quantization
from suffice.kv.storage.quantized import NUM_SINKS
from suffice.kv.storage.vector_format import VectorFormat

ALL_ENTRIES = ((8, 8), (8, 5), (5, 5), (5, 4))
"""Bits of keys and values if all entries are kept, best first."""
SOME_ENTRIES = {(5, 3): 2 / 3, (4, 3): 1 / 4, (3, 2): 0.0}
"""Bits of keys and values if entries are evicted, best first, and the share of the entries that must fit with them."""

# The largest shares of the memory for the newest entries, which are not quantized; for new tokens, until they are
# quantized together as a block; for new tokens, quantized or not, until the next eviction; and for remembered queries.
# The largest number of each follows below.
_WINDOW_SHARE, _BLOCK_SHARE, _INTERVAL_SHARE, _QUERY_SHARE = 1 / 32, 1 / 32, 1 / 32, 1 / 16
_MAX_WINDOW, _MAX_BLOCK, _MAX_INTERVAL, _MAX_QUERIES = 32, 32, 512, 512


class TooLittleMemoryError(ValueError):
    """The memory is too small for the entries that are always kept of a text."""


def check_equal_layers(modules: Iterable[nn.Module], policy: Policy) -> None:
    """Raise an error if layers whose entries have different sizes share a budget.

    Raises:
        ValueError: the parameters of the attention modules have different shapes, and the policy moves budget from one
            layer to another.

    """
    if isinstance(policy.allocation, (Equal, AdaKV)):
        return
    shapes = {tuple((name, x.shape) for name, x in module.named_parameters()) for module in modules}
    if len(shapes) > 1:
        raise ValueError(
            f"allocation must give each layer a budget of its own with memory=, because entries of this model's layers "
            f"have different sizes, got {policy.allocation}. Use allocation='equal'"
        )


@dataclass(frozen=True)
class LayerShape:
    """Sizes of the tensors of a layer, for one row of the batch and on this process.

    Args:
        num_heads: number of KV heads.
        key_dim: number of dimensions of a stored key.
        value_dim: number of dimensions of a stored value.
        element_size: bytes of a number in the model's dtype.
        query_bytes: bytes of the queries of one token.
        scored_query_dim: number of dimensions of the queries of all heads by which the policy scores entries.

    """

    num_heads: int
    key_dim: int
    value_dim: int
    element_size: int
    query_bytes: int
    scored_query_dim: int

    def full_bytes(self, num_tokens: int) -> int:
        """Return the bytes of all entries in the model's dtype."""
        return num_tokens * self.num_heads * (self.key_dim + self.value_dim) * self.element_size


@dataclass(frozen=True)
class MemoryPlan:
    """How a layer uses its memory.

    Args:
        num_entries: number of entries that a head may keep at an eviction, on average.
        quantization: how they are stored.
        interval: number of generated tokens between evictions.
        num_queries: number of newest queries that are remembered for the next eviction.

    """

    num_entries: int
    quantization: Quantization
    interval: int
    num_queries: int


@dataclass(frozen=True)
class MemoryBudget:
    """A limit on the bytes of a cache.

    Args:
        limit: fraction of the bytes of the full cache (float), or bytes of all compressed layers (int).
        policy: the policy of the cache.
        protection: which entries are always kept.
        evict_always: whether evictions continue after the prefill. Otherwise, the limit holds after the prefill only.
        bits: number of bits of keys and of values; None to choose them.
        interval: number of generated tokens between evictions; None to choose it.
        repair: whether entries are repaired.

    """

    limit: int | float
    policy: Policy
    protection: Protection
    evict_always: bool
    bits: tuple[int, int] | None = None
    interval: int | None = None
    repair: bool = False

    def bytes_of_row(self, full_bytes: int, num_parts: int) -> int:
        """Return the bytes that one row of a layer may take.

        Args:
            full_bytes: bytes of all entries of the row, including padding, in the model's dtype.
            num_parts: see `plan`.

        """
        if isinstance(self.limit, int):
            return self.limit // num_parts
        return int(self.limit * full_bytes + 1e-6)

    def plan(
        self, shape: LayerShape, num_tokens: int, num_parts: int, stored_bits: tuple[int, int] | None = None
    ) -> MemoryPlan:
        """Divide the memory of one row of a layer. Layers of the same shape share the result.

        Args:
            shape: sizes of the layer.
            num_tokens: number of tokens so far that can be read, including padding.
            num_parts: number of equal parts into which a limit in bytes is divided: layers times rows times processes.
            stored_bits: bits of the entries that are already stored; None if there are none.

        Raises:
            TooLittleMemoryError: the memory is too small for the entries that are always kept.

        """
        return self._plan_once(shape, num_tokens, num_parts, stored_bits)

    @functools.cached_property
    def _plan_once(self) -> Callable[[LayerShape, int, int, tuple[int, int] | None], MemoryPlan]:
        # A forward pass asks for the plan of each layer twice: before it changes any, and when the layer is reached.
        return functools.lru_cache(maxsize=4)(self._plan)

    def _plan(
        self, shape: LayerShape, num_tokens: int, num_parts: int, stored_bits: tuple[int, int] | None
    ) -> MemoryPlan:
        division = self._divide(shape, num_tokens, num_parts)
        bits = stored_bits or self.bits or division.choose_bits()
        num_entries = division.num_entries(bits)
        if division.fits_exactly:
            return division.plan(max(num_entries, num_tokens), bits, window=num_tokens + division.interval)
        if num_entries < division.min_entries:
            raise TooLittleMemoryError(self._too_small(shape, num_tokens, num_parts, bits))
        return division.plan(num_entries, bits, window=division.window)

    def _divide(self, shape: LayerShape, num_tokens: int, num_parts: int) -> _Division:
        return _Division(self, shape, self.bytes_of_row(shape.full_bytes(num_tokens), num_parts), num_tokens)

    def _too_small(self, shape: LayerShape, num_tokens: int, num_parts: int, bits: tuple[int, int]) -> str:
        what = "all entries (this policy evicts none)" if self.policy.keep_all else "the entries that always stay"
        if self.evict_always and self.interval is not None and self.interval > 1:
            what += f" and {self.interval} new tokens (interval)"
        needed = replace(self, limit=1)._enough(shape, num_tokens, num_parts, bits)
        if isinstance(self.limit, int):
            return f"memory must be at least {needed} bytes for {what}, got {self.limit} bytes"
        share = self._enough(shape, num_tokens, num_parts, bits)
        if share > 1:
            return (
                f"memory must be a number of bytes, at least {needed}, for a text of only {num_tokens} "
                f"{'token' if num_tokens == 1 else 'tokens'}, got {self.limit}: {what} take more bytes than a cache "
                "without compression"
            )
        return (
            f"memory must be at least {share:g} for {what} of a text of {num_tokens} tokens, got {self.limit}. Give a "
            f"larger fraction, or at least {needed} bytes"
        )

    def _enough(self, shape: LayerShape, num_tokens: int, num_parts: int, bits: tuple[int, int]) -> float:
        """Return a limit, of the same type as this one, in which the entries that are always kept fit.

        More memory also sets more aside for the newest entries and new tokens, so the limit is raised step by step.
        """
        full_bytes = shape.full_bytes(num_tokens)
        budget = self
        while (missing := (division := budget._divide(shape, num_tokens, num_parts)).missing_bytes(bits)) > 0:
            if isinstance(self.limit, int):
                limit = (division.memory + missing) * num_parts
            else:
                limit = math.ceil((division.memory + missing) / full_bytes * 1000) / 1000
            budget = replace(self, limit=limit)
        return budget.limit


class _Division:
    """The division of some memory of one row of a layer.

    Args:
        budget: settings of the cache.
        shape: sizes of the layer.
        memory: bytes.
        num_tokens: number of tokens so far.

    """

    def __init__(self, budget: MemoryBudget, shape: LayerShape, memory: int, num_tokens: int) -> None:
        self.memory = memory
        self._budget, self._shape, self._num_tokens = budget, shape, num_tokens
        weights = budget.policy.weights
        keeps_attention = budget.evict_always and weights.is_stateful
        self._index_bytes = 4 * (1 + keeps_attention + budget.policy.allocation.is_global + budget.repair)
        self._slot_bytes = (shape.key_dim + shape.value_dim) * shape.element_size + self._index_bytes
        # Means and scales of keys, sums of errors, the capacity, and the errors of a repair.
        self._head_bytes = 2 * shape.key_dim * shape.element_size + 20 + 8 * budget.repair
        self._state_bytes = len(weights.half_lives) * (8 * shape.scored_query_dim + 12) if budget.evict_always else 0

        def share(part: float, bytes_per_item: float, maximum: int) -> int:
            return max(1, min(int(part * memory / bytes_per_item), maximum))

        slot_bytes = shape.num_heads * self._slot_bytes
        self.window = share(_WINDOW_SHARE, slot_bytes, _MAX_WINDOW)
        self._block, self.interval, self._num_queries = 1, 0, 0
        if budget.evict_always:
            self._block = share(_BLOCK_SHARE, slot_bytes, _MAX_BLOCK)
            entry_bytes = shape.num_heads * (self._entry_bytes((5, 4)))
            self.interval = budget.interval or share(_INTERVAL_SHARE, entry_bytes, _MAX_INTERVAL)
            needed = weights.num_queries_needed
            needed = _MAX_QUERIES if needed is None else max(1, needed, NUM_REMEMBERED * budget.repair)
            self._num_queries = share(_QUERY_SHARE, 2 * (shape.query_bytes + 8), needed)

    def _entry_bytes(self, bits: tuple[int, int]) -> int:
        """Return the bytes of a quantized entry of one head, with its positions and columns."""
        dims = self._shape.key_dim, self._shape.value_dim
        return sum(VectorFormat(dim, b).bytes_per_vector for dim, b in zip(dims, bits, strict=True)) + self._index_bytes

    @property
    def _fixed_bytes(self) -> int:
        """Bytes of everything but entries."""
        positions = 4 * (self.interval + self._block + 1) if self._budget.evict_always else 0
        queries = 2 * self._num_queries * (self._shape.query_bytes + 8)
        return self._shape.num_heads * self._head_bytes + positions + queries + self._state_bytes

    @property
    def _num_slots(self) -> int:
        """Largest number of slots of exact entries in each head."""
        slots = NUM_SINKS + self.window
        return _with_spare(slots + self._block) if self._budget.evict_always else slots

    @property
    def fits_exactly(self) -> bool:
        """Whether all entries fit in the model's dtype."""
        slots = _with_spare(self._num_tokens + 1) if self._budget.evict_always else self._num_tokens
        slot_bytes = self._shape.num_heads * slots * self._slot_bytes
        return slot_bytes + self._fixed_bytes + 4 * self._num_tokens <= self.memory

    def choose_bits(self) -> tuple[int, int]:
        """Return the bits of keys and values; see the module's description."""
        if not self._has_fixed_bytes:
            for bits in ALL_ENTRIES:
                if self.num_entries(bits) >= self._num_tokens:
                    return bits
        for bits, share in SOME_ENTRIES.items():
            if self.num_entries(bits) >= max(self.min_entries, share * self._num_tokens):
                return bits
        return list(SOME_ENTRIES)[-1]

    @property
    def _has_fixed_bytes(self) -> bool:
        """Whether the bytes do not grow with the text, so that a smaller share of its entries fits later."""
        return isinstance(self._budget.limit, int) and self._budget.evict_always

    def num_entries(self, bits: tuple[int, int]) -> int:
        """Return how many entries of each head fit, on average; may be negative."""
        exact = self._shape.num_heads * self._num_slots * self._slot_bytes
        entry = self._shape.num_heads * self._entry_bytes(bits)
        quantized = (self.memory - self._fixed_bytes - exact) // entry - self.interval
        if quantized < 0:
            return quantized
        all_kept = quantized + self._num_exact(quantized) >= self._num_tokens
        if all_kept:  # the positions of all tokens are stored until the first eviction
            quantized = (self.memory - self._fixed_bytes - exact - 4 * self._num_tokens) // entry - self.interval
        return quantized + self._num_exact(quantized)

    def _num_exact(self, quantized: int) -> int:
        """Return how many entries of each head are exact in any case: the newest, and the first tokens of the text."""
        protection, policy = self._budget.protection, self._budget.policy
        num_kept = max(quantized, protection.min_budget)
        if num_kept >= self._num_tokens:
            return min(self.window, self._num_tokens)
        sinks, window = policy.protected_sizes(num_kept, self._num_tokens, protection)
        return min(self.window, min(sinks, NUM_SINKS) + window)

    @property
    def min_entries(self) -> int:
        """Number of entries of each head that must fit."""
        least = self._num_tokens if self._budget.policy.keep_all else max(self._budget.protection.min_budget, 1)
        return min(least, self._num_tokens)

    def missing_bytes(self, bits: tuple[int, int]) -> int:
        """Return about how many more bytes are needed for `min_entries`; 0 if they fit."""
        missing = 0 if self.fits_exactly else max(0, self.min_entries - self.num_entries(bits))
        return missing * self._shape.num_heads * self._entry_bytes(bits)

    def plan(self, num_entries: int, bits: tuple[int, int], window: int) -> MemoryPlan:
        """Return the plan with a number of entries."""
        quantization = Quantization(*bits, window=window, block=self._block)
        return MemoryPlan(num_entries, quantization, max(1, self.interval), self._num_queries)


def _with_spare(slots: int) -> int:
    return slots + num_spare_slots(slots, 1)
