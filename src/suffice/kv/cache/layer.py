"""One layer of the cache: it watches attention calls, evicts, and stores what is kept."""

from __future__ import annotations

import copy
import functools
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from suffice.gpu import KernelFallbackError, async_tensor, disable_kernels
from suffice.kv.attention.hook import Call, mark
from suffice.kv.attention.padding import check_padding, whole_mask
from suffice.kv.budget.protection import tokens_allowed
from suffice.kv.cache.global_budget import Pool, renewed
from suffice.kv.cache.rerotation import compacted
from suffice.kv.cache.settings import Settings
from suffice.kv.hf.offload import materialized_weight
from suffice.kv.hf.rotary import RotaryEmbedding, find_rotate_half
from suffice.kv.hf.tensor_parallel import Sharding
from suffice.kv.policy.attention_stats import Signals
from suffice.kv.policy.capacity_share import capacity_share
from suffice.kv.policy.deferred_checks import Verdicts
from suffice.kv.policy.query_moments import Moments
from suffice.kv.storage.quantized import QuantizedStorage
from suffice.kv.storage.ragged import RaggedStorage, store
from suffice.kv.storage.ragged_attention import attend
from suffice.kv.storage.uniform import Entries, UniformStorage, all_finite


class CompressedLayer(DynamicLayer):
    """One full-attention layer of a `CompressedCache`."""

    is_croppable = False

    def __init__(
        self,
        settings: Settings,
        *,
        module: nn.Module,
        rotary: RotaryEmbedding | None,
        index: int,
        layer: int,
        pool: Pool | None,
    ) -> None:
        self.storage: UniformStorage | RaggedStorage | None = None
        super().__init__()
        self.settings = settings
        self.index, self.layer = index, layer
        self.pool = pool
        self._module = weakref.ref(module)
        self._rotary = rotary
        self.reset()

    # The base class assigns keys and values; here they live in the storage.
    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Stored keys [batch, kv_heads, width, dim]."""
        return self.storage.keys if isinstance(self.storage, UniformStorage) else self._padded("keys")

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        """Ignore what the base class assigns."""

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Stored values [batch, kv_heads, width, value_dim]."""
        return self.storage.values if isinstance(self.storage, UniformStorage) else self._padded("values")

    @values.setter
    def values(self, values: Tensor | None) -> None:
        """Ignore what the base class assigns."""

    def _padded(self, name: str) -> Tensor | None:
        return None if self.storage is None else getattr(self.storage.entries, name)

    def reset(self) -> None:
        """Forget everything seen."""
        self.storage = None
        self.is_initialized = False
        self.waiting = False
        self.evicted = False
        self.seen = 0  # columns of the model's input so far, padding included
        self.appended = 0  # of these, since the last eviction
        self.held: list[int] = []  # entries that each row held then, in the mean over heads and layers
        self._due: list[bool] = []  # which rows evict after the call under way; none if it is empty
        self.padding: list[int] = []  # left padding of each row
        self.capacity: Tensor | None = None  # share retained, [batch, kv_heads]
        self.queries: tuple[Tensor, ...] = ()  # the newest, [batch, heads, m, dim], as far as evictions need them
        self.moments: dict[float, Moments] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values; the attention call that they lead here stores them."""
        if self.waiting:
            raise ValueError(
                f"layer {self.index} of a CompressedCache got keys twice in one forward pass: its attention did not "
                "reach the cache in between. Models whose layers share keys and values are not supported"
            )
        self.waiting = True
        if self.storage is None:
            self.dtype, self.device = key_states.dtype, key_states.device
        return mark(key_states, self), value_states

    def before(self, call: Call) -> Call | None:
        """Check an attention call over this layer's keys; return it over all entries, None if they are ragged."""
        if call.module is not self._module():
            raise ValueError(
                f"past_key_values is a CompressedCache of another model: layer {self.index} was made for a "
                "different attention module. Make a CompressedCache with the model that you call"
            )
        self.waiting = False
        added = call.padding
        check_padding(added, self.padding, self.seen)
        batch, _, new, _ = call.key.shape
        padding = self.padding or [0] * batch
        if added is not None:
            padding = [before + now for before, now in zip(padding, added.tokens, strict=True)]
        self._due = self._rows_due(new, padding)
        self.padding = padding
        self.seen += new
        self.appended += new
        self.is_initialized = True
        if self.storage is None:
            return call
        self.storage.append(call.key, call.value, self._positions(new), padded=added is not None)
        if isinstance(self.storage, RaggedStorage):
            return None
        return replace(call, key=self.storage.keys, value=self.storage.values, mask=whole_mask(call, self.storage))

    def _positions(self, new: int) -> Tensor:
        """Index of the newest tokens within each row's own text, [batch, new]; negative on padding."""
        columns = torch.arange(self.seen - new, self.seen, device=self.device)
        if not any(self.padding):
            return columns.expand(len(self.padding), -1)
        return columns - async_tensor(self.padding, columns.device)[:, None]

    def attend(self, call: Call) -> Tensor:
        """Compute an attention call over ragged entries."""
        assert isinstance(self.storage, RaggedStorage)
        for name in ("softcap", "s_aux"):
            if call.options.get(name) is not None:
                raise ValueError(
                    f"the model's attention uses {name}, which heads of unequal length do not support; accepted: "
                    "a policy whose allocation is Equal or Pyramid"
                )
        mask = call.mask
        if mask is not None:
            mask = mask[..., -call.key.shape[2] :]
            mask = mask if mask.dtype == torch.bool else mask == 0
        return attend(call.query, self.storage, mask, call.scaling or call.query.shape[-1] ** -0.5)

    def after(self, call: Call, attention: Tensor | None) -> None:
        """Evict where it is due, once the attention has been computed."""
        own = self.settings
        with torch.no_grad():
            if own.always:
                self._remember(call.query)
            if self._due:
                self._evict(call, attention)
            if isinstance(self.storage, QuantizedStorage):
                self.storage.settle()
        if self.layer == own.layers - 1 and self._rotary is not None:
            self._rotary.clear_cache()

    def _rows_due(self, new: int, padding: list[int]) -> list[bool]:
        """Return which rows are to evict after a call of `new` tokens, given each one's padding; [] for none.

        Raises:
            ValueError: what is protected does not fit; nothing is stored yet.

        """
        own = self.settings
        if self.storage is not None and not own.always:
            return []
        seen = [self.seen + new - columns for columns in padding]
        allowed = [tokens_allowed(own.budget, count) for count in seen]
        if self.storage is None or new > 1:
            due = [True] * len(seen)
        else:
            appended = self.appended + new
            due = [h + appended - a >= own.interval for h, a in zip(self.held, allowed, strict=True)]
        for tokens, count, now in zip(allowed, seen, due, strict=True):
            if now:
                own.policy.sizes(tokens, count, own.protection)
        return due if any(due) else []

    def _remember(self, query: Tensor) -> None:
        """Keep the newest queries as far as the policy looks back."""
        observed = self.settings.policy.observed
        if observed is None:  # all since the last eviction, which forgot the earlier ones
            self.queries = (*self.queries, query)
            return
        needed = max(1, observed)
        # A slice would keep all of a long call's queries alive.
        query = query[:, :, -needed:].clone() if query.shape[2] > needed else query
        held = [*self.queries, query]
        while sum(x.shape[2] for x in held[1:]) >= needed:
            held.pop(0)
        self.queries = tuple(held)

    def _evict(self, call: Call, attention: Tensor | None) -> None:
        if self.storage is None:
            entries = Entries(call.key, call.value, self._positions(call.key.shape[2])[:, None])
        else:
            entries = self.storage.entries
        try:
            self._choose(entries, self._signals(call, entries, attention))
        except KernelFallbackError:
            if call.memo is not None:
                call.memo.clear()
            with disable_kernels():
                self._choose(entries, self._signals(call, entries, attention))

    def _choose(self, entries: Entries, signals: Signals) -> None:
        """Evict from all entries what the policy does not keep; if scores can't be had, nothing has changed."""
        own = self.settings
        seen = signals.seen_tokens
        # Rows that are not due keep all that they hold.
        allowed = [
            tokens_allowed(own.budget, count) if due else count for count, due in zip(seen, self._due, strict=True)
        ]
        # What remembers goes on remembering, and what competes claims, also where all may stay.
        goes_on = own.always and (own.policy.weights.remembers or self.pool is not None)
        if own.policy.keep_all or (allowed == seen and not goes_on):
            stored: UniformStorage | RaggedStorage = self.storage or UniformStorage.all(
                entries, padded=any(self.padding)
            )
            self._require_finite(stored, signals)
            self.capacity = torch.ones(signals.batch, signals.kv_heads) if own.measure_capacity else None
            self._store(stored, allowed)
            return
        budget = own.policy.budget(signals, allowed, own.protection)
        if self.pool is None:
            kept = own.policy.select(signals, budget)
        else:
            request = own.policy.request(signals, allowed, own.protection)
            claims = self.pool.claims(signals, own.policy, budget, request)
            entries.columns["claim"] = renewed(claims, entries, self._due)
            kept = self.pool.admit(self.layer, entries.columns["claim"], allowed, signals.sharding)
        if own.always and signals.next_received is not None:
            entries.columns["received"] = signals.next_received
        if own.compact and self._rotary is not None:
            entries = compacted(signals, entries, kept, self._rotary)
        counts = budget.tokens if self.pool is None and own.policy.selection.as_budgeted else None
        if self.storage is not None:
            signals.settle()  # what has moved within its buffers can't be chosen again
        ragged = own.policy.allocation.ragged
        stored = store(entries, kept, counts, ragged=ragged, earlier=None if own.compact else self.storage)
        capacity = capacity_share(signals, kept) if own.measure_capacity else None
        self._require_finite(stored, signals)
        self.capacity = capacity
        self.evicted = self.evicted or allowed != seen
        self.moments = signals.next_moments
        self._store(stored, allowed)
        if own.policy.observed is None:
            self.queries = ()

    def _require_finite(self, stored: UniformStorage | RaggedStorage, signals: Signals) -> None:
        """Ask for everything that has to hold of this layer."""
        error = f"keys or values of layer {self.index} contain NaN or Inf: nothing was cached"
        signals.require(all_finite(stored), ValueError(error))
        signals.settle()

    def _store(self, stored: UniformStorage | RaggedStorage, allowed: list[int]) -> None:
        earlier = self.held or [0] * len(allowed)
        self.held = [min(a, h + self.appended) for a, h in zip(allowed, earlier, strict=True)]
        quantization = self.settings.quantization
        if quantization is not None and type(stored) is UniformStorage:
            stored = QuantizedStorage(stored, quantization)
        self.storage = stored
        self.appended = 0
        if self.pool is not None and isinstance(stored, RaggedStorage):
            self.pool.settle(self.layer, stored)

    def _signals(self, call: Call, entries: Entries, attention: Tensor | None) -> Signals:
        queries = torch.cat(self.queries, dim=2) if self.queries else call.query
        projection = getattr(call.module, "o_proj", None)
        first = self.storage is None
        sharding = self._sharding(entries.keys.shape[1])
        return Signals(
            queries,
            entries.keys,
            entries.values,
            valid=entries.positions[:, 0] >= 0 if first and any(self.padding) else None,
            positions=None if first else entries.positions,
            query_positions=None if first else self._positions(queries.shape[2]),
            places=entries.places,
            scaling=call.scaling,
            layer=self.layer,
            layers=self.settings.layers,
            most=self.settings.most,
            output=None if projection is None else functools.partial(materialized_weight, projection, "weight"),
            rotary=self._rotary,
            rotate=find_rotate_half(call.module),
            attention=attention if queries.shape[2] == call.query.shape[2] else None,
            received=entries.columns.get("received"),
            moments=self.moments,
            sharding=sharding,
            seen_tokens=[max(0, self.seen - columns) for columns in self.padding],
            # Processes that choose together must not part ways.
            verdicts=Verdicts() if sharding is None else None,
            # Where the budget holds at all times, what was asked of the signals is carried on.
            memo=None if self.settings.always else call.memo,
        )

    def _sharding(self, heads: int) -> Sharding | None:
        own = self.settings.sharding
        return own if own is not None and own.is_split(heads) else None

    def get_seq_length(self, *args: Any) -> int:
        """Return how many tokens were seen, padding included: the position of the next one."""
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return (length, offset) of the keys that the mask shall cover: the new tokens; the rest is added here.

        Args:
            query_length: number of new tokens; transformers 5.2 passes their positions instead.

        """
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return new, self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; refused once entries were evicted, because they can't be put back.

        Args:
            tokens_to_remove: minus the number to forget; a positive number is the length to keep.

        """
        if self.evicted:
            raise ValueError(
                "crop of a CompressedCache that has evicted entries is refused: what was evicted can't be put back. "
                "Use budget=1.0, or generate without assisted decoding"
            )
        remove = self.seen - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if self.storage is None or remove <= 0:
            return
        self.storage.drop_last(remove)
        self.seen -= remove
        self.appended = max(0, self.appended - remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of the batch, as beam search does."""
        self._rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._rows(torch.arange(len(self.padding)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        if self.padding:
            self._rows(torch.arange(len(self.padding))[indices.cpu()])

    def _rows(self, index: Tensor) -> None:
        if self.storage is None:
            return
        self.storage.rows(index)
        if self.capacity is not None:
            self.capacity = self.capacity.index_select(0, index.to(self.capacity.device))
        self.queries = tuple(own.index_select(0, index.to(own.device)) for own in self.queries)
        rows = index.tolist()
        self.padding, self.held = ([own[row] for row in rows] for own in (self.padding, self.held))
        self.moments = {half_life: own.rows(index) for half_life, own in self.moments.items()}

    def copy(self, pool: Pool | None) -> CompressedLayer:
        """Return a layer that shares the stored tensors; what is done to one does not show in the other."""
        other = copy.copy(self)
        other.storage = None if self.storage is None else self.storage.copy()
        other.pool = pool
        if pool is not None and isinstance(other.storage, RaggedStorage):
            pool.settle(self.layer, other.storage)
        return other

    @property
    def bytes_full(self) -> int:
        """Bytes of keys and values had nothing been evicted, padding included as transformers stores it."""
        if self.storage is None:
            return 0
        return len(self.padding) * self.heads * self.seen * self.storage.nbytes_entry

    @property
    def heads(self) -> int:
        """KV heads."""
        assert self.storage is not None
        return self.storage.kept.shape[1]

    @property
    def first_head(self) -> int:
        """Which of the model's KV heads the first one here is: not 0 where heads are split over devices."""
        sharding = self._sharding(self.heads)
        return 0 if sharding is None else sharding.rank * self.heads
