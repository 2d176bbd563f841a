"""Rotary position embeddings: evaluate the embedding of a model at any positions."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def rotate_half(x: Tensor) -> Tensor:  # [..., rotary_dim]
    """Rotate each pair (x_j, x_{j + rotary_dim/2}) by 90 degrees, which is how Llama pairs the dimensions."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def find_rotate_half(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the `rotate_half` function of the file that defines an attention module; Llama's if it has none."""
    return getattr(sys.modules[type(module).__module__], "rotate_half", rotate_half)


class RotaryEmbedding:
    """A model's rotary embedding for one layer type.

    All layers ask for the same positions during a prefill, so the last result is cached.

    Args:
        embedding: the model's `rotary_emb` module.
        layer_type: passed to the embedding if it depends on the type of the layer; None if it does not.

    Attributes:
        depends_on_length: whether the frequencies change with the largest position (dynamic NTK, LongRoPE).

    """

    def __init__(self, embedding: Any, layer_type: str | None) -> None:
        self._embedding, self._layer_type = embedding, layer_type
        rope_type = embedding.rope_type[layer_type] if layer_type else getattr(embedding, "rope_type", "default")
        self.depends_on_length = rope_type in ("dynamic", "longrope")
        # The last positions of each length, with their cosines and sines.
        self._last: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines [batch, tokens, rotary_dim] of positions [batch, tokens]."""
        last = self._last.get(positions.shape[1])
        if last is not None and last[0].device == positions.device and torch.equal(last[0], positions):
            return last[1]
        # If the frequencies depend on the length, the embedding changes them in place when it is called: call a copy.
        embedding = copy.deepcopy(self._embedding) if self.depends_on_length else self._embedding
        empty = torch.empty(0, dtype=torch.float32, device=positions.device)  # sets dtype and device of the result
        cos, sin = embedding(empty, positions, self._layer_type) if self._layer_type else embedding(empty, positions)
        # The embedding may be on another device than the layer if the model is spread over several devices.
        result = (cos.to(positions.device), sin.to(positions.device))
        self._last[positions.shape[1]] = (positions, result)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> RotaryEmbedding:
        return self

    def clear_cache(self) -> None:
        """Free the cached results."""
        self._last.clear()


def shift_positions(
    keys: Tensor, shifts: Tensor, rotary: RotaryEmbedding, rotate_half: Callable[[Tensor], Tensor]
) -> Tensor:
    """Move rotated keys to later positions.

    Args:
        keys: [batch, num_key_value_heads, entries, head_dim], after the rotary embedding.
        shifts: number of positions by which each key moves, long [batch, num_key_value_heads, entries].
        rotary: the model's rotary embedding.
        rotate_half: rotates each pair of dimensions by 90 degrees, in the way that the model pairs them.

    Returns:
        The keys in their own dtype; the rotation is computed in float32.

    """
    cos, sin = (x.float().unflatten(0, shifts.shape[:2]) for x in rotary(shifts.flatten(0, 1)))
    # YaRN also scales the keys. They are already scaled, so only the rotation is applied.
    scale = (cos * cos + sin * sin).sqrt()
    rotated = keys[..., : cos.shape[-1]].float()
    rotated = rotated * (cos / scale) + rotate_half(rotated) * (sin / scale)
    return torch.cat((rotated.to(keys.dtype), keys[..., cos.shape[-1] :]), dim=-1)


def rotary_embeddings(decoder: nn.Module, modules: dict[int, nn.Module]) -> dict[int, RotaryEmbedding | None]:
    """Return the rotary embedding of each layer; layers of one type share one object.

    Args:
        decoder: the transformer.
        modules: its attention modules, by layer index.

    Returns:
        The embeddings by layer index; None for a model without a `rotary_emb` module.

    """
    embedding: Any = getattr(decoder, "rotary_emb", None)
    if embedding is None:
        return dict.fromkeys(modules)
    by_type: dict[str | None, RotaryEmbedding] = {}
    by_layer: dict[int, RotaryEmbedding | None] = {}
    for index, module in modules.items():
        layer_type = getattr(module, "layer_type", None)
        # Gemma 3 has separate frequencies for each layer type; its embedding takes the type as an argument.
        layer_type = layer_type if hasattr(embedding, f"{layer_type}_inv_freq") else None
        if layer_type not in by_type:
            by_type[layer_type] = RotaryEmbedding(embedding, layer_type)
        by_layer[index] = by_type[layer_type]
    return by_layer
