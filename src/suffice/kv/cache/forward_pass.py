"""One forward pass over a cache. If it fails, its tokens are removed again, or the cache refuses further passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.cache.linear_states import has_linear_states
from suffice.kv.cache.state import LayerState
from suffice.kv.cache.stock_layer import copy_stock_layer


class ForwardPass:
    """The current forward pass over the layers of a cache.

    Attributes:
        is_open: whether a forward pass is running.
        has_stored: whether it has begun to change layers.

    """

    def __init__(self) -> None:
        self.is_open = self.has_stored = False
        self._before: tuple[Any, ...] = ()
        self._is_damaged = False  # an earlier pass failed, and what it stored could not be removed

    def settle(self, layers: Sequence[Any]) -> bool:
        """End an earlier pass that was interrupted and did not end. Return whether there was one.

        Raises:
            ValueError: an earlier pass failed, and what it has stored cannot be removed.

        """
        was_interrupted = self.is_open
        self.end(layers, failed=True)
        if self._is_damaged:
            raise ValueError(
                "past_key_values must hold the tokens of complete forward passes, got a CompressedCache whose last "
                "forward pass failed after layers had evicted entries or updated their states. Make a new "
                "CompressedCache, or continue from a copy() that was made before"
            )
        return was_interrupted

    def check_earlier(self, layers: Sequence[Any]) -> None:
        """Check that all earlier passes are complete, before a new one.

        Raises:
            ValueError: an earlier pass failed or was interrupted after it had stored tokens.

        """
        if self.settle(layers):
            raise ValueError(
                "past_key_values must hold the tokens of complete forward passes, got a CompressedCache whose last "
                "forward pass was interrupted. Its tokens have been removed: call the model again"
            )

    def begin(self, layers: Sequence[Any]) -> None:
        """Remember the state of all layers."""
        self._before = tuple(map(_remember, layers))
        self.is_open, self.has_stored = True, False

    def end(self, layers: Sequence[Any], *, failed: bool) -> None:
        """End the pass. If it failed, remove the tokens that it has stored, if this is possible."""
        if not self.is_open:
            return
        self.is_open = False
        if failed and self.has_stored:
            pairs = list(zip(layers, self._before, strict=True))
            if all(_can_undo(layer, before) for layer, before in pairs):
                for layer, before in pairs:
                    _undo(layer, before)
            else:
                self._is_damaged = True
        self._before = ()


def _remember(layer: Any) -> Any:
    """Return what is needed to undo a pass in a layer, without a reference to its entries."""
    if isinstance(layer, CompressedLayer):
        return replace(layer.state, storage=None)
    num_seen = _num_seen(layer)
    return copy_stock_layer(layer) if num_seen == 0 else num_seen


def _num_seen(layer: Any) -> int | None:
    """Return the number of tokens that a layer of transformers has seen; None if it has states but no count."""
    if hasattr(layer, "has_previous_state"):
        states = layer.has_previous_state
        return None if any(states.values() if isinstance(states, dict) else [states]) else 0
    return layer.get_seq_length() if hasattr(layer, "get_seq_length") else 0  # a layer that stores nothing


def _can_undo(layer: Any, before: Any) -> bool:
    if isinstance(before, LayerState):
        new = layer.state.num_seen - before.num_seen
        has_only_appended = layer.state.num_appended == before.num_appended + new
        return before.num_seen == 0 or (has_only_appended and not has_linear_states(layer))
    return not isinstance(before, int | None) or (before is not None and _num_seen(layer) == before)


def _undo(layer: Any, before: Any) -> None:
    if not isinstance(before, LayerState):
        if not isinstance(before, int):
            layer.__dict__ = before.__dict__
        return
    layer.awaits_attention = False
    if before.num_seen == 0 or layer.storage is None:
        layer.reset()
        return
    new = layer.state.num_seen - before.num_seen
    if new:
        layer.storage.drop_last(new)
    layer.state = replace(before, storage=layer.storage)
