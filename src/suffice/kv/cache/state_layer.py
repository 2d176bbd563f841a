"""The interface of transformers' cache layers, for a layer whose tokens are those of a `LayerState`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from suffice.kv.cache.settings import CacheSettings
from suffice.kv.cache.state import LayerState
from suffice.kv.storage.base import Storage


class StateLayer(DynamicLayer):
    """A cache layer of transformers that reads its keys, values and numbers of tokens from a `LayerState`.

    Args:
        settings: settings of the cache.

    """

    def __init__(self, settings: CacheSettings) -> None:
        self.state = LayerState()
        super().__init__()
        self.settings = settings

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
        self.is_initialized = False

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
