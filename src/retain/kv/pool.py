"""One budget for all heads and layers: layers give up what others claim with better right."""

from __future__ import annotations

import torch
from torch import Tensor

from retain.kv.allocation import MarginalCapacity, Request, claims
from retain.kv.policy import Policy
from retain.kv.ragged import RaggedStorage
from retain.kv.selection import Budget
from retain.kv.signals import Signals

_LOWEST = torch.finfo(torch.float32).min / 2


class Pool:
    """The entries of all layers of a cache, each with a claim; the largest claims of all stay.

    Layers come one after the other. At every time the pool holds the largest claims of what it has been shown, as
    many as the whole model may keep, so that after the last layer it holds the largest of all, and never more
    than the whole budget.

    Args:
        layers: number of layers.

    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._storages: dict[int, RaggedStorage] = {}

    def claims(self, signals: Signals, policy: Policy, budget: Budget, request: Request) -> Tensor:
        """Return each entry's claim, [batch, kv_heads, tokens]: −inf where there is none, +inf if it is sure to stay.

        The n-th best entry of a head by the policy's score claims with the head's n-th largest share, so that the
        number of entries follows the shares and their choice the scores.
        """
        assert isinstance(policy.allocation, MarginalCapacity)
        scores = signals.masked(policy.score(signals).clamp_min(_LOWEST))
        if bool(scores.isnan().any()):
            raise ValueError("the policy's scores contain NaN, as they do when keys, values or queries hold NaN or Inf")
        order = scores.masked_fill(budget.protected, float("inf")).argsort(-1, descending=True)
        return torch.empty_like(scores).scatter_(-1, order, claims(request, policy.allocation.safeguard))

    def admit(self, layer: int, claims: Tensor, allowed: list[int]) -> Tensor:
        """Return which entries of a layer stay, and drop what other layers hold with less right.

        Args:
            layer: which.
            claims: of its entries, [batch, kv_heads, tokens]; −inf where there is none. Those without a claim yet
                (NaN), here or in other layers, stay until their layer evicts and count for nothing until then.
            allowed: entries of each row, in the mean over heads and layers.

        Returns:
            Ascending indices, long [batch, kv_heads, most kept], −1 for none in the first places.

        """
        stay = claims != float("-inf")
        others = {number: storage for number, storage in self._storages.items() if number != layer}
        masks = {number: torch.ones_like(s.columns["claim"], dtype=torch.bool) for number, s in others.items()}
        for row, mean in enumerate(allowed):
            total = mean * claims.shape[1] * self.layers
            spans = {number: storage.row_span(row) for number, storage in others.items()}
            parts = [claims[row].flatten(), *(others[number].columns["claim"][span] for number, span in spans.items())]
            every = torch.cat(parts)
            if int((every > float("-inf")).sum()) <= total:
                continue
            best = every.isnan()
            best[every.masked_fill(best, float("-inf")).topk(total).indices] = True
            own, *rest = best.split([part.numel() for part in parts])
            stay[row] = own.view_as(stay[row])
            for (number, span), kept in zip(spans.items(), rest, strict=True):
                masks[number][span] = kept
        for number, mask in masks.items():
            if not bool(mask.all()):
                others[number].keep(mask)
        index = torch.arange(claims.shape[-1], device=claims.device).where(stay, -1)
        return index.sort(-1).values[..., -int(stay.sum(-1).max()) :]

    def settle(self, layer: int, storage: RaggedStorage) -> None:
        """Remember what a layer has stored."""
        self._storages[layer] = storage
