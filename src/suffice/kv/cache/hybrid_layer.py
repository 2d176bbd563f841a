"""A compressed layer that also holds the convolution and recurrent states of linear attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from suffice.kv.cache.global_budget import GlobalBudget
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.cache.linear_states import copy_states


class HybridCompressedLayer(CompressedLayer, LinearAttentionAndFullAttentionLayer):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A layer of a model that runs attention and linear attention side by side, such as Falcon-H1.

    The states of linear attention have a fixed size. They are kept as in the model's own cache.

    Args:
        number_of_states: number of convolution and of recurrent states.
        arguments: see `CompressedLayer`.

    """

    def __init__(self, number_of_states: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    @property
    def is_croppable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """False, because earlier states are not kept."""
        return False

    def check_crop(self, tokens_to_remove: int) -> int:
        """Raise an error, because earlier states are not kept."""
        raise ValueError(
            f"crop must not be called for a model with states of linear attention, got {tokens_to_remove} tokens to "
            "remove: earlier states are not kept. Generate without assisted decoding"
        )

    def reset(self) -> None:
        """Remove all tokens and states."""
        CompressedLayer.reset(self)
        if hasattr(self, "conv_states"):
            LinearAttentionLayer.reset(self)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Reorder the rows of the batch, as beam search does."""
        CompressedLayer.reorder_cache(self, beam_idx)
        LinearAttentionLayer.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        CompressedLayer.batch_repeat_interleave(self, repeats)
        for states in (self.conv_states, self.recurrent_states):
            for number, state in states.items():
                states[number] = None if state is None else state.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        CompressedLayer.batch_select_indices(self, indices)
        for states in (self.conv_states, self.recurrent_states):
            for number, state in states.items():
                states[number] = None if state is None else state[indices.to(state.device)]

    def copy(self, global_budget: GlobalBudget | None) -> HybridCompressedLayer:
        """Return a layer that shares the stored keys and values, and has copies of the states."""
        other = super().copy(global_budget)
        assert isinstance(other, HybridCompressedLayer)
        copy_states([self], other)
        return other


class HybridGroupLayer(LinearAttentionAndFullAttentionLayer):
    """A layer of a `CacheGroup` with states of linear attention. Keys and values go to another layer of the group.

    Args:
        layer: the layer that keys and values go to.
        number_of_states: number of convolution and of recurrent states.

    """

    def __init__(self, layer: Any, number_of_states: int) -> None:
        super().__init__(number_of_states=number_of_states)
        self._layer = layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Pass keys and values on."""
        return self._layer.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self, *args: Any) -> int:
        """Return the number of tokens seen, including padding."""
        return self._layer.get_seq_length(*args)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return length and offset of the mask."""
        return self._layer.get_mask_sizes(query_length)
