"""One budget for all heads and layers of a cache: entries compete by priority."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from suffice.gpu import async_tensor
from suffice.kv.budget.allocation import BudgetRequest, SharedBudget, priorities
from suffice.kv.hf.tensor_parallel import Sharding, topk_masks
from suffice.kv.policy.estimators import Objective, score_entries
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.selection import LOWEST_SCORE, NAN_SCORES, LayerBudget
from suffice.kv.storage.base import Entries, Storage
from suffice.kv.storage.per_head import PerHeadStorage


@dataclass(frozen=True)
class GlobalSelection:
    """The entries that the global budget keeps, in one layer and in the other layers.

    Args:
        kept: indices of the kept entries of the layer, long [batch, num_key_value_heads, width], ascending. A head that
            keeps fewer than `width` entries starts with −1.
        kept_in_other_layers: by index of the layer, for layers that drop entries: for each row, which entries of
            `PerHeadStorage.row_priorities` are kept, bool [entries].

    """

    kept: Tensor
    kept_in_other_layers: dict[int, list[Tensor]] = field(default_factory=dict[int, list[Tensor]])


class GlobalBudget:
    """One budget for all layers of a cache, which keeps the entries with the highest priorities.

    Layers are processed one after the other. After each of them, the cache holds the entries with the highest
    priorities of all layers so far, at most as many as the whole model may keep. After the last layer, the cache
    therefore holds the entries with the highest priorities of the whole model.

    Args:
        num_layers: number of compressed layers.

    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self._storages: dict[int, PerHeadStorage] = {}
        self._decided: dict[int, Tensor] | None = None

    @property
    def is_decided(self) -> bool:
        """Whether it is known which entries each layer keeps in the end."""
        return self._decided is not None

    @contextlib.contextmanager
    def decided(self) -> Generator[None]:
        """Have each layer keep the entries that it holds now, when it selects entries of the same prompt again."""
        self._decided = {layer: storage.positions for layer, storage in self._storages.items()}
        try:
            yield
        finally:
            self._decided = None

    def priorities(self, policy: Policy, objective: Objective, budget: LayerBudget, request: BudgetRequest) -> Tensor:
        """Return the priority of each entry of a layer.

        The entry with the n-th highest score of a head gets the head's n-th largest contribution as priority. So the
        contributions decide how many entries a head keeps, and the scores decide which. The contributions are those of
        the policy's estimator, or scores from a replay.

        Returns:
            [batch, num_key_value_heads, entries]; −inf where there is no entry, +inf for entries that are always kept.

        """
        assert isinstance(policy.allocation, SharedBudget)
        stats = objective.stats
        scores = stats.mask_invalid(score_entries(policy.estimator, objective).clamp_min(LOWEST_SCORE))
        stats.require(~scores.isnan().any(), ValueError(NAN_SCORES))
        stats.raise_if_failed()
        with_protected = scores.masked_fill(budget.protected, torch.inf)
        kind = policy.allocation.replay_kind
        if kind is not None:
            replay_scores = stats.mask_invalid(stats.replay_score(kind)).masked_fill(budget.protected, torch.inf)
            request = replace(request, contributions=lambda: replay_scores)
        order = with_protected.argsort(-1, descending=True)
        return torch.empty_like(scores).scatter_(-1, order, priorities(request, policy.allocation.safeguard))

    def select(
        self, layer: int, layer_priorities: Tensor, allowed: Sequence[int], sharding: Sharding | None = None
    ) -> GlobalSelection:
        """Decide which entries to keep, in a layer and in all layers before it, without dropping any.

        Args:
            layer: index of the layer.
            layer_priorities: priorities of its entries, [batch, num_key_value_heads, entries]; −inf where there is no
                entry. Entries with a NaN priority, in this or in other layers, are new: they are kept, and do not count
                towards the budget until their layer evicts.
            allowed: for each row, the number of entries that a head may keep, averaged over heads and layers.
            sharding: how the heads of the layers are split over processes; None if this process has all heads.

        """
        if self._decided is not None:
            positions = self._decided[layer]
            # Without holes, the entries of a row are those of its tokens, right-aligned.
            num_padding = (layer_priorities == -torch.inf).sum(-1, keepdim=True)
            return GlobalSelection((positions + num_padding).where(positions >= 0, -1))
        is_kept = torch.zeros_like(layer_priorities, dtype=torch.bool)
        others = {index: storage for index, storage in self._storages.items() if index != layer}
        masks: dict[int, list[Tensor]] = {index: [] for index in others}
        num_heads = self._num_heads(layer, layer_priorities.shape[1])
        if sharding is not None:
            num_heads *= sharding.num_key_value_heads // layer_priorities.shape[1]
        device = layer_priorities.device
        # Layers may be on different devices. Priorities are compared on the device of this layer.
        rows = [
            [layer_priorities[row].flatten(), *(s.row_priorities(row).to(device) for s in others.values())]
            for row in range(len(allowed))
        ]
        joined = [torch.cat(parts) for parts in rows]
        unknown = [row.isnan() for row in joined]
        known = [row.masked_fill(nan, -torch.inf) for row, nan in zip(joined, unknown, strict=True)]
        highest = topk_masks(known, [mean * num_heads for mean in allowed], sharding)
        for row, parts in enumerate(rows):
            own, *rest = (highest[row] | unknown[row]).split([part.numel() for part in parts])
            is_kept[row] = own.view_as(is_kept[row])
            for (index, storage), kept in zip(others.items(), rest, strict=True):
                masks[index].append(kept.to(storage.positions.device))
        entry = torch.arange(layer_priorities.shape[-1], device=device).where(is_kept, -1)
        kept = entry.sort(-1).values[..., -int(is_kept.sum(-1).max()) :]
        return GlobalSelection(kept, {index: rows for index, rows in masks.items() if not bool(torch.cat(rows).all())})

    def _num_heads(self, layer: int, num_own: int) -> int:
        """Return the number of KV heads of all layers on this process.

        Layers without entries are assumed to have as many heads as the largest known layer, so that no entry is dropped
        too early.

        Args:
            layer: index of a layer.
            num_own: its number of heads.

        """
        known = [num_own, *(s.num_heads for index, s in self._storages.items() if index != layer)]
        return sum(known) + (self.num_layers - len(known)) * max(known)

    def drop_from_other_layers(self, selection: GlobalSelection) -> None:
        """Drop the entries of other layers that are not kept."""
        for index, masks in selection.kept_in_other_layers.items():
            self._storages[index].keep_by_row(masks)

    def forget(self, layer: int) -> None:
        """Remove the entries of a layer from those that compete for the budget."""
        self._storages.pop(layer, None)

    def register(self, layer: int, storage: Storage | None) -> None:
        """Add the stored entries of a layer to those that compete for the budget, if they have priorities."""
        if isinstance(storage, PerHeadStorage) and "priority" in storage.columns:
            self._storages[layer] = storage


def update_priorities(new: Tensor, entries: Entries, is_due: Sequence[bool]) -> Tensor:
    """Return new priorities for rows that evict, and the earlier priorities for rows that do not."""
    earlier = entries.columns.get("priority")
    if earlier is None or all(is_due):
        return new
    due = async_tensor(is_due, new.device)[:, None, None]
    return torch.where(due, new, earlier.masked_fill(entries.positions < 0, -torch.inf))
