"""Copies of cache layers of transformers, such as layers with a sliding window or with linear attention."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor


def copy_stock_layer(layer: Any) -> Any:
    """Return an independent copy of a layer of transformers.

    `copy.deepcopy` refuses tensors that autograd has recorded. Gradients flow through the copies of such tensors.
    """
    other = copy.copy(layer)
    vars(other).update({name: _copy(value) for name, value in vars(layer).items()})
    return other


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        items: dict[Any, Any] = value
        return {key: _copy(item) for key, item in items.items()}
    if isinstance(value, list):
        parts: list[Any] = value
        return [_copy(part) for part in parts]
    return copy.deepcopy(value)
