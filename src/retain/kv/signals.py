"""What one attention call shows about its cached tokens: the input of every policy."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Rotary = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Positions [batch, m] → cosines and sines [batch, m, rotary_dim] of the model's rotary embedding."""

T = TypeVar("T")
NEGATIVE = float("-inf")


def rotate_half(x: Tensor) -> Tensor:  # [..., rotary_dim]
    """Rotate each pair (x_j, x_{j + rotary_dim/2}) by 90 degrees, as Llama and its kin pair dimensions."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class Signals:
    """Queries, keys and values of one layer's attention call, and statistics of them, each computed once.

    `batch` rows, `heads` query heads in `kv_heads` groups of `group`, `tokens` cached tokens of which the
    last `queries` belong to this call, head dimension `dim`. Everything derived is float32.

    Args:
        queries: [batch, heads, queries, dim], after rotary embedding.
        keys: [batch, kv_heads, tokens, dim], after rotary embedding.
        values: [batch, kv_heads, tokens, value_dim].
        valid: bool [batch, tokens], False on padding; None when nothing is padded.
        scaling: factor on the query-key product, 1/√dim by default.
        layer: index of the layer among those whose cache is compressed, and `layers` their number.
        output: weight of the attention's output projection, [hidden, heads * value_dim].
        rotary: the model's rotary embedding; None for a model without.
        rotate: how that embedding pairs the dimensions.
        attention: the call's attention weights [batch, heads, queries, tokens] if it has computed them.

    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        valid: Tensor | None = None,
        scaling: float | None = None,
        layer: int = 0,
        layers: int = 1,
        output: Tensor | None = None,
        rotary: Rotary | None = None,
        rotate: Callable[[Tensor], Tensor] = rotate_half,
        attention: Tensor | None = None,
    ) -> None:
        self.queries, self.keys, self.values = queries, keys, values
        self.scaling = scaling if scaling is not None else 1 / math.sqrt(keys.shape[-1])
        self.layer, self.layers = layer, layers
        self.output, self.rotary, self.rotate, self.attention = output, rotary, rotate, attention
        self.batch, self.kv_heads, self.tokens, self.dim = keys.shape
        self.group = queries.shape[1] // self.kv_heads
        self._valid = valid
        self._memo: dict[Any, Any] = {}

    @property
    def device(self) -> torch.device:
        """Device of the keys."""
        return self.keys.device

    @functools.cached_property
    def valid(self) -> Tensor | None:
        """Bool [batch, tokens], or None when every token is valid."""
        return None if self._valid is None or bool(self._valid.all()) else self._valid

    @functools.cached_property
    def counts(self) -> Tensor:
        """Valid tokens of each row, long [batch]."""
        if self.valid is None:
            return torch.full((self.batch,), self.tokens, device=self.device)
        return self.valid.sum(-1)

    @functools.cached_property
    def positions(self) -> Tensor:
        """Index of each token within its row's own text, long [batch, tokens]; negative on left padding."""
        index = torch.arange(self.tokens, device=self.device).expand(self.batch, -1)
        return index - (self.tokens - self.counts)[:, None]

    def memo(self, name: object, compute: Callable[[], T]) -> T:
        """Return what `compute` gives, computed at the first call for this name."""
        if name not in self._memo:
            self._memo[name] = compute()
        return self._memo[name]

    def masked(self, scores: Tensor, fill: float = NEGATIVE) -> Tensor:  # [batch, kv_heads, tokens]
        """Return the scores with `fill` on padding."""
        return scores if self.valid is None else scores.masked_fill(~self.valid[:, None], fill)

    def mean(self, x: Tensor) -> Tensor:  # [batch, kv_heads, tokens, ...] -> [batch, kv_heads, ...]
        """Mean over the valid tokens of each row."""
        if self.valid is None:
            return x.mean(2)
        shape = [self.batch, 1, self.tokens] + [1] * (x.dim() - 3)
        total = (x * self.valid.view(shape)).sum(2)
        return total / self.counts.view([self.batch, 1] + [1] * (x.dim() - 3))

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
            batch with fewer valid tokens than `window` has zero weights for the queries that it lacks.

        """
        window = min(window, self.queries.shape[2])
        return self.memo(("attention", window), lambda: self._attention(slice(-window, None), self.tokens))

    def attention_from_last(self, window: int) -> Tensor:
        """Attention that each token receives from the call's last `window` queries, on average.

        As `attention_of_last(window).mean((2, 3))`, with one KV head's weights in memory at a time.

        Returns:
            [batch, kv_heads, tokens], float32.

        """
        return self.memo(("window", window), lambda: self._attention_from_last(window))

    def _attention_from_last(self, window: int) -> Tensor:
        window = min(window, self.queries.shape[2])
        if self.valid is not None or self.attention is not None:
            return self.attention_of_last(window).mean((2, 3))
        queries = self.grouped(self.queries[:, :, -window:].float() * self.scaling)
        # Query j of the window sees all but the newest window − 1 − j tokens.
        future = torch.ones(window, window, dtype=torch.bool, device=self.device).triu_(1)
        received = torch.empty(self.batch, self.kv_heads, self.tokens, device=self.device)
        # Two buffers for all heads; the softmax works row by row, so that a row stays in the processor's cache.
        logits, weights = received.new_empty(2, self.batch, self.group * window, self.tokens)
        share = received.new_full((1, self.group * window), 1 / (self.group * window))
        for head in range(self.kv_heads):
            torch.matmul(queries[:, head].flatten(1, 2), self.keys32[:, head].mT, out=logits)
            logits.unflatten(1, (-1, window))[..., -window:].masked_fill_(future, NEGATIVE)
            torch.softmax(logits, -1, out=weights)
            received[:, head] = (share @ weights).squeeze(1)
        return received

    def _attention(self, rows: slice, columns: int) -> Tensor:
        """Attention weights of some of the call's queries over the first `columns` tokens."""
        if self.attention is not None:
            return self.grouped(self.attention[:, :, rows, :columns].float())
        queries = self.grouped(self.queries[:, :, rows].float() * self.scaling).flatten(2, 3)
        logits = (queries @ self.keys32[:, :, :columns].mT).unflatten(2, (self.group, -1))
        total = self.queries.shape[2]
        own = torch.arange(total, device=self.device)[rows] + self.tokens - total
        future = torch.arange(columns, device=self.device) > own[:, None]
        # Only the newest columns can lie in some query's future.
        first = max(0, int(own[0]) + 1)
        logits[..., first:].masked_fill_(future[:, first:], NEGATIVE)
        if self.valid is None:
            return logits.softmax(-1)
        seen = self.valid[:, :columns]
        logits.masked_fill_(~seen[:, None, None, None], NEGATIVE)
        asked = self.valid[:, own][:, None, None, :, None]
        # The queries of padding see nothing; their softmax would be NaN.
        return logits.masked_fill_(~asked, 0.0).softmax(-1) * asked

    def attention_received(self, block: int = 256) -> Tensor:
        """Attention that each token received from all queries of the call, summed.

        Computed in blocks of queries, so that no more than `block` rows of the attention matrix exist.

        Returns:
            [batch, kv_heads, tokens], averaged over the GQA group.

        """
        return self.memo("received", lambda: self._received(block))

    def _received(self, block: int) -> Tensor:
        total = self.queries.shape[2]
        received = torch.zeros(self.batch, self.kv_heads, self.tokens, device=self.device)
        for start in range(0, total, block):
            stop = min(start + block, total)
            columns = self.tokens - total + stop
            weights = self._attention(slice(start, stop), columns)
            received[..., :columns] += weights.sum(3).mean(2)
        return received

    def unrotated(self, x: Tensor) -> Tensor:  # [batch, any heads, m, dim]: the newest m tokens
        """Undo the rotary embedding: what the vectors were before it, float32."""
        if self.rotary is None:
            return x.float()
        positions = self.positions[:, -x.shape[2] :].clamp_min(0)
        cos, sin = (t[:, None].float() for t in self.rotary(positions))
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
        ahead = self.counts[:, None] + torch.arange(future, device=self.device)
        cos, sin = (t.float().mean(1) for t in self.rotary(ahead))
        width = cos.shape[-1]
        identity = torch.eye(width, device=self.device)
        # Row j of `rotate(identity)` is the rotation of the unit vector e_j: its transpose maps q to rotate(q).
        turn = torch.diag_embed(cos) + sin[:, :, None] * self.rotate(identity).mT
        rotation = torch.eye(self.dim, device=self.device).repeat(self.batch, 1, 1)
        rotation[:, :width, :width] = turn
        return rotation
