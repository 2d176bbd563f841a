"""The convolution and recurrent states of cache layers with linear attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_STATES = ("conv_states", "recurrent_states")
# What transformers records about each state, by the index of the state.
_RECORDS = ("has_previous_state", "is_conv_states_initialized", "is_recurrent_states_initialized", "conv_kernel_size")


def has_linear_states(layer: Any) -> bool:
    """Return whether a cache layer holds convolution and recurrent states."""
    return hasattr(layer, "conv_states")


def copy_states(sources: Sequence[Any], target: Any, row: int | None = None) -> None:
    """Copy states of linear attention to another layer.

    Args:
        sources: layers whose rows become the rows of the target, in this order. They have seen the same tokens.
        target: the layer that gets copies.
        row: index of the row to copy; None copies all rows.

    """
    first = sources[0]
    for name in _STATES:
        states: dict[int, Tensor | None] = {}
        for number in getattr(first, name):
            parts = [getattr(source, name)[number] for source in sources]
            if parts[0] is None:
                states[number] = None
            else:
                joined = torch.cat(parts)
                states[number] = joined if row is None else joined[row : row + 1].clone()
        setattr(target, name, states)
    for name in _RECORDS:
        if hasattr(first, name):
            setattr(target, name, dict(getattr(first, name)))
    target.dtype, target.device = first.dtype, first.device


def save_states(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the states of a layer by name, and what transformers records about them."""
    tensors = {
        f"{name}.{number}": state
        for name in _STATES
        for number, state in getattr(layer, name).items()
        if state is not None
    }
    return tensors, {name: list(getattr(layer, name).items()) for name in _RECORDS if hasattr(layer, name)}


def restore_states(layer: Any, tensors: Mapping[str, Tensor], records: Mapping[str, Any], device: torch.device) -> None:
    """Give a new layer the result of `save_states`."""
    for name in _STATES:
        states = {number: tensors.get(f"{name}.{number}") for number in getattr(layer, name)}
        setattr(layer, name, {number: None if x is None else x.to(device) for number, x in states.items()})
        for state in states.values():
            if state is not None and layer.device is None:
                layer.dtype, layer.device = state.dtype, device
    for name, items in records.items():
        setattr(layer, name, dict(items))
