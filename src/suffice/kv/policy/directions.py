"""Directions: how a cached token moves the attention's output if it is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.kv.hf.tensor_parallel import local_columns
from suffice.kv.policy.attention_stats import Signals


class Directions(ABC):
    """Base of all directions; a new one defines `vectors`."""

    @abstractmethod
    def vectors(self, signals: Signals) -> Tensor:
        """Return the directions [batch, kv_heads, tokens, dim], float32; what stands on padding is ignored."""

    def norms(self, signals: Signals, p: float) -> Tensor:
        """Return their p-norms [batch, kv_heads, tokens]."""
        return self.vectors(signals).norm(p=p, dim=-1)


@dataclass(frozen=True)
class Constant(Directions):
    """u = 1: every token moves the output alike."""

    def vectors(self, signals: Signals) -> Tensor:
        """Return ones [batch, kv_heads, tokens, 1]."""
        return torch.ones(signals.batch, signals.kv_heads, signals.tokens, 1, device=signals.device)

    def __str__(self) -> str:
        return "1"


@dataclass(frozen=True)
class Value(Directions):
    """u = v (2604.25975, Eq. 7)."""

    def vectors(self, signals: Signals) -> Tensor:
        """Return the values."""
        return signals.values32

    def __str__(self) -> str:
        return "v"


@dataclass(frozen=True)
class OutputValue(Directions):
    """u = W_O v: the value as the output projection writes it into the residual stream."""

    def vectors(self, signals: Signals) -> Tensor:
        """Return vectors of the value's dimension with the inner products of W_O v, averaged over the group.

        Norms p = 2 and leverage scores need inner products alone, so C v stands for W_O v, where CᵀC is the
        mean of W_Oᵀ W_O over the query heads of the group.
        """
        inner = torch.stack([weight.mT @ weight for weight in self._weights(signals)])
        inner = inner.unflatten(0, (signals.kv_heads, signals.group)).mean(1)
        values, vectors = torch.linalg.eigh(inner)
        return signals.values32 @ (vectors * values.clamp_min(0).sqrt()[:, None])

    def norms(self, signals: Signals, p: float) -> Tensor:
        """Return the p-norms of W_O v, averaged over the group; one head's projection exists at a time."""
        heads = [
            (signals.values32[:, head // signals.group] @ weight.mT).norm(p=p, dim=-1)
            for head, weight in enumerate(self._weights(signals))
        ]
        return signals.grouped(torch.stack(heads, 1)).mean(2)

    def _weights(self, signals: Signals) -> list[Tensor]:  # heads x [hidden, value_dim]
        if signals.output is None:
            raise ValueError(
                "directions OutputValue needs the attention's output projection, a linear layer named "
                "`o_proj`; this model's attention has none. Use Value() instead"
            )
        dim = signals.values.shape[-1]
        here = local_columns(signals.output, signals.queries.shape[1] * dim)
        return list(here.float().split(dim, dim=1))

    def __str__(self) -> str:
        return "W_O v"


@dataclass(frozen=True)
class Key(Directions):
    """u = k, as cached or before the rotary embedding, centred or not, of length one or not."""

    rotary: bool = True
    centred: bool = False
    unit: bool = False

    def vectors(self, signals: Signals) -> Tensor:
        """Return the keys."""
        keys = signals.keys32 if self.rotary else signals.unrotated_keys()
        if self.centred:
            keys = keys - signals.mean(keys)[:, :, None]
        return torch.nn.functional.normalize(keys, dim=-1) if self.unit else keys

    def __str__(self) -> str:
        return "k/‖k‖" if self.unit else "k"
