"""The rotary embedding of a model's layers, asked for positions of our own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def rotate_half(x: Tensor) -> Tensor:  # [..., rotary_dim]
    """Rotate each pair (x_j, x_{j + rotary_dim/2}) by 90 degrees, as Llama and its kin pair dimensions."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class RotaryEmbedding:
    """The model's rotary embedding for one layer type: cosines and sines of positions.

    All layers of a prefill ask for the same positions: the last answer is kept.
    """

    def __init__(self, embedding: Any, kind: str | None) -> None:
        self._embedding, self._kind = embedding, kind
        rope = embedding.rope_type[kind] if kind else getattr(embedding, "rope_type", "default")
        # These kinds adapt their frequencies to the positions they are asked for: ask a copy.
        self.adapts = rope in ("dynamic", "longrope")
        self._last: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [batch, m, rotary_dim] of positions [batch, m]."""
        known = self._last.get(positions.shape[1])
        if known is not None and known[0].device == positions.device and torch.equal(known[0], positions):
            return known[1]
        own = copy.deepcopy(self._embedding) if self.adapts else self._embedding
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        cos, sin = own(like, positions, self._kind) if self._kind else own(like, positions)
        # Where layers are spread over devices, the embedding answers on its own.
        answer = (cos.to(positions.device), sin.to(positions.device))
        self._last[positions.shape[1]] = (positions, answer)
        return answer

    def __deepcopy__(self, memo: dict[int, Any]) -> RotaryEmbedding:
        return self

    def forget(self) -> None:
        """Free the kept answers."""
        self._last.clear()


def shift(keys: Tensor, steps: Tensor, rotary: RotaryEmbedding, rotate: Callable[[Tensor], Tensor]) -> Tensor:
    """Turn keys as if each stood so many positions later, in float32, returned in their own dtype.

    Args:
        keys: [batch, kv_heads, tokens, dim], after rotary embedding.
        steps: long [batch, kv_heads, tokens].
        rotary: the model's rotary embedding.
        rotate: how that embedding pairs the dimensions.

    """
    cos, sin = (t.float().unflatten(0, steps.shape[:2]) for t in rotary(steps.flatten(0, 1)))
    # An embedding that also scales (YaRN) has scaled the keys already.
    scale = (cos * cos + sin * sin).sqrt()
    turned = keys[..., : cos.shape[-1]].float()
    turned = turned * (cos / scale) + rotate(turned) * (sin / scale)
    return torch.cat((turned.to(keys.dtype), keys[..., cos.shape[-1] :]), dim=-1)


def rotaries_of(decoder: nn.Module, modules: dict[int, nn.Module]) -> dict[int, RotaryEmbedding | None]:
    """Return the rotary embedding of each layer; layers of one type share theirs."""
    embedding: Any = getattr(decoder, "rotary_emb", None)
    if embedding is None:
        return dict.fromkeys(modules)
    made: dict[str | None, RotaryEmbedding] = {}
    found: dict[int, RotaryEmbedding | None] = {}
    for index, module in modules.items():
        kind = getattr(module, "layer_type", None)
        # Gemma 3 rotates its layer types differently and asks which one is meant.
        kind = kind if hasattr(embedding, f"{kind}_inv_freq") else None
        if kind not in made:
            made[kind] = RotaryEmbedding(embedding, kind)
        found[index] = made[kind]
    return found
