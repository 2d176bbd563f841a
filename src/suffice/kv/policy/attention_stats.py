"""Tensors of one attention call and statistics of them: the input of every policy."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from suffice.kv.hf.rotary import rotate_half
from suffice.kv.hf.tensor_parallel import Sharding
from suffice.kv.policy.weight_state import QueryMoments, WeightState

Rotary = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps positions [batch, m] to cosines and sines [batch, m, rotary_dim] of the model's rotary embedding."""

T = TypeVar("T")
NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True)
class EntryPositions:
    """Where the entries and queries of an attention call stand in their texts.

    Without arguments, the entries are all tokens seen so far, without padding, and the queries are the last of them.
    A position is the index of a token within the text of its own row; it is negative where there is no token.

    Args:
        valid: bool [batch, entries], False on left padding. None if there is no padding, or if `entries` is given.
        entries: long [batch, 1 or num_key_value_heads, entries], positions of the entries. None if the entries are
            all tokens seen so far.
        queries: long [batch, queries], positions of the queries. Required together with `entries`.
        rope: long, shaped like `entries`: the positions by which the keys were rotated, if they differ from `entries`.
        num_seen: number of tokens that each row has seen, if it is known without reading it from the device.

    """

    valid: Tensor | None = None
    entries: Tensor | None = None
    queries: Tensor | None = None
    rope: Tensor | None = None
    num_seen: Sequence[int] | None = None


@dataclass(frozen=True)
class LayerContext:
    """Position of a layer among the compressed layers, and the limits that hold for its heads.

    Args:
        layer: index of the layer among the layers whose cache is compressed.
        num_layers: number of compressed layers.
        max_entries: largest number of entries that a head may keep; None for no limit.
        sharding: how the KV heads of the layer are split over processes; None if all of them are here.

    """

    layer: int = 0
    num_layers: int = 1
    max_entries: int | None = None
    sharding: Sharding | None = None


class DeferredChecks:
    """Collects conditions and the errors for them; `raise_if_failed` reads all conditions from the device at once."""

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, Exception]] = []

    def require(self, condition: Tensor, error: Exception) -> None:
        """Record a condition (bool tensor without dimensions) and the error to raise if it does not hold."""
        self._pending.append((condition, error))

    def raise_if_failed(self) -> None:
        """Raise the error of the first recorded condition that does not hold, and forget all of them."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        holds = torch.stack([condition for condition, _ in pending]).tolist()
        for condition_holds, (_, error) in zip(holds, pending, strict=True):
            if not condition_holds:
                raise error


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
        attention: attention weights [batch, heads, queries, entries], if the model returned them.
        output_weight: weight of the attention's output projection, [hidden, heads * value_dim], or a function that
            loads it. None if the attention has none.
        rotary: the model's rotary embedding; None for a model without one.
        rotate: how the rotary embedding pairs the dimensions of a head.
        state: what stateful weights returned for earlier queries.
        context: where the layer stands in the model.
        checks: where to record conditions that must hold, for a caller that checks them together. None checks each
            condition at once.
        memo: shared by all statistics of one attention call, so that several policies compute them once.

    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        positions: EntryPositions | None = None,
        scaling: float | None = None,
        attention: Tensor | None = None,
        output_weight: Tensor | Callable[[], Tensor | None] | None = None,
        rotary: Rotary | None = None,
        rotate: Callable[[Tensor], Tensor] = rotate_half,
        state: WeightState | None = None,
        context: LayerContext | None = None,
        checks: DeferredChecks | None = None,
        memo: dict[Any, Any] | None = None,
    ) -> None:
        self.queries, self.keys, self.values = queries, keys, values
        self.scaling = scaling if scaling is not None else 1 / math.sqrt(keys.shape[-1])
        self.attention, self.rotary, self.rotate = attention, rotary, rotate
        self.state, self.context = state or WeightState(), context or LayerContext()
        self.batch_size, self.num_key_value_heads, self.num_entries, self.head_dim = keys.shape
        self.num_queries = queries.shape[2]
        self.num_key_value_groups = queries.shape[1] // self.num_key_value_heads
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

    @property
    def checks_are_deferred(self) -> bool:
        """Whether conditions are recorded for a later check instead of being checked at once."""
        return self._checks is not None

    def require(self, condition: Tensor, error: Exception) -> None:
        """Raise an error unless a condition (bool tensor without dimensions) holds, now or in `raise_if_failed`."""
        if self._checks is not None:
            self._checks.require(condition, error)
        elif not bool(condition):
            raise error

    def raise_if_failed(self) -> None:
        """Raise the error of the first deferred condition that does not hold."""
        if self._checks is not None:
            self._checks.raise_if_failed()

    def memoize(self, key: object, compute: Callable[[], T]) -> T:
        """Return the result of `compute`, which is called for the first use of this key only."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    # ---- Means and groups -------------------------------------------------------------------------------------------

    def mask_invalid(self, scores: Tensor, fill: float = NEGATIVE_INFINITY) -> Tensor:
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
        lengths = x.norm(dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
        # Weighted products with x itself avoid a copy of x that holds the unit vectors.
        share = self.mask_invalid(1 / lengths, 0.0)
        mean = (share[:, :, None] @ x).mT  # [batch, num_key_value_heads, dim, 1]
        mean = mean / mean.norm(dim=2, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        return (x @ mean).squeeze(-1) / lengths

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

    def attention_weights(self, rows: slice, columns: int) -> Tensor:
        """Return the attention weights of some queries over the first entries.

        Args:
            rows: which queries.
            columns: number of entries.

        Returns:
            [batch, num_key_value_heads, num_key_value_groups, rows, columns]; causal, 0 on padding.

        """
        if self.attention is not None:
            return self.group_heads(self.attention[:, :, rows, :columns].float())
        queries = self.group_heads(self.queries[:, :, rows].float() * self.scaling).flatten(2, 3)
        logits = (queries @ self.keys32[:, :, :columns].mT).unflatten(2, (self.num_key_value_groups, -1))
        future = self._future_mask(rows, columns)
        logits[..., columns - future.shape[-1] :].masked_fill_(future[:, :, None], NEGATIVE_INFINITY)
        if self.valid is not None:
            logits.masked_fill_(~self.valid[:, :, None, None, :columns], NEGATIVE_INFINITY)
        if self.valid_queries is None:
            return logits.softmax(-1)
        valid = self.valid_queries[:, None, None, rows, None]
        # Queries of padding see no entry; their softmax would be NaN.
        return logits.masked_fill_(~valid, 0.0).softmax(-1) * valid

    def window_attention_weights(self, window_size: int) -> Tensor:
        """Return the attention weights of the last `window_size` queries.

        Returns:
            [batch, num_key_value_heads, num_key_value_groups, window_size, entries]; rows sum to 1, causal, 0 on
            padding. A row of the batch with fewer queries has zero weights for the missing ones.

        """
        window_size = min(window_size, self.num_queries)
        return self.memoize(
            ("window attention weights", window_size),
            lambda: self.attention_weights(slice(-window_size, None), self.num_entries),
        )

    def window_attention(self, window_size: int) -> Tensor:
        """Return the attention that each entry receives from the last `window_size` queries, on average.

        Equals `window_attention_weights(window_size).mean((2, 3))`, but holds the weights of one head at a time.

        Returns:
            [batch, num_key_value_heads, entries].

        """
        return self.memoize(("window attention", window_size), lambda: self._window_attention(window_size))

    def _window_attention(self, window_size: int) -> Tensor:
        window_size = min(window_size, self.num_queries)
        if self.valid is not None or self.valid_queries is not None or self.attention is not None:
            return self.window_attention_weights(window_size).mean((2, 3))
        queries = self.group_heads(self.queries[:, :, -window_size:].float() * self.scaling)
        future = self._future_mask(slice(-window_size, None))
        received = torch.empty(self.batch_size, self.num_key_value_heads, self.num_entries, device=self.device)
        # All heads share two buffers, so that they stay in the processor's cache.
        rows = self.num_key_value_groups * window_size
        logits, weights = received.new_empty(2, self.batch_size, rows, self.num_entries)
        share = received.new_full((1, rows), 1 / rows)
        for head in range(self.num_key_value_heads):
            torch.matmul(queries[:, head].flatten(1, 2), self.keys32[:, head].mT, out=logits)
            masked = future[:, min(head, future.shape[1] - 1)]
            newest = logits.unflatten(1, (-1, window_size))[..., -future.shape[-1] :]
            newest.masked_fill_(masked[:, None], NEGATIVE_INFINITY)
            torch.softmax(logits, -1, out=weights)
            received[:, head] = (share @ weights).squeeze(1)
        return received

    def attention_received(self, block_size: int = 256) -> Tensor:
        """Return the attention that each entry has received from all queries so far, summed over queries.

        Only `block_size` rows of the attention matrix are materialised at a time.

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
            later = self.num_queries - stop if self._given.entries is None else 0
            columns = self.num_entries - later
            weights = self.attention_weights(slice(start, stop), columns)
            received[..., :columns] += weights.sum(3).mean(2)
        return received

    def _future_mask(self, rows: slice, columns: int | None = None) -> Tensor:
        """Return which of the newest entries, up to `columns`, come after each query.

        Entries ascend in position and the queries are the newest tokens, so only as many of the newest entries as
        there are queries can lie in the future of one of them.

        Returns:
            Bool [batch, 1 or num_key_value_heads, rows, newest entries].

        """
        query_positions = self.query_positions[:, rows]
        newest = min(self.num_queries - range(self.num_queries)[rows][0], self.num_entries)
        entries = self.positions[:, :, self.num_entries - newest : columns]
        return entries[:, :, None] > query_positions[:, None, :, None]

    def readable_ranges(self, window_size: int) -> tuple[Tensor, Tensor]:
        """Return the range of entries that each of the last queries may read; it is always contiguous.

        Returns:
            The first valid entry, int32 [batch, num_key_value_heads], and one past the last entry that each query may
            read, int32 [batch, num_key_value_heads, window_size]; 0 for a query of padding.

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
        """Return mean and mean square of all queries so far; the weight of each halves every `half_life` tokens."""
        earlier = self.state.query_moments.get(half_life)

        def compute() -> QueryMoments:
            newest = QueryMoments.from_queries(self.queries, self.valid_queries, half_life)
            return newest.combine_with_earlier(earlier, half_life)

        return self.memoize(("query moments", half_life), compute)

    def unrotated_queries(self, count: int) -> Tensor:
        """Return the last `count` queries before the rotary embedding, float32 [batch, heads, count, head_dim]."""
        return self._unrotate(self.queries[:, :, -count:], self.query_positions[:, None, -count:])

    def unrotated_keys(self) -> Tensor:
        """Return the keys before the rotary embedding, float32 [batch, num_key_value_heads, entries, head_dim]."""
        return self._unrotate(self.keys, self.rope_positions)

    def _unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.rotary is None:
            return x.float()
        rows = positions.clamp_min(0)
        cos, sin = (t.float().unflatten(0, rows.shape[:2]) for t in self.rotary(rows.flatten(0, 1)))
        rotary_dim = cos.shape[-1]
        rotated = x[..., :rotary_dim].float()
        # cos² + sin² is not 1 where the embedding also scales (YaRN).
        scale = cos * cos + sin * sin
        unrotated = rotated * (cos / scale)
        unrotated.addcmul_(self.rotate(rotated), sin / scale, value=-1)
        return unrotated if rotary_dim == x.shape[-1] else torch.cat((unrotated, x[..., rotary_dim:].float()), dim=-1)

    def mean_rotation(self, num_future: int) -> Tensor | None:
        """Return the mean rotation matrix over the next positions, [batch, head_dim, head_dim]; None without rotary."""
        if self.rotary is None or num_future == 0:
            return None
        ahead = self.num_seen[:, None] + torch.arange(num_future, device=self.device)
        cos, sin = (t.float().mean(1) for t in self.rotary(ahead))
        rotary_dim = cos.shape[-1]
        identity = torch.eye(rotary_dim, device=self.device)
        # Row j of `rotate(identity)` is the rotation of the unit vector e_j: the transpose maps q to rotate(q).
        turn = torch.diag_embed(cos) + sin[:, :, None] * self.rotate(identity).mT
        rotation = torch.eye(self.head_dim, device=self.device).repeat(self.batch_size, 1, 1)
        rotation[:, :rotary_dim, :rotary_dim] = turn
        return rotation
