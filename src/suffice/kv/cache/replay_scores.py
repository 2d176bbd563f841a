"""Scores of the entries of a layer from the queries of a replay, in which the model repeats the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.kv.attention.call import AttentionCall
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.cache.replay_prompt import ReplayInput
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.directions import OutputValue
from suffice.kv.policy.layer_context import EntryPositions, LayerContext
from suffice.kv.policy.weights.replay import LARGEST, MEAN

NUM_SINKS = 4
"""Number of first tokens that the queries of a replay read besides the part that they repeat, as in KVzip."""
# Number of attention weights that are in memory at a time.
_MAX_WEIGHTS = 1 << 24


class PromptScores:
    """The scores of all entries of a prompt in one layer, to which the parts of a replay are added.

    Args:
        num_tokens: number of tokens of the prompt, including padding.

    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._scores: dict[str, Tensor] = {}

    def add(self, kind: str, scores: Tensor, slots: Tensor) -> None:
        """Write the scores of some entries.

        Args:
            kind: kind of the scores.
            scores: [batch, num_key_value_heads, entries].
            slots: indices of the entries in the prompt, long [batch, 1, entries]; `num_tokens` for other entries.

        """
        if kind not in self._scores:
            self._scores[kind] = scores.new_zeros(*scores.shape[:2], self.num_tokens + 1)
        self._scores[kind].scatter_(2, slots.expand_as(scores), scores)

    def by_kind(self) -> dict[str, Tensor]:
        """Return the scores by kind, each [batch, num_key_value_heads, num_tokens]."""
        return {kind: scores[..., :-1] for kind, scores in self._scores.items()}


@dataclass(frozen=True)
class PartScores:
    """Computes the scores of the part of a prompt that a pass repeats, in one layer.

    Args:
        stats: statistics of the attention of the pass over the first tokens of the prompt, the part, and the tokens of
            the pass. Other entries are left out, as in KVzip, which limits the memory.
        slots: indices of the entries in the prompt, long [batch, 1, entries]; the number of tokens of the prompt for
            entries that do not belong to the part.

    """

    stats: AttentionStats
    slots: Tensor

    @classmethod
    def from_layer(cls, layer: CompressedLayer, call: AttentionCall, part: ReplayInput, num_tokens: int) -> PartScores:
        """Select the entries of a layer that the scores depend on.

        Args:
            layer: a layer that holds all entries of the prompt and of the pass.
            call: the attention call of the pass.
            part: the tokens of the pass.
            num_tokens: number of tokens of the prompt.

        """
        assert layer.storage is not None
        entries = layer.storage.entries
        positions = entries.positions[:, :1]
        slot = torch.arange(positions.shape[2], device=positions.device)
        is_part = (slot >= part.start) & (slot < part.end)
        is_read = (slot >= num_tokens) | is_part | (positions < NUM_SINKS)
        positions = positions.masked_fill(~is_read, -1)
        index = (positions >= 0).any(0)[0].nonzero().squeeze(-1)
        selected = type(entries)(
            entries.keys.detach().index_select(2, index),
            entries.values.detach().index_select(2, index),
            positions.index_select(2, index),
        )
        queries, keys, values = layer.scored_tensors(call.query.detach(), selected)
        stats = AttentionStats(
            queries,
            keys,
            values,
            positions=EntryPositions(entries=selected.positions, queries=layer.new_positions),
            scaling=call.scaling,
            softcap=call.softcap,
            sink_logits=call.sink_logits,
            output_weight=layer.output_weight(),
            context=LayerContext(layer.order, layer.settings.num_layers),
        )
        slots = slot.masked_fill(~is_part, num_tokens).index_select(0, index)
        return cls(stats, slots.masked_fill(selected.positions < 0, num_tokens))

    def add_to(self, scores: PromptScores, kinds: Iterable[str], query_factors: Mapping[str, Tensor]) -> None:
        """Compute scores and add them to those of the whole prompt.

        Args:
            scores: scores of the whole prompt.
            kinds: the kinds to compute.
            query_factors: for kinds other than the largest and the mean attention, the factor of each query, float32
                [batch, queries].

        """
        stats = self.stats
        shape = (stats.batch_size, stats.num_key_value_heads)
        # The attention weights, which cost the most, are computed once for all kinds.
        totals = {
            kind: torch.zeros(
                *shape, 1 if kind == MEAN else stats.num_key_value_groups, stats.num_entries, device=stats.device
            )
            for kind in kinds
        }
        for block in self._query_blocks():
            weights = stats.attention_weights(block, stats.num_entries)
            for kind, total in totals.items():
                if kind == MEAN:
                    total += weights.sum(3).mean(2, keepdim=True)
                    continue
                factors = query_factors.get(kind)
                own = weights if factors is None else weights * factors[:, None, None, block, None]
                torch.maximum(total, own.amax(3), out=total)
        for kind, total in totals.items():
            if kind == MEAN:
                total = total / self._num_queries
            elif kind != LARGEST:
                total = total * stats.group_heads(OutputValue().norms_by_head(stats, 2))
            scores.add(kind, total.amax(2), self.slots)

    @property
    def _num_queries(self) -> Tensor | int:
        """Number of queries of each row that are not masked."""
        valid = self.stats.valid_queries
        return self.stats.num_queries if valid is None else valid.sum(-1).clamp_min(1)[:, None, None, None]

    def _query_blocks(self) -> list[slice]:
        stats = self.stats
        size = max(1, _MAX_WEIGHTS // (stats.batch_size * stats.queries.shape[1] * stats.num_entries))
        return [slice(start, min(start + size, stats.num_queries)) for start in range(0, stats.num_queries, size)]
