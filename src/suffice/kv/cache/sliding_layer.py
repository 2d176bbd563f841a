"""A compressed layer with a sliding window, of a model that has no layers with full attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from suffice.gpu import async_tensor
from suffice.kv.attention.call import AttentionCall, run_attention
from suffice.kv.attention.masks import additive_mask
from suffice.kv.attention.softmax import attend_with_sinks
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.storage.per_head import PerHeadStorage
from suffice.kv.storage.uniform import AlignedStorage


class SlidingLayer(CompressedLayer):
    """A layer whose tokens read the last `window` tokens, including themselves.

    A budget that is a fraction refers to the entries that the next token can read, at most window − 1. Policies score
    these entries as if they were the whole text. Entries that the next token cannot read are dropped before it is
    stored, so that a single new token may read all entries.

    Args:
        window: length of the window in tokens, at least 2.
        arguments: see `CompressedLayer`.

    """

    def __init__(self, window: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.is_sliding = True
        self.window = window
        self._oldest: int | None = None  # no entry has a lower position; None if it is not known

    @property
    def max_readable(self) -> int | None:
        """Number of entries that the next token can read."""
        return self.window - 1

    def reset(self) -> None:
        """Remove all tokens."""
        super().reset()
        self._oldest = None

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Compute an attention call over the entries in the window and evict."""
        num_new = call.query.shape[2]
        # Without the option, the new tokens read all entries that the model's own cache would hold before them.
        has_windows = call.options.get("sliding_window") is not None
        if self.storage is None or num_new == 1 or not has_windows or self.state.num_seen + num_new <= self.window:
            return super().attend(call)
        self.pre_attention(call)
        output, attention = self._attend_in_windows(call)
        self.post_attention(call, attention)
        return output, attention

    def pre_attention(self, call: AttentionCall) -> None:
        """Check an attention call, plan the eviction after it, and store its new tokens."""
        self._drop_unreadable()
        super().pre_attention(call)

    def post_attention(self, call: AttentionCall, attention: Tensor | None) -> None:
        """Evict entries after the attention of a call has been computed, if an eviction is planned."""
        if self.storage is None and call.query.shape[2] >= self.window:
            # Later tokens can read only the last window − 1 of these tokens.
            last = slice(1 - self.window, None)
            call = replace(call, query=call.query[:, :, last], key=call.key[:, :, last], value=call.value[:, :, last])
            self.new_positions, attention = self.new_positions[:, last], None
        elif self._plan is not None:
            self._drop_unreadable()
        super().post_attention(call, attention)

    def _attend_in_windows(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Compute the attention of several new tokens, each over the entries in its own window."""
        assert self.storage is not None
        entries = self.storage.entries
        positions, queries = entries.positions[:, :, None], self.new_positions[:, None, :, None]
        in_window = (positions >= 0) & (positions <= queries) & (positions > queries - self.window)
        # What the queries of padding read does not matter, but they must read something.
        heads = entries.keys.shape[1]
        readable = (in_window | (queries < 0)).expand(-1, heads, -1, -1)
        is_eager = call.implementation == "eager"
        if not is_eager and (call.softcap is not None or call.sink_logits is not None):  # sdpa supports neither
            output = attend_with_sinks(
                call.query.unflatten(1, (heads, -1)),
                entries.keys[:, :, None],
                entries.values[:, :, None],
                readable[:, :, None],
                scaling=call.scaling or call.query.shape[-1] ** -0.5,
                softcap=call.softcap,
                sink_logits=None if call.sink_logits is None else call.sink_logits.view(heads, -1, 1, 1),
            )
            return output.flatten(1, 2).transpose(1, 2).contiguous(), None
        readable = readable.repeat_interleave(call.query.shape[1] // heads, 1)
        return run_attention(
            replace(
                call,
                key=entries.keys,
                value=entries.values,
                mask=additive_mask(readable, call.query.dtype) if is_eager else readable,
                implementation="eager" if is_eager else "sdpa",
            )
        )

    def _drop_unreadable(self) -> None:
        """Drop the entries that the next token cannot read."""
        state, storage = self.state, self.storage
        limits = [state.num_seen - row.num_padding - self.window for row in state.rows]
        if storage is None or max(limits) < (self._oldest or 0):
            return
        if isinstance(storage, AlignedStorage):
            storage.keep_last(self.window - 1)  # nothing was evicted: all heads hold the same tokens
            return
        assert isinstance(storage, PerHeadStorage)
        positions = storage.positions
        kept = (positions >= 0) & (positions > async_tensor(limits, positions.device)[:, None, None])
        slots = torch.arange(positions.shape[2], device=positions.device)
        self._oldest = int(torch.where(kept, positions, state.num_seen).min()) if positions.numel() else None
        self.state = replace(state, storage=storage.keep(slots.where(kept, -1)))

    @property
    def is_croppable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether new tokens can be removed again, as assisted decoding does."""
        return super().is_croppable and self.state.num_seen < self.window

    def check_crop(self, tokens_to_remove: int) -> int:
        """Return how many tokens `crop` removes; see `CompressedLayer.check_crop`.

        Raises:
            ValueError: the text is at least as long as the window.

        """
        if self.state.num_seen >= self.window:
            raise ValueError(
                f"crop must be called while the text is shorter than the window of {self.window} tokens, got a cache "
                f"of {self.state.num_seen} tokens: entries that left the window cannot be restored"
            )
        return super().check_crop(tokens_to_remove)
