"""One budget for all heads and layers: layers give up what others claim with better right."""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.gpu import async_tensor
from suffice.kv.budget.allocation import MarginalCapacity, Request, claims
from suffice.kv.hf.tensor_parallel import Sharding, topk_masks
from suffice.kv.policy.attention_stats import Signals
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.selection import NOT_A_NUMBER, Budget
from suffice.kv.storage.ragged import RaggedStorage
from suffice.kv.storage.uniform import Entries

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
        signals.require(~scores.isnan().any(), ValueError(NOT_A_NUMBER))
        signals.settle()  # before other layers give up anything
        order = scores.masked_fill(budget.protected, float("inf")).argsort(-1, descending=True)
        return torch.empty_like(scores).scatter_(-1, order, claims(request, policy.allocation.safeguard))

    def admit(self, layer: int, claims: Tensor, allowed: list[int], sharding: Sharding | None = None) -> Tensor:
        """Return which entries of a layer stay, and drop what other layers hold with less right.

        Args:
            layer: which.
            claims: of its entries, [batch, kv_heads, tokens]; −inf where there is none. Those without a claim yet
                (NaN), here or in other layers, stay until their layer evicts and count for nothing until then.
            allowed: entries of each row, in the mean over heads and layers.
            sharding: where the other heads of these layers are; None if all are here.

        Returns:
            Ascending indices, long [batch, kv_heads, most kept], −1 for none in the first places.

        """
        stay = torch.zeros_like(claims, dtype=torch.bool)
        others = {number: storage for number, storage in self._storages.items() if number != layer}
        masks = {number: torch.ones_like(s.columns["claim"], dtype=torch.bool) for number, s in others.items()}
        heads = claims.shape[1] if sharding is None else sharding.num_kv_heads
        rows = [
            # Layers may be on other devices; their claims come here, what they hold stays there.
            [claims[row].flatten(), *(s.columns["claim"][s.row_span(row)].to(claims.device) for s in others.values())]
            for row in range(len(allowed))
        ]
        every = [torch.cat(parts) for parts in rows]
        silent = [own.isnan() for own in every]
        known = [own.masked_fill(none, float("-inf")) for own, none in zip(every, silent, strict=True)]
        best = topk_masks(known, [mean * heads * self.layers for mean in allowed], sharding)
        for row, parts in enumerate(rows):
            own, *rest = (best[row] | silent[row]).split([part.numel() for part in parts])
            stay[row] = own.view_as(stay[row])
            for (number, storage), kept in zip(others.items(), rest, strict=True):
                masks[number][storage.row_span(row)] = kept.to(masks[number].device)
        for number, mask in masks.items():
            if not bool(mask.all()):
                others[number].keep(mask)
        index = torch.arange(claims.shape[-1], device=claims.device).where(stay, -1)
        return index.sort(-1).values[..., -int(stay.sum(-1).max()) :]

    def settle(self, layer: int, storage: RaggedStorage) -> None:
        """Remember what a layer has stored."""
        self._storages[layer] = storage


def renewed(claims: Tensor, entries: Entries, due: list[bool]) -> Tensor:
    """Return new claims for the rows that evict and the earlier ones for all others, as if each were alone."""
    earlier = entries.columns.get("claim")
    if earlier is None or all(due):
        return claims
    now = async_tensor(due, claims.device)[:, None, None]
    return torch.where(now, claims, earlier.masked_fill(entries.positions < 0, float("-inf")))
