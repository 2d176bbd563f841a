"""One layer of the cache: it computes attention over its entries, evicts entries, and stores the kept ones."""

from __future__ import annotations

import copy
import functools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from suffice.gpu import KernelFallbackError, async_tensor
from suffice.kv.attention.call import AttentionCall, check_right_padding, run_attention
from suffice.kv.attention.hook import AttentionObserver, attach_observer
from suffice.kv.attention.options import check_dropout
from suffice.kv.backend.torch_backend import TORCH_BACKEND, TorchBackend
from suffice.kv.backend.triton_backend import choose_backend
from suffice.kv.cache.eviction import (
    EvictionPlan,
    SelectedEntries,
    check_finite,
    commit_eviction,
    copy_entries,
    plan_eviction,
    repair_selection,
    select_entries,
    validate_eviction,
)
from suffice.kv.cache.global_budget import GlobalBudget
from suffice.kv.cache.memory import LayerShape, MemoryPlan
from suffice.kv.cache.recent_queries import RecentQueries
from suffice.kv.cache.report import HeadReport, describe_repairs
from suffice.kv.cache.settings import CacheSettings
from suffice.kv.cache.state import LayerState
from suffice.kv.hf.offload import materialized_weight
from suffice.kv.hf.rotary import RotaryEmbedding
from suffice.kv.hf.tensor_parallel import Sharding
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.deferred_checks import DeferredChecks
from suffice.kv.policy.layer_context import EntryPositions, LayerContext
from suffice.kv.storage.base import Entries, Storage, right_aligned_order
from suffice.kv.storage.quantized import QuantizedStorage

_CHUNKS_ARE_KEPT = (
    "the second forward pass over this CompressedCache has as many tokens as the first, so the prompt seems to be read "
    "in chunks. With evict='prefill', only the first pass evicts, and all tokens of later passes are kept. Use "
    "CompressedCache(..., evict='always') to read a prompt in chunks"
)


class CompressedLayer(DynamicLayer):
    """One full-attention layer of a `CompressedCache`.

    Each attention call goes through `pre_attention` (check and store the new tokens), the attention itself, and
    `post_attention`. An eviction (`eviction.py`) is planned in `pre_attention` and carried out in `post_attention`.

    Args:
        settings: settings of the cache.
        module: the attention module of the layer.
        rotary: its rotary embedding; None if its keys are not rotated; a str with the reason if it is not known.
        index: index of the layer in the model.
        order: index of the layer among the compressed layers.
        global_budget: shared by all layers; None if each layer has its own budget.
        rotaries_to_clear: rotary embeddings whose cached results are freed after the attention of this layer.

    """

    def __init__(
        self,
        settings: CacheSettings,
        *,
        module: nn.Module,
        rotary: RotaryEmbedding | str | None,
        index: int,
        order: int,
        global_budget: GlobalBudget | None,
        rotaries_to_clear: Sequence[RotaryEmbedding] = (),
    ) -> None:
        self.state = LayerState()
        super().__init__()
        self.settings = settings
        self.index, self.order = index, order
        self.global_budget = global_budget
        self._module = weakref.ref(module)
        self._rotary, self._rotaries_to_clear = rotary, tuple(rotaries_to_clear)
        self.reset()

    @property
    def storage(self) -> Storage | None:
        """Keys and values of the entries; None before the first token."""
        return self.state.storage

    # The base class assigns these two attributes. Here they are read from the storage.
    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Keys, right-aligned: [batch, num_key_value_heads, width, head_dim]; None before the first token."""
        return None if self.storage is None else self.storage.keys

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        """Ignore the assignments of the base class."""

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Values, right-aligned: [batch, num_key_value_heads, width, value_dim]; None before the first token."""
        return None if self.storage is None else self.storage.values

    @values.setter
    def values(self, values: Tensor | None) -> None:
        """Ignore the assignments of the base class."""

    def reset(self) -> None:
        """Remove all tokens."""
        self.state = LayerState()
        if self.global_budget is not None:
            self.global_budget.forget(self.order)
        self.is_initialized = False
        self.awaits_attention = False  # between `update` and the attention call that follows it
        self._plan: EvictionPlan | None = None  # for the current attention call
        self._memory: MemoryPlan | None = None  # for the current attention call; None if the memory is not limited
        self._shape: LayerShape | None = None  # of the last attention call, if the memory is limited
        self._new_positions = torch.empty(0)  # of the tokens of the current attention call, [batch, new]
        self.on_attention: Callable[[CompressedLayer, AttentionCall], None] | None = None  # called after each call

    # ---- New tokens -------------------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys and values for the attention call, in which `attend` stores them."""
        if self.awaits_attention:
            raise ValueError(
                f"layer {self.index} of a CompressedCache must get keys once in a forward pass, got them twice: no "
                "attention call reached the cache in between"
            )
        self.awaits_attention = True
        if self.storage is None:
            self.dtype, self.device = key_states.dtype, key_states.device
        elif key_states.dtype != self.dtype:
            self.awaits_attention = False
            raise ValueError(
                f"keys of the model must have the dtype of the cache, {self.dtype}, got {key_states.dtype}. Make a new "
                "CompressedCache after the model's dtype has changed"
            )
        return self.observe_call(key_states, self), value_states

    def observe_call(self, keys: Tensor, observer: AttentionObserver) -> Tensor:
        """Return the keys for the attention call that follows, which the observer computes."""
        return attach_observer(keys, observer)

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Compute an attention call over all entries and evict; see `AttentionObserver.attend`."""
        self.pre_attention(call)
        if self.storage is None:
            output, attention = run_attention(call)
        else:
            output, attention = self.storage.attend(call, choose_backend(call.query, call.key, call.value))
        self.post_attention(call, attention)
        return output, attention

    @property
    def new_positions(self) -> Tensor:
        """Positions of the tokens of the current attention call, long [batch, new]; negative for masked tokens."""
        return self._new_positions

    @property
    def max_readable(self) -> int | None:
        """Number of entries that the next token can read; None if it can read all."""
        return None

    def owns(self, call: AttentionCall) -> bool:
        """Return whether an attention call comes from the attention module of this layer."""
        return call.module is self._module()

    def pre_attention(self, call: AttentionCall) -> None:
        """Check an attention call, plan the eviction after it, and store its new tokens.

        The tokens of the first call are stored by the eviction, in `post_attention`.

        Raises:
            ValueError: the call belongs to another model, has dropout, or has padding that is not on the left, or the
                protected entries do not fit into the budget.

        """
        if not self.owns(call):
            raise ValueError(
                f"past_key_values must be a CompressedCache of the model that is called, got one whose layer "
                f"{self.index} was made for a different attention module. Make a CompressedCache with this model"
            )
        self.awaits_attention = False
        check_dropout(call.options)
        self._check_replay(call)
        padding = call.padding
        if self.storage is None:
            check_right_padding(padding)
        batch, _, num_new, _ = call.key.shape
        state = self.state.append_tokens(num_new, padding, batch)
        self._shape = None if self.settings.memory is None else self.shape(call)
        self._memory = self._plan_memory(state.num_seen, batch)
        self._plan = plan_eviction(
            self.settings,
            state.rows,
            num_input_tokens=state.num_seen,
            num_appended=state.num_appended,
            num_new=num_new,
            is_first=self.storage is None,
            max_readable=self.max_readable,
            memory=self._memory,
        )
        if self.settings.repair and self._plan is not None:
            self._plan.check_repair()
        if self.order == 0 and self._looks_like_a_second_chunk(num_new):
            warnings.warn(_CHUNKS_ARE_KEPT, stacklevel=2)
        self._new_positions = state.new_positions(num_new, padding, self.device)
        if self.storage is not None:
            self.storage.append(call.key, call.value, self._new_positions, padded=padding is not None)
        self.state = state  # counts the new tokens after they are stored
        self.is_initialized = True

    def _check_replay(self, call: AttentionCall) -> None:
        """Raise an error if the policy scores the entries of a prompt in a replay, and the prompt was not replayed."""
        policy = self.settings.policy
        if self.storage is None and not policy.replay_kinds <= call.replay_scores.keys():
            raise ValueError(
                "past_key_values must be filled by suffice.kv.prefill(model, inputs, [cache], tokenizer=tokenizer) "
                f"with policy {policy.name!r}, which scores entries in a second pass over the prompt, got an empty "
                "cache"
            )

    def check_memory(self, num_new: int) -> None:
        """Check that the memory is large enough after more tokens, before a forward pass changes any layer.

        Args:
            num_new: number of new tokens.

        Raises:
            ValueError: the memory is too small for the entries that are always kept.

        """
        self._plan_memory(self.state.num_seen + num_new, len(self.state.rows))

    def _plan_memory(self, num_seen: int, batch_size: int) -> MemoryPlan | None:
        """Return how the layer uses its memory after some tokens; None if it is not limited or its shape not known."""
        memory = self.settings.memory
        if memory is None or self._shape is None or (self.storage is not None and not memory.evict_always):
            return None
        stored_bits = None if self.storage is None else self.storage.bits
        num_tokens = min(num_seen, self.max_readable or num_seen)
        return memory.plan(self._shape, num_tokens, self._num_parts(self._shape.num_heads, batch_size), stored_bits)

    def _num_parts(self, num_heads: int, batch_size: int) -> int:
        """Return into how many parts a limit on the bytes of the whole cache is divided."""
        sharding = self._sharding(num_heads)
        num_processes = 1 if sharding is None else sharding.world_size
        return self.settings.num_layers * batch_size * num_processes

    def shape(self, call: AttentionCall) -> LayerShape:
        """Return the sizes of the tensors of the layer."""
        query_dim = call.query.shape[1] * call.query.shape[3]
        return LayerShape(
            num_heads=call.key.shape[1],
            key_dim=call.key.shape[-1],
            value_dim=call.value.shape[-1],
            element_size=call.key.element_size(),
            query_bytes=query_dim * call.query.element_size(),
            scored_query_dim=query_dim,
        )

    def _looks_like_a_second_chunk(self, num_new: int) -> bool:
        """Return whether a prompt seems to be read in chunks of equal size, all of which are kept after the first."""
        settings = self.settings
        may_evict = not settings.policy.keep_all and settings.budget != 1.0
        return may_evict and not settings.evict_always and 1 < num_new == self.state.num_seen

    def post_attention(self, call: AttentionCall, attention: Tensor | None) -> None:
        """Evict entries after the attention of a call has been computed, if an eviction is planned."""
        with torch.no_grad():
            if self.on_attention is not None:
                self.on_attention(self, call)
            if self.settings.evict_always:
                needed = self.settings.num_queries_needed
                needed = None if needed is None else max(1, needed)
                if self._memory is not None and call.query.shape[2] == 1:
                    needed = min(needed or self._memory.num_queries, self._memory.num_queries)
                queries = self.state.queries
                if needed is not None and self.state.has_holes:
                    needed = queries.append(call.query, self._new_positions, None).num_slots(needed)
                queries = queries.append(call.query, self._new_positions, needed)
                self.state = replace(self.state, queries=queries)
            if self._plan is not None:
                self._evict(self._plan, call, attention)
            self._limit_memory()
            self.end_attention()
        for rotary in self._rotaries_to_clear:
            rotary.clear_cache()

    def _limit_memory(self) -> None:
        """Forget queries, and shorten the window of exact entries, as the plan of the memory says."""
        if self._memory is None:
            return
        queries = self.state.queries
        if len(queries) > 2 * self._memory.num_queries:
            self.state = replace(self.state, queries=queries.newest(self._memory.num_queries))
        if isinstance(self.storage, QuantizedStorage):
            self.storage.quantization = self._memory.quantization

    def end_attention(self) -> None:
        """Let the storage quantize new entries, after the attention of a pass has read them."""
        if self.storage is not None:
            self.storage.end_attention()

    def free(self) -> None:
        """Free the entries, but not the counts of the tokens. The layer cannot be used for further tokens."""
        self.state = replace(self.state, storage=None, queries=RecentQueries())

    def end_pass(self) -> None:
        """Free the data of one forward pass."""

    # ---- Eviction ---------------------------------------------------------------------------------------------------

    def _evict(self, plan: EvictionPlan, call: AttentionCall, attention: Tensor | None) -> None:
        entries = self._entries(call)
        backend = choose_backend(call.query, call.key, call.value)
        try:
            selection, storage = self._select_and_validate(plan, entries, call, attention, backend)
        except KernelFallbackError:
            if call.memo is not None:
                call.memo.clear()  # other caches share it, and must not use the results of the kernels
            selection, storage = self._select_and_validate(plan, entries, call, attention, TORCH_BACKEND)
        if self.global_budget is not None and selection.other_layers is not None:
            self.global_budget.drop_from_other_layers(selection.other_layers)
        self.state = commit_eviction(plan, selection, storage, self.state, self.settings)
        if self.global_budget is not None:
            self.global_budget.register(self.order, self.storage)

    def _entries(self, call: AttentionCall) -> Entries:
        """Return all entries of the layer. If masked tokens follow other tokens, their slots are moved to the front."""
        if self.storage is None:
            entries = Entries(call.key, call.value, self._new_positions[:, None])
        else:
            entries = self.storage.entries
        return entries.right_aligned() if self.state.has_holes else entries

    def _queries(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Return the queries for the weights, [batch, num_heads, queries, head_dim], and their positions."""
        state = self.state
        new_positions = self._new_positions[:, -call.query.shape[2] :]  # a replay passes the last queries only
        remembered = state.queries if len(state.queries) else RecentQueries((call.query,), (new_positions,))
        queries, positions = remembered.join()
        num_queries = queries.shape[2]
        counts = [row.num_appended + state.num_appended for row in state.rows]
        if self.settings.num_queries_needed is None and min(counts) < num_queries:
            # Rows evict at different times. A row needs only the queries since its own last eviction.
            age = torch.arange(num_queries - 1, -1, -1, device=positions.device)
            positions = positions.masked_fill(age >= async_tensor(counts, positions.device)[:, None], -1)
        if state.has_holes:
            queries, positions = RecentQueries((queries,), (positions,)).right_aligned().join()
        return queries, positions

    def _select_and_validate(
        self,
        plan: EvictionPlan,
        entries: Entries,
        call: AttentionCall,
        attention: Tensor | None,
        backend: TorchBackend,
    ) -> tuple[SelectedEntries, Storage | None]:
        """Select the entries to keep, copy them (see `copy_entries`), and validate both, without changing the layer."""
        stats = self._stats(plan, entries, call, attention)
        try:
            selection = select_entries(plan, self.settings, entries, stats, backend, self.global_budget)
        except ValueError:
            check_finite(entries, self.index)  # NaN causes other errors first, which do not name the layer
            raise
        if self.settings.repair and (self.global_budget is None or self.global_budget.is_decided):
            # Entries that are quantized already stay as they are.
            selection = repair_selection(selection, stats, refit_values=not isinstance(self.storage, QuantizedStorage))
        is_quantized = plan.storage.bits is not None
        query_sizes = self.query_sizes(call) if is_quantized and self.storage is None else None
        storage = copy_entries(plan, selection, self.state, self.settings, query_sizes)
        validate_eviction(stats, entries, storage, self.index)
        return selection, storage

    def _stats(
        self, plan: EvictionPlan, entries: Entries, call: AttentionCall, attention: Tensor | None
    ) -> AttentionStats:
        queries, query_positions = self._queries(call)
        scored_queries, keys, values = self.scored_tensors(queries, entries)
        sharding, has_holes = self._sharding(keys.shape[1]), self.state.has_holes
        if self.storage is None and not has_holes and keys.shape[2] == self.state.num_seen:
            valid = entries.positions[:, 0] >= 0 if any(self.state.num_padding) else None
            positions = EntryPositions(valid=valid, num_seen=plan.num_seen)
        else:
            positions = EntryPositions(
                entries=entries.positions, queries=query_positions, rope=entries.rope_positions, num_seen=plan.num_seen
            )
        # With sinks, some models return the weights before the sinks are taken into account.
        has_weights = call.sink_logits is None and not has_holes and queries.shape[2] == call.query.shape[2]
        return AttentionStats(
            scored_queries,
            keys,
            values,
            positions=positions,
            scaling=call.scaling,
            softcap=call.softcap,
            sink_logits=call.sink_logits,
            attention=attention if has_weights else None,
            output_weight=self.output_weight(),
            rotary=self._rotary,
            state=replace(self.state.weight_state, attention_received=entries.columns.get("attention_received")),
            logit_bias=entries.logit_bias,
            replay_scores=self._replay_scores(call),
            context=LayerContext(self.order, self.settings.num_layers, self.settings.max_entries, sharding),
            # If processes share the heads, an error must stop all of them at the same step: check immediately.
            checks=DeferredChecks() if sharding is None else None,
            # With `evict_always`, caches cannot share statistics, which depend on the state of each cache.
            memo=None if self.settings.evict_always else call.memo,
        )

    def _replay_scores(self, call: AttentionCall) -> Mapping[str, Tensor]:
        """Return the scores from a replay. If masked tokens follow other tokens, their slots are moved to the front."""
        if not self.state.has_holes or not call.replay_scores:
            return call.replay_scores
        order = right_aligned_order(self._new_positions[:, None])
        return {kind: x.gather(2, order.expand_as(x)) for kind, x in call.replay_scores.items()}

    def query_sizes(self, call: AttentionCall) -> Tensor | None:
        """Return the root mean square of the queries, [batch, num_key_value_heads, head_dim].

        None if the queries do not multiply the stored keys.
        """
        queries = call.query
        is_token = (self._new_positions[:, -queries.shape[2] :] >= 0)[:, None, :, None]
        if call.padding is not None:
            queries = queries.masked_fill(~is_token, 0)
        counts = is_token.sum(2).clamp_min(1)
        dtype = torch.promote_types(queries.dtype, torch.float32)
        squares = torch.linalg.vector_norm(queries, dim=2, dtype=dtype).square() / counts
        return squares.unflatten(1, (call.key.shape[1], -1)).mean(2).sqrt()

    def scored_tensors(self, queries: Tensor, entries: Entries) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values by which entries are scored."""
        return queries, entries.keys, entries.values

    def output_weight(self) -> Callable[[], Tensor | None] | None:
        """Return a function that loads the weight of the output projection, [hidden, heads * value_dim]."""
        projection = getattr(self._module(), "o_proj", None)
        return None if projection is None else functools.partial(materialized_weight, projection, "weight")

    def _sharding(self, num_heads: int) -> Sharding | None:
        sharding = self.settings.sharding
        return sharding if sharding is not None and sharding.is_split(num_heads) else None

    # ---- Interface of the cache layers of transformers --------------------------------------------------------------

    def get_seq_length(self, *args: Any) -> int:
        """Return the number of tokens seen, including padding: the position of the next one."""
        return self.state.num_seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return length and offset of the mask. It covers the new tokens only; the storage extends it to all entries.

        Args:
            query_length: number of new tokens; transformers 5.2 passes their positions instead.

        """
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return new, self.state.num_seen

    @property
    def is_croppable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether new tokens can be removed again, as assisted decoding does."""
        return not self.settings.evict_always

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens.

        Args:
            tokens_to_remove: minus the number of tokens to remove. If it is positive, as in transformers, it is the
                number of tokens to keep.

        Raises:
            ValueError: a head has evicted the entry of a token to remove.

        """
        self.state = self.state.drop_last(self.check_crop(tokens_to_remove))

    def check_crop(self, tokens_to_remove: int) -> int:
        """Return how many tokens `crop` removes, without removing them; raise an error if it cannot."""
        num_seen = self.state.num_seen
        count = num_seen - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if count > self.state.num_droppable:
            raise ValueError(
                f"crop must remove at most {self.state.num_droppable} tokens from a CompressedCache, whose heads have "
                f"evicted entries of earlier tokens, got {count}. Evicted entries cannot be restored"
            )
        return count

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of the batch, as beam search does."""
        self.state = self.state.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self.state = self.state.select_rows(torch.arange(len(self.state.rows)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        if self.state.rows:
            self.state = self.state.select_rows(torch.arange(len(self.state.rows))[indices.cpu()])

    def copy(self, global_budget: GlobalBudget | None) -> CompressedLayer:
        """Return a layer that shares the stored tensors. Changes to one layer do not affect the other."""
        other = copy.copy(self)
        if self.storage is not None:
            other.state = replace(self.state, storage=self.storage.copy())
        other.global_budget = global_budget
        if global_budget is not None:
            global_budget.register(self.order, other.storage)
        return other

    # ---- Report -----------------------------------------------------------------------------------------------------

    @property
    def num_key_value_heads(self) -> int:
        """Number of KV heads of the layer on this process."""
        assert self.storage is not None
        return self.storage.num_kept.shape[1]

    @property
    def bytes_full(self) -> int:
        """Bytes of keys and values that a cache of transformers would store, without eviction and with padding."""
        if self.storage is None:
            return 0
        num_tokens = len(self.state.rows) * self.state.num_seen
        return num_tokens * self.num_key_value_heads * self.storage.bytes_per_entry

    @property
    def bytes_state(self) -> int:
        """Bytes of what the policy remembers for the next eviction."""
        return self.state.nbytes

    @property
    def bytes_limit(self) -> int | None:
        """Bytes that the layer may hold, with positions and what the policy remembers; None for no limit."""
        memory, num_rows = self.settings.memory, len(self.state.rows)
        if memory is None or self.storage is None or (self.state.num_appended and not memory.evict_always):
            return None
        num_parts = self._num_parts(self.num_key_value_heads, num_rows)
        return num_rows * memory.bytes_of_row(self.bytes_full // num_rows, num_parts)

    def head_reports(self) -> list[HeadReport]:
        """Return one report for each KV head; none before the first token."""
        if self.storage is None:
            return []
        heads = self.num_key_value_heads
        sharding = self._sharding(heads)
        first_head = 0 if sharding is None else sharding.rank * heads  # index of the first head in the whole model
        kept = self.storage.num_kept.sum(0).tolist()
        nbytes = self.storage.nbytes_by_head
        capacity = self.state.capacity
        shares = [None] * heads if capacity is None else capacity.mean(0).tolist()
        errors = [error or (None, None) for error in self.storage.quantization_errors]
        repairs = [None] * heads if self.state.repair_errors is None else describe_repairs(self.state.repair_errors)
        return [
            HeadReport(
                layer=self.index,
                head=first_head + head,
                tokens_seen=len(self.state.rows) * self.state.num_seen - sum(self.state.num_padding),
                tokens_kept=kept[head],
                bytes_full=self.bytes_full // heads,
                bytes_kept=nbytes[head],
                capacity_retained=shares[head],
                bits=self.storage.bits,
                key_error=errors[head][0],
                value_error=errors[head][1],
                repair=repairs[head],
            )
            for head in range(heads)
        ]
