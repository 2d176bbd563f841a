"""The steps of an eviction: plan which rows evict, select the entries to keep, validate, and commit.

Only the commit changes a layer, so that an error in an earlier step loses no entry. It replaces the storage by one that
holds copies of the kept entries, which frees the memory of all others; or, where that is possible, it moves the kept
entries to the front of the storage, whose other slots then take new tokens. With one budget for all layers, entries of
the earlier layers are dropped too (`GlobalBudget.drop_from_other_layers`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from suffice.kv.backend.torch_backend import TorchBackend
from suffice.kv.budget.protection import num_allowed
from suffice.kv.cache.global_budget import GlobalBudget, GlobalSelection, update_priorities
from suffice.kv.cache.memory import MemoryPlan
from suffice.kv.cache.rerotation import rerotate
from suffice.kv.cache.settings import CacheSettings, StorageConfig
from suffice.kv.cache.state import LayerState, RowState
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.capacity_share import capacity_share
from suffice.kv.policy.repair import MIN_QUERIES, repair_entries
from suffice.kv.policy.weight_state import WeightState
from suffice.kv.storage.base import LOGIT_BIAS, Entries, Storage, all_finite, right_aligned_order
from suffice.kv.storage.quantized import QuantizedStorage


@dataclass(frozen=True)
class EvictionPlan:
    """Which rows evict after an attention call.

    Args:
        is_due: for each row, whether it evicts.
        allowed: for each row, the number of entries that a head may keep, averaged over heads and layers; equal to
            `num_seen` for a row that does not evict.
        num_seen: for each row, the number of tokens so far, without padding.
        windows: for each row, the number of last tokens that every head keeps; 0 for a row that does not evict.
        storage: how the kept entries are stored.

    """

    is_due: tuple[bool, ...]
    allowed: tuple[int, ...]
    num_seen: tuple[int, ...]
    windows: tuple[int, ...]
    storage: StorageConfig

    @property
    def keeps_all(self) -> bool:
        """Whether every row may keep all tokens that it has seen."""
        return self.allowed == self.num_seen

    def check_repair(self) -> None:
        """Raise an error if a row that evicts has too few tokens to repair its entries.

        Raises:
            ValueError: its text is too short.

        """
        for row, (allowed, seen) in enumerate(zip(self.allowed, self.num_seen, strict=True)):
            if allowed < seen < MIN_QUERIES:
                raise ValueError(
                    f"input must have at least {MIN_QUERIES} tokens in each row with repair=True, which fits the kept "
                    f"entries to their queries, got {seen} in row {row}. Use repair=False for short texts"
                )


@dataclass(frozen=True)
class SelectedEntries:
    """The entries of a layer that an eviction keeps.

    Args:
        entries: all entries, with the keys and columns to store.
        kept: indices of the kept entries, long [batch, num_key_value_heads, width], ascending; −1 in empty slots. None
            if all entries are kept.
        counts: number of kept entries of each row and head, long [batch, num_key_value_heads] on the CPU; None if they
            were not counted.
        capacity: share of the capacity that the kept entries carry, [batch, num_key_value_heads]; None if it was not
            measured.
        state: state of stateful weights for the next eviction.
        other_layers: which entries of other layers are kept; None if the layers do not share one budget.
        repair_errors: held-out errors before and after the repair, see `Repair`; None without repair.

    """

    entries: Entries
    kept: Tensor | None = None
    counts: Tensor | None = None
    capacity: Tensor | None = None
    state: WeightState | None = None
    other_layers: GlobalSelection | None = None
    repair_errors: Tensor | None = None


def plan_eviction(
    settings: CacheSettings,
    rows: Sequence[RowState],
    *,
    num_input_tokens: int,
    num_appended: int,
    num_new: int,
    is_first: bool,
    max_readable: int | None = None,
    memory: MemoryPlan | None = None,
) -> EvictionPlan | None:
    """Return which rows evict after an attention call; None if no row does.

    Args:
        settings: settings of the cache.
        rows: state of each row, including the padding of the new tokens.
        num_input_tokens: number of tokens of the model's input so far, including padding and the new tokens.
        num_appended: number of tokens since the last eviction, including the new tokens.
        num_new: number of new tokens.
        is_first: whether the layer is empty.
        max_readable: number of tokens that the next token can read. Earlier tokens do not count towards the budget.
            None for no limit.
        memory: how the layer uses its memory; None if the settings have a budget in entries.

    Raises:
        ValueError: the protected entries do not fit into the budget of a row, or the text of a row is too short to
            repair its entries.

    """
    if not (is_first or settings.evict_always):
        return None
    num_seen = [max(0, num_input_tokens - row.num_padding) for row in rows]
    if max_readable is not None:
        num_seen = [min(seen, max_readable) for seen in num_seen]
    limit = math.inf if settings.max_entries is None else settings.max_entries
    budget = settings.budget if memory is None else memory.num_entries
    assert budget is not None
    allowed = [int(min(num_allowed(budget, seen), limit)) for seen in num_seen]
    interval = settings.interval if memory is None else memory.interval
    # With limited memory, few queries are remembered, so stateful weights must read them in time.
    always_due = memory is not None and settings.policy.weights.is_stateful
    if is_first or num_new > 1:
        is_due = [True] * len(rows)
    else:
        is_due = [
            row.num_kept + num_appended - row.num_masked - limit >= interval
            or (always_due and row.num_appended + num_appended >= interval)
            for row, limit in zip(rows, allowed, strict=True)
        ]
    windows = [
        _num_last_kept(settings, limit, seen) if due else 0
        for limit, seen, due in zip(allowed, num_seen, is_due, strict=True)
    ]
    if not any(is_due):
        return None
    # Rows that are not due keep all their entries.
    allowed = [limit if due else seen for limit, seen, due in zip(allowed, num_seen, is_due, strict=True)]
    storage = settings.storage if memory is None else replace(settings.storage, quantization=memory.quantization)
    plan = EvictionPlan(tuple(is_due), tuple(allowed), tuple(num_seen), tuple(windows), storage)
    if settings.repair:
        plan.check_repair()
    return plan


def _num_last_kept(settings: CacheSettings, limit: int, num_seen: int) -> int:
    """Return how many last tokens every head of a row keeps; raise an error if the protected entries do not fit."""
    _, window = settings.policy.protected_sizes(limit, num_seen, settings.protection)
    return num_seen if limit >= num_seen else window


def select_entries(
    plan: EvictionPlan,
    settings: CacheSettings,
    entries: Entries,
    stats: AttentionStats,
    backend: TorchBackend,
    global_budget: GlobalBudget | None,
) -> SelectedEntries:
    """Select which entries of a layer to keep, without changing the layer.

    Conditions that must hold, for example that scores are not NaN, are recorded in `stats` and checked later.

    Args:
        plan: which rows evict.
        settings: settings of the cache.
        entries: all entries of the layer.
        stats: statistics of the attention call over these entries.
        backend: computes scores and capacities.
        global_budget: shared by all layers; None if each layer has its own.

    """
    policy = settings.policy
    if not any(_rows_that_evict(plan, settings)):
        all_kept = torch.ones(stats.batch_size, stats.num_key_value_heads) if settings.measure_capacity else None
        return SelectedEntries(entries, capacity=all_kept)
    objective = policy.objective(stats, backend)
    budget = policy.layer_budget(objective, plan.allowed, settings.protection)
    columns, other_layers = dict(entries.columns), None
    if global_budget is None:
        kept = policy.select(objective, budget)
    else:
        request = policy.budget_request(objective, plan.allowed, settings.protection)
        priorities = global_budget.priorities(policy, objective, budget, request)
        columns["priority"] = update_priorities(priorities, entries, plan.is_due)
        context = stats.context
        other_layers = global_budget.select(context.layer, columns["priority"], plan.allowed, context.sharding)
        kept = other_layers.kept
    state = policy.weights.next_state(stats).keep_rows(stats.state, _rows_that_evict(plan, settings))
    if settings.evict_always and state.attention_received is not None:
        columns["attention_received"] = state.attention_received
    has_exact_counts = global_budget is None and policy.selection.keeps_exact_counts
    selected = replace(entries, columns=columns)
    if settings.rerotate:
        selected = rerotate(stats, selected, kept)
    return SelectedEntries(
        selected,
        kept,
        counts=budget.num_kept if has_exact_counts else None,
        capacity=capacity_share(stats, kept, backend) if settings.measure_capacity else None,
        state=WeightState(query_moments=state.query_moments),
        other_layers=other_layers,
    )


def repair_selection(selection: SelectedEntries, stats: AttentionStats, *, refit_values: bool) -> SelectedEntries:
    """Repair the selected entries; see `repair_entries`."""
    if selection.kept is None:
        return selection
    repair = repair_entries(stats, selection.kept, refit_values=refit_values)
    columns = {**selection.entries.columns, LOGIT_BIAS: repair.logit_bias}
    entries = replace(selection.entries, values=repair.values, columns=columns)
    return replace(selection, entries=entries, repair_errors=repair.errors)


def _rows_that_evict(plan: EvictionPlan, settings: CacheSettings) -> list[bool]:
    """Return which rows select entries.

    A row that may keep all its entries selects none, unless the policy has stateful weights or a budget that all layers
    share: these are updated even when nothing is evicted.
    """
    policy = settings.policy
    must_update = settings.evict_always and (policy.weights.is_stateful or policy.allocation.is_global)
    return [
        due and not policy.keep_all and (must_update or limit < seen)
        for due, limit, seen in zip(plan.is_due, plan.allowed, plan.num_seen, strict=True)
    ]


def copy_entries(
    plan: EvictionPlan,
    selection: SelectedEntries,
    state: LayerState,
    settings: CacheSettings,
    query_moments: Tensor | None,
) -> Storage | None:
    """Copy the selected entries to a new storage, without changing the layer.

    Args:
        plan: which rows evict, and how the kept entries are stored.
        selection: the selected entries.
        state: state of the layer.
        settings: settings of the cache.
        query_moments: second moments of the queries, if entries are quantized; see `QuantizedStorage.gather`.

    Returns:
        The new storage; None if `commit_eviction` can compact the entries in place.

    """
    config = plan.storage
    if selection.kept is None:
        return state.storage or config.store_all(selection.entries, query_moments, padded=any(state.num_padding))
    if isinstance(state.storage, QuantizedStorage):
        kept, columns = selection.kept, selection.entries.columns
        if state.has_holes:  # the selection refers to entries whose empty slots were moved to the front
            order = right_aligned_order(state.storage.positions)
            kept = order.gather(2, kept.clamp_min(0)).where(kept >= 0, -1)
            columns = {name: torch.empty_like(x).scatter_(2, order, x) for name, x in columns.items()}
        return state.storage.keep(kept, columns)
    changes_entries = settings.rerotate or settings.repair
    reused = None if config.per_head or changes_entries or state.has_holes else state.storage
    if reused is not None and reused.can_compact_in_place(selection.kept, selection.counts):
        return None
    return config.store_kept(selection.entries, selection.kept, selection.counts, query_moments)


def validate_eviction(stats: AttentionStats, entries: Entries, storage: Storage | None, layer_index: int) -> None:
    """Check the copied entries and every condition that was recorded while the entries were selected.

    Args:
        stats: statistics of the attention call, which hold the conditions.
        entries: all entries of the layer.
        storage: the copied entries; None if they are to be compacted in place.
        layer_index: index of the layer in the model, for the error.

    Raises:
        ValueError: a condition does not hold.
        KernelFallbackError: a kernel could not compute a result.

    """
    is_finite = all_finite((entries.keys, entries.values)) if storage is None else storage.is_finite
    stats.require(is_finite, _not_finite(layer_index))
    stats.raise_if_failed()


def check_finite(entries: Entries, layer_index: int) -> None:
    """Check that all entries of a layer are finite.

    Raises:
        ValueError: a key or value is NaN or infinite.

    """
    if not bool(all_finite((entries.keys, entries.values))):
        raise _not_finite(layer_index)


def _not_finite(layer_index: int) -> ValueError:
    return ValueError(
        f"keys and values of layer {layer_index} must be finite, got NaN or infinite values: nothing was cached"
    )


def commit_eviction(
    plan: EvictionPlan,
    selection: SelectedEntries,
    storage: Storage | None,
    state: LayerState,
    settings: CacheSettings,
) -> LayerState:
    """Return the state of the layer after an eviction: only the selected entries are stored.

    The former storage is dropped, which frees the memory of the evicted entries, or it is compacted in place.

    Args:
        plan: which rows evict.
        selection: the entries to keep.
        storage: result of `copy_entries`.
        state: state of the layer before the eviction.
        settings: settings of the cache.

    """
    if storage is None:
        storage = state.storage
        if storage is not None and selection.kept is not None:
            storage.compact_in_place(selection.entries, selection.kept)
    # Where masked tokens are moved to the front, the newest tokens of a row are those that are not masked.
    moves_masked = state.has_holes and selection.kept is not None
    rows = tuple(
        replace(
            row,
            num_kept=min(limit, row.num_kept + state.num_appended - row.num_masked),
            # Without holes, the last entries are those of the last tokens.
            window=0 if state.has_holes else window if due else row.window + state.num_appended,
            num_appended=0 if evicts else row.num_appended + state.num_appended - moves_masked * row.num_masked,
            num_masked=0,
        )
        for row, limit, window, due, evicts in zip(
            state.rows, plan.allowed, plan.windows, plan.is_due, _rows_that_evict(plan, settings), strict=True
        )
    )
    state = replace(
        state,
        storage=storage,
        rows=rows,
        num_appended=0,
        capacity=selection.capacity,
        repair_errors=_last_kept(selection.repair_errors, state.repair_errors),
    )
    if selection.kept is None:
        return state
    queries = state.queries.right_aligned() if state.has_holes else state.queries
    if settings.num_queries_needed is None:
        # The rows that have evicted no longer need older queries.
        queries = queries.newest(max(row.num_appended for row in rows))
    return replace(
        state,
        has_evicted=state.has_evicted or not plan.keeps_all,
        weight_state=selection.state or WeightState(),
        queries=queries,
        has_holes=False,
    )


def _last_kept(errors: Tensor | None, earlier: Tensor | None) -> Tensor | None:
    """Return the errors of the last repair that each head has kept, or of its last repair if it has kept none.

    A head that does not keep a repair still holds the values and weights of the earlier ones.

    Args:
        errors: errors before and after the repair, [batch, num_key_value_heads, 2]; None without repair.
        earlier: the same of earlier evictions.

    """
    if errors is None or earlier is None:
        return earlier if errors is None else errors
    was_kept, is_kept = (x[..., 1] < x[..., 0] for x in (earlier, errors))
    return torch.where((was_kept & ~is_kept)[..., None], earlier, errors)
