"""What one attention call shows about its cached tokens: the input of every policy."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from suffice.kv.hf.rotary import rotate_half
from suffice.kv.hf.tensor_parallel import Sharding
from suffice.kv.policy.deferred_checks import Verdicts
from suffice.kv.policy.query_moments import Moments

Rotary = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Positions [batch, m] → cosines and sines [batch, m, rotary_dim] of the model's rotary embedding."""

T = TypeVar("T")
NEGATIVE = float("-inf")


class Signals:
    """Queries of an attention, keys and values that they may read, and statistics of them, each computed once.

    `batch` rows, `heads` query heads in `kv_heads` groups of `group`, `tokens` cached entries, `queries` the
    newest queries, head dimension `dim`. Entries ascend in position and are right-aligned in each row and head.
    Everything derived is float32.

    Args:
        queries: [batch, heads, queries, dim], after rotary embedding.
        keys: [batch, kv_heads, tokens, dim], after rotary embedding.
        values: [batch, kv_heads, tokens, value_dim].
        valid: bool [batch, tokens], False on left padding; None when nothing is padded, or with `positions`.
        positions: long [batch, 1 or kv_heads, tokens], index of each entry within its row's own text, negative
            where there is none; None if entries are all tokens seen so far, the queries' own the last of them.
        query_positions: long [batch, queries], the same of the queries; given with `positions`.
        places: long, as `positions`: where the rotary embedding of the keys puts them, if elsewhere.
        scaling: factor on the query-key product, 1/√dim by default.
        layer: index of the layer among those whose cache is compressed, and `layers` their number.
        output: weight of the attention's output projection, [hidden, heads * value_dim], or what fetches it.
        rotary: the model's rotary embedding; None for a model without.
        rotate: how that embedding pairs the dimensions.
        attention: the attention weights [batch, heads, queries, tokens] if they were computed.
        received: attention that each entry received before these queries, [batch, kv_heads, tokens].
        moments: exponentially weighted moments of earlier queries, by half-life.
        sharding: where the layer's other heads are; None if all are here.
        most: entries that a head may hold while others can take them; None if there is no limit.
        memo: what is computed is kept here, and found here by other signals of the very same call.
        seen_tokens: tokens of each row's own text so far, where they are known without asking the device.
        verdicts: where conditions that must hold are noted, for who settles them; None to ask at once.

    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        valid: Tensor | None = None,
        positions: Tensor | None = None,
        query_positions: Tensor | None = None,
        places: Tensor | None = None,
        scaling: float | None = None,
        layer: int = 0,
        layers: int = 1,
        output: Tensor | Callable[[], Tensor | None] | None = None,
        rotary: Rotary | None = None,
        rotate: Callable[[Tensor], Tensor] = rotate_half,
        attention: Tensor | None = None,
        received: Tensor | None = None,
        moments: Mapping[float, Moments] | None = None,
        sharding: Sharding | None = None,
        most: int | None = None,
        memo: dict[Any, Any] | None = None,
        seen_tokens: Sequence[int] | None = None,
        verdicts: Verdicts | None = None,
    ) -> None:
        self.queries, self.keys, self.values = queries, keys, values
        self.scaling = scaling if scaling is not None else 1 / math.sqrt(keys.shape[-1])
        self.layer, self.layers = layer, layers
        self.rotary, self.rotate, self.attention = rotary, rotate, attention
        self.batch, self.kv_heads, self.tokens, self.dim = keys.shape
        self.group = queries.shape[1] // self.kv_heads
        self.received, self.moments = received, dict(moments or {})
        self.sharding, self.most, self.verdicts = sharding, most, verdicts
        self._valid, self._output, self._seen_tokens = valid, output, seen_tokens
        self._positions, self._query_positions, self._places = positions, query_positions, places
        self._counts = seen_tokens if positions is None else None  # valid entries of each row, if nobody need count
        self._memo: dict[Any, Any] = {} if memo is None else memo

    @property
    def device(self) -> torch.device:
        """Device of the keys."""
        return self.keys.device

    @functools.cached_property
    def output(self) -> Tensor | None:
        """Weight of the attention's output projection, [hidden, heads * value_dim]."""
        return self._output() if callable(self._output) else self._output

    @functools.cached_property
    def valid(self) -> Tensor | None:
        """Bool [batch, 1 or kv_heads, tokens], or None when every entry is valid."""
        if self._positions is not None:
            valid = self._positions >= 0
        elif self._valid is not None:
            valid = self._valid[:, None]
        else:
            return None
        if self._counts is not None:
            return valid if min(self._counts) < self.tokens else None
        return None if bool(valid.all()) else valid

    @property
    def plain(self) -> bool:
        """Whether the entries are all tokens seen so far, and none is padding."""
        return self._positions is None and self.valid is None

    @functools.cached_property
    def counts(self) -> Tensor:
        """Valid entries of each row and head, long [batch, 1 or kv_heads]."""
        if self.valid is None:
            return torch.full((self.batch, 1), self.tokens, device=self.device)
        return self.valid.sum(-1)

    @functools.cached_property
    def positions(self) -> Tensor:
        """Index of each entry within its row's own text, long [batch, 1 or kv_heads, tokens]; negative for none."""
        if self._positions is not None:
            return self._positions
        index = torch.arange(self.tokens, device=self.device).expand(self.batch, 1, -1)
        return index - (self.tokens - self.counts)[..., None]

    @property
    def places(self) -> Tensor:
        """Where the rotary embedding of the keys puts them, as `positions`."""
        return self.positions if self._places is None else self._places

    @functools.cached_property
    def query_positions(self) -> Tensor:
        """Index of each query within its row's own text, long [batch, queries]; negative on padding."""
        if self._query_positions is not None:
            return self._query_positions
        return self.positions[:, 0, -self.queries.shape[2] :]

    @functools.cached_property
    def asked(self) -> Tensor | None:
        """Bool [batch, queries], False for the queries of padding; None when there is none."""
        if self._positions is None and self.valid is None:
            return None
        asked = self.query_positions >= 0
        if self._counts is not None:
            return asked if min(self._counts) < self.queries.shape[2] else None
        return None if bool(asked.all()) else asked

    @functools.cached_property
    def seen(self) -> Tensor:
        """Tokens of each row's own text so far, long [batch]."""
        return self.query_positions[:, -1] + 1

    @functools.cached_property
    def seen_tokens(self) -> list[int]:
        """The same as numbers, at least 0."""
        if self._seen_tokens is not None:
            return list(self._seen_tokens)
        return [self.tokens] * self.batch if self.plain else self.seen.clamp_min(0).tolist()

    @functools.cached_property
    def room(self) -> Tensor:
        """Valid entries of each row and head, long [batch, kv_heads], on the CPU."""
        if self.valid is None:
            return torch.full((self.batch, self.kv_heads), self.tokens)
        if self._counts is not None:
            return torch.tensor(self._counts)[:, None].expand(-1, self.kv_heads)
        return self.counts.expand(-1, self.kv_heads).cpu()

    def require(self, right: Tensor, error: Exception) -> None:
        """Raise an error, now or when it is settled, unless a condition holds: a bool of no dimensions."""
        if self.verdicts is not None:
            self.verdicts.require(right, error)
        elif not bool(right):
            raise error

    def settle(self) -> None:
        """Raise the error of what was noted and does not hold."""
        if self.verdicts is not None:
            self.verdicts.settle()

    def memo(self, name: object, compute: Callable[[], T]) -> T:
        """Return what `compute` gives, computed at the first call for this name."""
        if name not in self._memo:
            self._memo[name] = compute()
        return self._memo[name]

    def masked(self, scores: Tensor, fill: float = NEGATIVE) -> Tensor:  # [batch, kv_heads, tokens]
        """Return the scores with `fill` where there is no entry."""
        return scores if self.valid is None else scores.masked_fill(~self.valid, fill)

    def mean(self, x: Tensor) -> Tensor:  # [batch, kv_heads, tokens, dim] -> [batch, kv_heads, dim]
        """Mean over the valid entries of each row and head."""
        if self.valid is None:
            return x.mean(2)
        return (x * self.valid[..., None]).sum(2) / self.counts.clamp_min(1)[..., None]

    def cosine_to_mean(self, x: Tensor) -> Tensor:  # [batch, kv_heads, tokens, d] -> [batch, kv_heads, tokens]
        """Cosine between each vector and the mean of all, each of them first brought to length one."""
        lengths = x.norm(dim=-1).clamp_min(torch.finfo(x.dtype).tiny)
        # Products with x itself: the unit vectors need not exist.
        share = self.masked(1 / lengths, 0.0)
        centre = (share[:, :, None] @ x).mT  # [batch, kv_heads, d, 1]
        centre = centre / centre.norm(dim=2, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        return (x @ centre).squeeze(-1) / lengths

    def grouped(self, x: Tensor) -> Tensor:  # [batch, heads, ...] -> [batch, kv_heads, group, ...]
        """Split the head axis into KV heads and the query heads that share each."""
        return x.unflatten(1, (self.kv_heads, self.group))

    @functools.cached_property
    def keys32(self) -> Tensor:
        """Keys in float32."""
        return self.keys.float()

    @functools.cached_property
    def values32(self) -> Tensor:
        """Values in float32."""
        return self.values.float()

    def attention_of_last(self, window: int) -> Tensor:
        """Attention weights of the call's last `window` queries.

        Returns:
            [batch, kv_heads, group, window, tokens], rows summing to 1, causal, 0 on padding. A row of the
            batch with fewer queries than `window` has zero weights for those that it lacks.

        """
        window = min(window, self.queries.shape[2])
        return self.memo(("attention", window), lambda: self.attention_of(slice(-window, None), self.tokens))

    def attention_from_last(self, window: int) -> Tensor:
        """Attention that each token receives from the call's last `window` queries, on average.

        As `attention_of_last(window).mean((2, 3))`, with one KV head's weights in memory at a time.

        Returns:
            [batch, kv_heads, tokens], float32.

        """
        return self.memo(("window", window), lambda: self._attention_from_last(window))

    def _attention_from_last(self, window: int) -> Tensor:
        window = min(window, self.queries.shape[2])
        if self.valid is not None or self.asked is not None or self.attention is not None:
            return self.attention_of_last(window).mean((2, 3))
        queries = self.grouped(self.queries[:, :, -window:].float() * self.scaling)
        future = self._future(slice(-window, None))
        received = torch.empty(self.batch, self.kv_heads, self.tokens, device=self.device)
        # Two buffers for all heads; the softmax works row by row, so that a row stays in the processor's cache.
        logits, weights = received.new_empty(2, self.batch, self.group * window, self.tokens)
        share = received.new_full((1, self.group * window), 1 / (self.group * window))
        for head in range(self.kv_heads):
            torch.matmul(queries[:, head].flatten(1, 2), self.keys32[:, head].mT, out=logits)
            own = future[:, min(head, future.shape[1] - 1)]
            logits.unflatten(1, (-1, window))[..., -future.shape[-1] :].masked_fill_(own[:, None], NEGATIVE)
            torch.softmax(logits, -1, out=weights)
            received[:, head] = (share @ weights).squeeze(1)
        return received

    def _future(self, rows: slice, columns: int | None = None) -> Tensor:
        """Which of the newest entries, up to `columns`, come after a query: [batch, 1 or kv_heads, rows, newest].

        Entries ascend in position and the queries are the newest tokens, so that only as many of the newest
        entries as there are queries from the first of these rows on can lie in the future of one of them.
        """
        own = self.query_positions[:, rows]
        newest = min(self.queries.shape[2] - range(self.queries.shape[2])[rows][0], self.tokens)
        entries = self.positions[:, :, self.tokens - newest : columns]
        return entries[:, :, None] > own[:, None, :, None]

    def spans(self, window: int) -> tuple[Tensor, Tensor]:
        """Entries that the last `window` queries may read, which are always neighbours.

        Returns:
            The first that exists, int32 [batch, kv_heads]; and one past the last that each query may read, int32
            [batch, kv_heads, window], 0 for a query of padding.

        """
        if self.plain:
            starts = torch.zeros(1, 1, dtype=torch.int32, device=self.device)
            ends = torch.arange(self.tokens - window + 1, self.tokens + 1, dtype=torch.int32, device=self.device)
        else:
            starts = (self.tokens - self.counts).int()
            ends = self.tokens - self._future(slice(-window, None)).sum(-1, dtype=torch.int32)
            ends = ends.masked_fill((self.query_positions[:, -window:] < 0)[:, None], 0)
        return starts.expand(self.batch, self.kv_heads), ends.expand(self.batch, self.kv_heads, -1)

    def attention_of(self, rows: slice, columns: int) -> Tensor:
        """Attention weights of some queries over the first entries, [batch, kv_heads, group, rows, columns]."""
        if self.attention is not None:
            return self.grouped(self.attention[:, :, rows, :columns].float())
        queries = self.grouped(self.queries[:, :, rows].float() * self.scaling).flatten(2, 3)
        logits = (queries @ self.keys32[:, :, :columns].mT).unflatten(2, (self.group, -1))
        future = self._future(rows, columns)
        logits[..., columns - future.shape[-1] :].masked_fill_(future[:, :, None], NEGATIVE)
        if self.valid is not None:
            logits.masked_fill_(~self.valid[:, :, None, None, :columns], NEGATIVE)
        if self.asked is None:
            return logits.softmax(-1)
        asked = self.asked[:, None, None, rows, None]
        # The queries of padding see nothing; their softmax would be NaN.
        return logits.masked_fill_(~asked, 0.0).softmax(-1) * asked

    def attention_received(self, block: int = 256) -> Tensor:
        """Attention that each entry received from all queries so far, summed.

        Computed in blocks of queries, so that no more than `block` rows of the attention matrix exist.

        Returns:
            [batch, kv_heads, tokens], averaged over the GQA group.

        """
        return self.memo("received", lambda: self._received(block))

    def _received(self, block: int) -> Tensor:
        total = self.queries.shape[2]
        received = torch.zeros(self.batch, self.kv_heads, self.tokens, device=self.device)
        if self.received is not None:
            received += self.received
        for start in range(0, total, block):
            stop = min(start + block, total)
            # The entries of later queries are out of sight, unless some of these have been evicted.
            columns = self.tokens if self._positions is not None else self.tokens - total + stop
            weights = self.attention_of(slice(start, stop), columns)
            received[..., :columns] += weights.sum(3).mean(2)
        return received

    def query_moments(self, half_life: float) -> Moments:
        """Mean and mean square of all queries so far, the weight of each halved with every `half_life` tokens."""
        return self.memo(
            ("moments", half_life),
            lambda: Moments.of(self.queries, self.asked, half_life).after(self.moments.get(half_life), half_life),
        )

    @property
    def next_received(self) -> Tensor | None:
        """Attention received by each entry so far, if it was asked for."""
        return self._memo.get("received")

    @property
    def next_moments(self) -> dict[float, Moments]:
        """The moments that were asked for, to be given to the signals of later queries."""
        return {name[1]: value for name, value in self._memo.items() if isinstance(value, Moments)}

    def unrotated_queries(self, last: int) -> Tensor:  # [batch, heads, last, dim]
        """Undo the rotary embedding of the last queries: what they were before it, float32."""
        return self._unrotated(self.queries[:, :, -last:], self.query_positions[:, None, -last:])

    def unrotated_keys(self) -> Tensor:  # [batch, kv_heads, tokens, dim]
        """Undo the rotary embedding of the keys, float32."""
        return self._unrotated(self.keys, self.places)

    def _unrotated(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.rotary is None:
            return x.float()
        rows = positions.clamp_min(0)
        cos, sin = (t.float().unflatten(0, rows.shape[:2]) for t in self.rotary(rows.flatten(0, 1)))
        turned = x[..., : cos.shape[-1]].float()
        # cos² + sin² differs from 1 where the embedding also scales (YaRN).
        scale = cos * cos + sin * sin
        back = turned * (cos / scale)
        back.addcmul_(self.rotate(turned), sin / scale, value=-1)
        return back if cos.shape[-1] == x.shape[-1] else torch.cat((back, x[..., cos.shape[-1] :].float()), dim=-1)

    def mean_rotation(self, future: int) -> Tensor | None:
        """Mean rotation matrix over the next `future` positions, [batch, dim, dim]; None without rotary."""
        if self.rotary is None or future == 0:
            return None
        ahead = self.seen[:, None] + torch.arange(future, device=self.device)
        cos, sin = (t.float().mean(1) for t in self.rotary(ahead))
        width = cos.shape[-1]
        identity = torch.eye(width, device=self.device)
        # Row j of `rotate(identity)` is the rotation of the unit vector e_j: its transpose maps q to rotate(q).
        turn = torch.diag_embed(cos) + sin[:, :, None] * self.rotate(identity).mT
        rotation = torch.eye(self.dim, device=self.device).repeat(self.batch, 1, 1)
        rotation[:, :width, :width] = turn
        return rotation
