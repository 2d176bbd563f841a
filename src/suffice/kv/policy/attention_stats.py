"""Tensors of one attention call and statistics of them: the input of every policy."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from suffice.gpu import async_tensor
from suffice.kv.attention.softmax import cap_logits, softmax_with_sinks
from suffice.kv.hf.rotary import RotaryEmbedding
from suffice.kv.policy.deferred_checks import DeferredChecks
from suffice.kv.policy.layer_context import EntryPositions, LayerContext
from suffice.kv.policy.weight_state import QueryMoments, WeightState

T = TypeVar("T")
_WEIGHTS_PER_BLOCK = 2**19
"""Number of attention weights of the last queries that are computed at a time."""


class AttentionStats:
    """Queries of an attention call, the keys and values they may read, and lazily computed statistics of them.

    Entries are cached tokens. They ascend in position and are right-aligned in each row and head. All derived
    statistics are float32 and are computed at most once.

    Args:
        queries: the newest queries, [batch, heads, queries, head_dim], after the rotary embedding.
        keys: [batch, num_key_value_heads, entries, head_dim], after the rotary embedding.
        values: [batch, num_key_value_heads, entries, value_dim].
        positions: where entries and queries stand in their texts. None if the entries are all tokens seen so far.
        scaling: factor on the query-key product, 1/√head_dim by default.
        softcap: soft cap c of the model's attention: logits become c tanh(logit / c). None for no soft cap.
        sink_logits: logit of the model's attention sink of each query head, [heads]; None for no sinks.
        attention: attention weights [batch, heads, queries, entries], if the model returned them.
        output_weight: weight of the attention's output projection, [hidden, heads * value_dim], or a function that
            loads it. None if the attention has none.
        rotary: the rotary embedding of the layer; None if its keys and queries are not rotated; a str with the reason
            if it is not known.
        state: state that stateful weights returned at the last eviction.
        context: position of the layer among the compressed layers, and the limits of its heads.
        logit_bias: numbers that are added to the logits of the entries, float32 [batch, num_key_value_heads,
            entries]; None if there are none.
        replay_scores: scores of the entries from a replay by kind (see `suffice.kv.policy.weights.replay`), each
            [batch, num_key_value_heads, entries].
        checks: records conditions that must hold, so that the caller can check all of them later. None checks each
            condition immediately.
        memo: memoized statistics of one attention call, which several objects may share. None starts an empty memo.

    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        positions: EntryPositions | None = None,
        scaling: float | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        attention: Tensor | None = None,
        output_weight: Tensor | Callable[[], Tensor | None] | None = None,
        rotary: RotaryEmbedding | str | None = None,
        state: WeightState | None = None,
        context: LayerContext | None = None,
        logit_bias: Tensor | None = None,
        replay_scores: Mapping[str, Tensor] | None = None,
        checks: DeferredChecks | None = None,
        memo: dict[Any, Any] | None = None,
    ) -> None:
        self.queries, self.keys, self.values = queries, keys, values
        self.scaling = scaling if scaling is not None else 1 / math.sqrt(keys.shape[-1])
        self.softcap, self.sink_logits = softcap, sink_logits
        self.attention, self._rotary = attention, rotary
        self.state, self.context = state or WeightState(), context or LayerContext()
        self.batch_size, self.num_key_value_heads, self.num_entries, self.head_dim = keys.shape
        self.num_queries = queries.shape[2]
        self.num_key_value_groups = queries.shape[1] // self.num_key_value_heads
        self.logit_bias, self.replay_scores = logit_bias, replay_scores or {}
        self._output_weight, self._checks = output_weight, checks
        self._given = given = positions or EntryPositions()
        # If entries are all tokens seen so far, the number of valid entries of each row is known without counting.
        self._known_counts = given.num_seen if given.entries is None else None
        self._memo: dict[Any, Any] = {} if memo is None else memo

    # ---- Positions and padding --------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device of the keys."""
        return self.keys.device

    @functools.cached_property
    def valid(self) -> Tensor | None:
        """Bool [batch, 1 or num_key_value_heads, entries], False on padding; None if every entry is valid."""
        if self._given.entries is not None:
            valid = self._given.entries >= 0
        elif self._given.valid is not None:
            valid = self._given.valid[:, None]
        else:
            return None
        if self._known_counts is not None:
            return valid if min(self._known_counts) < self.num_entries else None
        return None if bool(valid.all()) else valid

    @property
    def is_complete(self) -> bool:
        """Whether the entries are all tokens seen so far, without padding."""
        return self._given.entries is None and self.valid is None

    @functools.cached_property
    def counts(self) -> Tensor:
        """Number of valid entries of each row and head, long [batch, 1 or num_key_value_heads]."""
        if self.valid is None:
            return torch.full((self.batch_size, 1), self.num_entries, device=self.device)
        return self.valid.sum(-1)

    @functools.cached_property
    def positions(self) -> Tensor:
        """Positions of the entries, long [batch, 1 or num_key_value_heads, entries]; negative where there is none."""
        if self._given.entries is not None:
            return self._given.entries
        index = torch.arange(self.num_entries, device=self.device).expand(self.batch_size, 1, -1)
        return index - (self.num_entries - self.counts)[..., None]

    @property
    def rope_positions(self) -> Tensor:
        """Positions by which the keys were rotated, shaped like `positions`."""
        return self.positions if self._given.rope is None else self._given.rope

    @functools.cached_property
    def query_positions(self) -> Tensor:
        """Positions of the queries, long [batch, queries]; negative on padding."""
        if self._given.queries is not None:
            return self._given.queries
        return self.positions[:, 0, -self.num_queries :]

    @functools.cached_property
    def valid_queries(self) -> Tensor | None:
        """Bool [batch, queries], False for the queries of padding; None if there is no padding."""
        if self._given.entries is None and self.valid is None:
            return None
        valid = self.query_positions >= 0
        if self._known_counts is not None:
            return valid if min(self._known_counts) < self.num_queries else None
        return None if bool(valid.all()) else valid

    @functools.cached_property
    def num_seen(self) -> Tensor:
        """Number of tokens that each row has seen, long [batch]."""
        if self._given.num_seen is not None:
            return async_tensor(list(self._given.num_seen), self.device)
        return self.query_positions[:, -1] + 1

    @functools.cached_property
    def num_seen_per_row(self) -> list[int]:
        """`num_seen` as Python numbers, at least 0; known without reading the device where possible."""
        if self._given.num_seen is not None:
            return list(self._given.num_seen)
        if self.is_complete:
            return [self.num_entries] * self.batch_size
        return self.num_seen.clamp_min(0).tolist()

    @functools.cached_property
    def num_valid(self) -> Tensor:
        """Number of valid entries of each row and head, long [batch, num_key_value_heads], on the CPU."""
        if self.valid is None:
            return torch.full((self.batch_size, self.num_key_value_heads), self.num_entries)
        if self._known_counts is not None:
            return torch.tensor(self._known_counts)[:, None].expand(-1, self.num_key_value_heads)
        return self.counts.expand(-1, self.num_key_value_heads).cpu()

    # ---- Checks and memo --------------------------------------------------------------------------------------------

    def require(self, condition: Tensor, error: Exception) -> None:
        """Raise an error unless a condition (bool tensor without dimensions) holds, now or in `raise_if_failed`."""
        if self._checks is not None:
            self._checks.require(condition, error)
        elif not bool(condition):
            raise error

    def replay_score(self, kind: str) -> Tensor:
        """Return the scores of the entries from a replay, float32 [batch, num_key_value_heads, entries].

        Args:
            kind: kind of the scores, see `suffice.kv.policy.weights.replay`.

        Raises:
            ValueError: the prompt was not replayed for this kind of scores.

        """
        if kind not in self.replay_scores:
            given = ", ".join(self.replay_scores) or "none"
            raise ValueError(f"replay_scores must have the kind {kind!r}, which the policy needs, got {given}")
        return self.replay_scores[kind]

    def raise_if_failed(self) -> None:
        """Raise the error of the first deferred condition that does not hold."""
        if self._checks is not None:
            self._checks.raise_if_failed()

    def memoize(self, key: object, compute: Callable[[], T]) -> T:
        """Return the result of `compute`, which is called only the first time that a key is used."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    # ---- Means and groups -------------------------------------------------------------------------------------------

    def mask_invalid(self, scores: Tensor, fill: float = -torch.inf) -> Tensor:
        """Return scores [batch, num_key_value_heads, entries] with `fill` where there is no entry."""
        return scores if self.valid is None else scores.masked_fill(~self.valid, fill)

    def mean_over_entries(self, x: Tensor) -> Tensor:
        """Average x [batch, num_key_value_heads, entries, dim] over the valid entries of each row and head."""
        if self.valid is None:
            return x.mean(2)
        return (x * self.valid[..., None]).sum(2) / self.counts.clamp_min(1)[..., None]

    def cosine_to_mean(self, x: Tensor) -> Tensor:
        """Return the cosine between each vector and the mean of all unit vectors.

        Args:
            x: [batch, num_key_value_heads, entries, dim].

        Returns:
            [batch, num_key_value_heads, entries].

        """
        norms = x.norm(dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
        # A product with 1/‖x‖ gives the sum of the unit vectors without storing them.
        inverse_norms = self.mask_invalid(1 / norms, 0.0)
        mean = (inverse_norms[:, :, None] @ x).mT  # [batch, num_key_value_heads, dim, 1]
        mean = mean / mean.norm(dim=2, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        return (x @ mean).squeeze(-1) / norms

    def group_heads(self, x: Tensor) -> Tensor:
        """Split the head axis of x [batch, heads, ...] into [batch, num_key_value_heads, num_key_value_groups, ...]."""
        return x.unflatten(1, (self.num_key_value_heads, self.num_key_value_groups))

    @functools.cached_property
    def output_weight(self) -> Tensor | None:
        """Weight of the attention's output projection, [hidden, heads * value_dim]."""
        return self._output_weight() if callable(self._output_weight) else self._output_weight

    @functools.cached_property
    def keys32(self) -> Tensor:
        """Keys in float32."""
        return self.keys.float()

    @functools.cached_property
    def values32(self) -> Tensor:
        """Values in float32."""
        return self.values.float()

    # ---- Attention --------------------------------------------------------------------------------------------------

    def attention_weights(self, query_range: slice, num_entries: int) -> Tensor:
        """Return the attention weights of a range of queries over the first `num_entries` entries.

        These are the probabilities that the model computes, with its soft cap and its attention sinks.

        Args:
            query_range: range of the queries.
            num_entries: number of entries. The queries must not read later ones.

        Returns:
            [batch, num_key_value_heads, num_key_value_groups, queries, num_entries]; causal, 0 on padding.

        """
        if self.attention is not None:
            weights = self.group_heads(self.attention[:, :, query_range, :num_entries].float())
            if self.valid_queries is None:
                return weights
            return weights * self.valid_queries[:, None, None, query_range, None]
        queries = self.group_heads(self.queries[:, :, query_range].float() * self.scaling).flatten(2, 3)
        logits = self.add_bias(self.cap_logits(queries @ self.keys32[:, :, :num_entries].mT))
        logits = logits.unflatten(2, (self.num_key_value_groups, -1))
        future = self._future_mask(query_range, num_entries)
        logits[..., num_entries - future.shape[-1] :].masked_fill_(future[:, :, None], -torch.inf)
        if self.valid is not None:
            logits.masked_fill_(~self.valid[:, :, None, None, :num_entries], -torch.inf)
        readers = self._readers(query_range)
        if readers is None:
            return self._softmax(logits)
        # Avoid NaN, the softmax of a query that reads no entry.
        readers = readers[:, :, None, :, None]
        return self._softmax(logits.masked_fill_(~readers, 0.0)) * readers

    def _readers(self, query_range: slice) -> Tensor | None:
        """Return which queries read an entry; None if all do.

        The queries of padding read no entry, and neither do queries before the first entry that a head has kept.

        Returns:
            Bool [batch, 1 or num_key_value_heads, queries].

        """
        if self._given.entries is None:
            return None if self.valid_queries is None else self.valid_queries[:, None, query_range]
        positions = self.query_positions[:, None, query_range]
        return (positions >= 0) & (positions >= self._first_position[..., None])

    @functools.cached_property
    def _first_position(self) -> Tensor:
        """Position of the first valid entry of each row and head, [batch, 1 or num_key_value_heads]."""
        positions = self.positions
        return positions.masked_fill(positions < 0, torch.iinfo(positions.dtype).max).amin(-1)

    def cap_logits(self, logits: Tensor) -> Tensor:
        """Return attention logits after the model's soft cap."""
        return cap_logits(logits, self.softcap)

    def add_bias(self, logits: Tensor) -> Tensor:
        """Add the bias of the first entries to logits [batch, num_key_value_heads, queries, entries]."""
        return logits if self.logit_bias is None else logits + self.logit_bias[:, :, None, : logits.shape[-1]]

    def _softmax(self, logits: Tensor) -> Tensor:
        """Return the softmax of logits [batch, num_key_value_heads, num_key_value_groups, queries, entries]."""
        if self.sink_logits is None:
            return logits.softmax(-1)
        sinks = self.sink_logits.float().view(self.num_key_value_heads, self.num_key_value_groups, 1, 1)
        return softmax_with_sinks(logits, sinks)

    def window_attention_weights(self, window_size: int) -> Tensor:
        """Return the attention weights of the last `window_size` queries.

        Returns:
            [batch, num_key_value_heads, num_key_value_groups, window_size, entries]; causal, 0 on padding. The
            weights of each query sum to 1, or to less if the model has attention sinks. The weights of queries of
            padding are 0.

        """
        window_size = min(window_size, self.num_queries)
        return self.memoize(
            ("window attention weights", window_size),
            lambda: self.attention_weights(slice(-window_size, None), self.num_entries),
        )

    def window_attention(self, window_size: int) -> Tensor:
        """Return the attention that each entry receives from the last `window_size` queries, on average.

        Equals `window_attention_weights(window_size).mean((2, 3))`, with the weights of only a few heads in memory.

        Returns:
            [batch, num_key_value_heads, entries].

        """
        return self.memoize(("window attention", window_size), lambda: self._window_attention(window_size))

    def _window_attention(self, window_size: int) -> Tensor:
        window_size = min(window_size, self.num_queries)
        has_terms = self.sink_logits is not None or self.logit_bias is not None
        if has_terms or self.valid is not None or self.valid_queries is not None or self.attention is not None:
            return self.window_attention_weights(window_size).mean((2, 3))
        queries = self.group_heads(self.queries[:, :, -window_size:].float() * self.scaling).flatten(2, 3)
        future, readers = self._future_mask(slice(-window_size, None)), self._readers(slice(-window_size, None))
        rows = queries.shape[2]
        share = queries.new_full((1, rows), 1 / rows)
        # Few heads at a time, so that their attention weights stay in the CPU cache.
        size = max(1, _WEIGHTS_PER_BLOCK // (self.batch_size * rows * self.num_entries))
        received: list[Tensor] = []
        for start in range(0, self.num_key_value_heads, size):
            heads = slice(start, start + size)
            logits = self.cap_logits(queries[:, heads] @ self.keys32[:, heads].mT)
            newest = logits.unflatten(2, (-1, window_size))[..., -future.shape[-1] :]
            newest.masked_fill_((future if future.shape[1] == 1 else future[:, heads])[:, :, None], -torch.inf)
            weights = logits.softmax(-1)
            if readers is not None:
                # The softmax of a query that reads no entry is NaN.
                unread = ~(readers if readers.shape[1] == 1 else readers[:, heads])
                weights.unflatten(2, (-1, window_size)).masked_fill_(unread[:, :, None, :, None], 0.0)
            received.append((share @ weights).squeeze(2))
        return received[0] if len(received) == 1 else torch.cat(received, dim=1)

    def attention_received(self, block_size: int = 256) -> Tensor:
        """Return the attention that each entry has received from all queries so far, summed over queries.

        Only `block_size` rows of the attention matrix are materialized at a time.

        Returns:
            [batch, num_key_value_heads, entries], averaged over the query heads of a group.

        """
        return self.memoize("attention received", lambda: self._attention_received(block_size))

    def _attention_received(self, block_size: int) -> Tensor:
        received = torch.zeros(self.batch_size, self.num_key_value_heads, self.num_entries, device=self.device)
        if self.state.attention_received is not None:
            received += self.state.attention_received
        for start in range(0, self.num_queries, block_size):
            stop = min(start + block_size, self.num_queries)
            # Without evictions, the entries of later queries come last and cannot be read by these queries.
            num_later = self.num_queries - stop if self._given.entries is None else 0
            num_entries = self.num_entries - num_later
            weights = self.attention_weights(slice(start, stop), num_entries)
            received[..., :num_entries] += weights.sum(3).mean(2)
        return received

    def _future_mask(self, query_range: slice, num_entries: int | None = None) -> Tensor:
        """Return which entries come after each query, for the newest of the first `num_entries` entries.

        The queries are the newest tokens, and entries ascend in position. If m queries follow the start of the range,
        only the newest m entries of all can come after one of them, and older entries are left out.

        Returns:
            Bool [batch, 1 or num_key_value_heads, queries, newest entries].

        """
        query_positions = self.query_positions[:, query_range]
        num_newest = min(self.num_queries - range(self.num_queries)[query_range][0], self.num_entries)
        entries = self.positions[:, :, self.num_entries - num_newest : num_entries]
        return entries[:, :, None] > query_positions[:, None, :, None]

    def readable_ranges(self, window_size: int) -> tuple[Tensor, Tensor]:
        """Return the contiguous range of entries that each of the last queries may read.

        Returns:
            The index of the first valid entry, int32 [batch, num_key_value_heads], and the index after the last entry
            that each query may read, int32 [batch, num_key_value_heads, window_size]; 0 for a query of padding.

        """
        if self.is_complete:
            starts = torch.zeros(1, 1, dtype=torch.int32, device=self.device)
            first_end = self.num_entries - window_size + 1
            ends = torch.arange(first_end, self.num_entries + 1, dtype=torch.int32, device=self.device)
        else:
            starts = (self.num_entries - self.counts).int()
            ends = self.num_entries - self._future_mask(slice(-window_size, None)).sum(-1, dtype=torch.int32)
            ends = ends.masked_fill((self.query_positions[:, -window_size:] < 0)[:, None], 0)
        shape = (self.batch_size, self.num_key_value_heads)
        return starts.expand(shape), ends.expand(*shape, -1)

    # ---- Queries ----------------------------------------------------------------------------------------------------

    def query_moments(self, half_life: float) -> QueryMoments:
        """Return mean and mean square of all queries so far. The weight of a query halves every `half_life` tokens."""
        earlier = self.state.query_moments.get(half_life)

        def compute() -> QueryMoments:
            newest = QueryMoments.from_queries(self.queries, self.valid_queries, half_life)
            return newest.combine_with_earlier(earlier, half_life)

        return self.memoize(("query moments", half_life), compute)

    @property
    def rotary(self) -> RotaryEmbedding | None:
        """The rotary embedding of the layer; None if its keys and queries are not rotated.

        Raises:
            ValueError: the rotary embedding is not known.

        """
        if isinstance(self._rotary, str):
            raise ValueError(f"the rotary embedding of layer {self.context.layer} is not known: {self._rotary}")
        return self._rotary

    @property
    def can_move_queries(self) -> bool:
        """Whether the queries can be rotated to other positions, or do not depend on them."""
        rotary = self._rotary
        if isinstance(rotary, str):
            return False
        return rotary is None or (rotary.rotates_queries and not rotary.frequencies.depends_on_length)

    def unrotated_queries(self, count: int) -> Tensor:
        """Return the last `count` queries, rotated back to position 0, float32 [batch, heads, count, head_dim]."""
        queries = self.queries[:, :, -count:]
        if self.rotary is None:
            return queries.float()
        return self.rotary.rotate_back(queries, self.query_positions[:, None, -count:].clamp_min(0))

    def unrotated_keys(self) -> Tensor:
        """Return the keys, rotated back to position 0, float32 [batch, num_key_value_heads, entries, head_dim]."""
        if self.rotary is None:
            return self.keys.float()
        return self.rotary.rotate_keys(self.keys, self.rope_positions.clamp_min(0), back=True)

    def mean_rotation(self, num_future: int) -> Tensor | None:
        """Return the mean rotation matrix of the next `num_future` positions, [batch, head_dim, head_dim].

        None if there are no such positions, or no rotary embedding.
        """
        if num_future == 0 or self.rotary is None:
            return None
        future_positions = self.num_seen[:, None] + torch.arange(num_future, device=self.device)
        return self.rotary.mean_rotation(future_positions, self.head_dim)
