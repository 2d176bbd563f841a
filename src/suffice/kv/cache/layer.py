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
from suffice.kv.cache.layer_memory import LayerMemory, layer_shape
from suffice.kv.cache.memory import LayerShape
from suffice.kv.cache.query_moments import MIN_QUERIES, second_moments
from suffice.kv.cache.recent_queries import RecentQueries
from suffice.kv.cache.settings import CacheSettings
from suffice.kv.cache.state_layer import StateLayer
from suffice.kv.hf.offload import materialized_weight
from suffice.kv.hf.rotary import RotaryEmbedding
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


class CompressedLayer(StateLayer):
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

    Attributes:
        new_positions: positions of the tokens of the current attention call, long [batch, new]; negative for masked
            tokens.
        memory: how the layer uses its memory in the current attention call.

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
        super().__init__(settings)
        self.index, self.order = index, order
        self.global_budget = global_budget
        self._module = weakref.ref(module)
        self.rotary, self._rotaries_to_clear = rotary, tuple(rotaries_to_clear)
        self.reset()

    def reset(self) -> None:
        """Remove all tokens."""
        super().reset()
        if self.global_budget is not None:
            self.global_budget.forget(self.order)
        self.awaits_attention = False  # between `update` and the attention call that follows it
        self._plan: EvictionPlan | None = None  # for the current attention call
        self.memory = LayerMemory(self.settings)
        self.new_positions = torch.empty(0)
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
    def module(self) -> nn.Module | None:
        """The attention module of the layer; None if the model no longer exists."""
        return self._module()

    @property
    def max_readable(self) -> int | None:
        """Number of entries that the next token can read; None if it can read all."""
        return None

    def owns(self, call: AttentionCall) -> bool:
        """Return whether an attention call comes from the attention module of this layer."""
        return call.module is self.module

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
        if self.settings.memory is not None:
            self.memory = self.memory.begin_call(self.shape(call), state, self.max_readable)
        self._plan = plan_eviction(
            self.settings,
            state.rows,
            num_input_tokens=state.num_seen,
            num_appended=state.num_appended,
            num_new=num_new,
            is_first=self.storage is None,
            max_readable=self.max_readable,
            memory=self.memory.plan,
        )
        if self.order == 0 and self._looks_like_a_second_chunk(num_new):
            warnings.warn(_CHUNKS_ARE_KEPT, stacklevel=2)
        self.new_positions = state.new_positions(num_new, padding, self.device)
        if self.storage is not None:
            self.storage.append(call.key, call.value, self.new_positions, padded=padding is not None)
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
        self.memory.plan_after(num_new, self.state, self.max_readable)

    def shape(self, call: AttentionCall) -> LayerShape:
        """Return the sizes of the tensors of the layer."""
        return layer_shape(call)

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
                self._remember_queries(call)
            if self._plan is not None:
                self._evict(self._plan, call, attention)
            self.state = self.memory.limit(self.state)
            self.end_attention(call)
        for rotary in self._rotaries_to_clear:
            rotary.clear_cache()

    def _remember_queries(self, call: AttentionCall) -> None:
        """Remember the new queries for the next eviction, and forget those that it does not need."""
        needed, queries = self.memory.num_queries(call.query.shape[2]), self.state.queries
        if needed is not None and self.state.has_holes:
            needed = queries.append(call.query, self.new_positions, None).num_slots(needed)
        self.state = replace(self.state, queries=queries.append(call.query, self.new_positions, needed))

    def end_attention(self, call: AttentionCall | None = None) -> None:
        """Let the storage quantize new entries, after the attention of a pass has read them.

        Args:
            call: the attention call. Keys are rounded with feedback for its queries, or for those that the layer
                remembers, if there are enough of them; None to round keys to the nearest integers.

        """
        if self.storage is None:
            return

        def moments_of_many() -> Tensor | None:
            assert call is not None
            has_many = max(call.query.shape[2], len(self.state.queries)) >= MIN_QUERIES
            return self.query_moments(call) if has_many else None

        self.storage.end_attention(None if call is None else moments_of_many)

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
            entries = Entries(call.key, call.value, self.new_positions[:, None])
        else:
            entries = self.storage.entries
        return entries.right_aligned() if self.state.has_holes else entries

    def _queries(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Return the queries for the weights, [batch, num_heads, queries, head_dim], and their positions."""
        state = self.state
        new_positions = self.new_positions[:, -call.query.shape[2] :]  # a replay passes the last queries only
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
        query_moments = self.query_moments(call) if is_quantized and self.storage is None else None
        storage = copy_entries(plan, selection, self.state, self.settings, query_moments)
        validate_eviction(stats, entries, storage, self.index)
        return selection, storage

    def _stats(
        self, plan: EvictionPlan, entries: Entries, call: AttentionCall, attention: Tensor | None
    ) -> AttentionStats:
        queries, query_positions = self._queries(call)
        scored_queries, keys, values = self.scored_tensors(queries, entries)
        sharding, has_holes = self.settings.sharding_of(keys.shape[1]), self.state.has_holes
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
            rotary=self.rotary,
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
        order = right_aligned_order(self.new_positions[:, None])
        return {kind: x.gather(2, order.expand_as(x)) for kind, x in call.replay_scores.items()}

    def query_moments(self, call: AttentionCall) -> Tensor | None:
        """Return the second moment E[q qᵀ] of the queries, float32 [batch, num_key_value_heads, head_dim, head_dim].

        The queries are those of the call, or the remembered ones if the call has few; see `second_moments`.

        Returns None if the attention is not computed from the products of the queries and the stored keys.
        """
        queries, positions = call.query, self.new_positions[:, -call.query.shape[2] :]
        if queries.shape[2] < MIN_QUERIES and len(self.state.queries) > queries.shape[2]:
            queries, positions = self.state.queries.join()
        is_token = positions >= 0
        if call.padding is not None or queries is not call.query:
            queries = queries.masked_fill(~is_token[:, None, :, None], 0)
        return second_moments(queries, is_token, call.key.shape[1])

    def scored_tensors(self, queries: Tensor, entries: Entries) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values by which entries are scored."""
        return queries, entries.keys, entries.values

    def output_weight(self) -> Callable[[], Tensor | None] | None:
        """Return a function that loads the weight of the output projection, [hidden, heads * value_dim]."""
        projection = getattr(self.module, "o_proj", None)
        return None if projection is None else functools.partial(materialized_weight, projection, "weight")

    def copy(self, global_budget: GlobalBudget | None) -> CompressedLayer:
        """Return a layer that shares the stored tensors. Changes to one layer do not affect the other."""
        other = copy.copy(self)
        if self.storage is not None:
            other.state = replace(self.state, storage=self.storage.copy())
        other.global_budget = global_budget
        if global_budget is not None:
            global_budget.register(self.order, other.storage)
        return other
