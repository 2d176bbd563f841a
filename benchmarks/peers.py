"""The presses of kvpress as selections of Suffice, so that all of them choose in one shared prefill.

A press with one pass is called right after the attention of each layer, as kvpress's own hook would call it, with the
tensors of the shared prefill: hidden states, keys, values and rotary embedding. The entries that it returns (or does
not mask) become a cache of Suffice, so that the same code measures all methods. A press that replays the context
chooses in passes of its own before the shared prefill.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from suffice.kv import Policy
from suffice.kv.budget.allocation import Equal
from suffice.kv.eval.fidelity import CacheConfig
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.estimators import Estimator, Objective
from suffice.kv.policy.selection import LayerBudget, Selection
from suffice.kv.policy.weights import Uniform

if importlib.util.find_spec("kvpress") is None:
    sys.exit(
        "kvpress is not installed. `make bench-evidence-peers` makes an environment with it in .venv-bench; or run "
        "pip install kvpress==0.5.5"
    )
logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzip warns about its passes at each call

import kvpress  # noqa: E402  (after the check that it is installed)

# Presses by name, as functions of the compression ratio, with kvpress's defaults; wrappers as in its own evaluation.
ONE_PASS: dict[str, Callable[[float], Any]] = {
    **{
        name: functools.partial(lambda kind, ratio: getattr(kvpress, kind)(compression_ratio=ratio), name)
        for name in (
            "CapPress",
            "CompactorPress",
            "CURPress",
            "ExpectedAttentionPress",
            "KeyDiffPress",
            "KnormPress",
            "LagKVPress",
            "LeverageScorePress",
            "NonCausalAttnPress",
            "ObservedAttentionPress",
            "PyramidKVPress",
            "SnapKVPress",
            "StreamingLLMPress",
            "TOVAPress",
        )
    },
    "AdaKVPress(SnapKVPress)": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
    "AdaKVPress(ExpectedAttentionPress)": lambda ratio: kvpress.AdaKVPress(
        kvpress.ExpectedAttentionPress(ratio, epsilon=1e-2)
    ),
    "AdaKVPress(CompactorPress)": lambda ratio: kvpress.AdaKVPress(kvpress.CompactorPress(ratio)),
    "AdaKVPress(CapPress)": lambda ratio: kvpress.AdaKVPress(kvpress.CapPress(ratio)),
    "CriticalKVPress(SnapKVPress)": lambda ratio: kvpress.CriticalKVPress(kvpress.SnapKVPress(ratio)),
    "CriticalAdaKVPress(SnapKVPress)": lambda ratio: kvpress.CriticalAdaKVPress(kvpress.SnapKVPress(ratio)),
    "BlockPress(KeyDiffPress)": lambda ratio: kvpress.BlockPress(kvpress.KeyDiffPress(ratio)),
    "ChunkKVPress(SnapKVPress)": lambda ratio: kvpress.ChunkKVPress(kvpress.SnapKVPress(ratio)),
    "EntropyGatedChunkKVPress(SnapKVPress)": lambda ratio: kvpress.EntropyGatedChunkKVPress(kvpress.SnapKVPress(ratio)),
}
SEVERAL_PASSES: dict[str, Callable[[], Any]] = {
    "KVzipPress": lambda: kvpress.KVzipPress(0.5),
    "KVzipPress+": lambda: kvpress.KVzipPress(0.5, kvzip_plus_normalization=True),
    "KVgradPress": lambda: kvpress.KVgradPress(0.5),
}
PRESSES = (*ONE_PASS, *SEVERAL_PASSES)
LEFT_OUT: dict[str, str] = {
    "RandomPress": "selects at random",
    "ChunkPress": "works on chunks of 1,024 tokens, so at these lengths it equals the press that it wraps",
    "ComposedPress": "only combines other presses",
    "PerLayerCompressionPress": "only configures another press",
    "KeyRerotationPress": "moves keys but selects none",
    "ThinKPress": "removes channels of keys, not entries",
    "MergingPress": "changes the values of the kept entries",
    "FinchPress": "needs a new token in the vocabulary and a question in the prompt",
    "SimLayerKVPress": "takes a threshold instead of a ratio; keeps 1,024 recent tokens",
    "DMSPress": "takes a threshold instead of a ratio",
    "QFilterPress": "needs filters of the model, which are downloaded",
    "ExpectedAttentionStatsPress": "needs statistics of the model, which are downloaded",
    "DuoAttentionPress": "needs patterns of the model, which are downloaded",
    "KVzapPress": "needs weights trained for the model, which are downloaded",
    "FastKVzipPress": "needs weights trained for the model, which are downloaded",
    "RestoreKVPress": "needs weights trained for the model, which are downloaded",
    "LUKVPress": "needs budgets of the model, which are downloaded",
    "KVComposePress": "needs eager attention over twice the context",
    "DecodingPress": "evicts while decoding",
    "CompressionRatioDecodingPress": "evicts while decoding",
    "PrefillDecodingPress": "evicts while decoding",
    "CAMPress": "evicts while decoding",
}


def check_presses(names: Sequence[str]) -> None:
    """Check the names of presses.

    Raises:
        ValueError: a name is unknown.

    """
    for name in names:
        if name not in PRESSES:
            reason = f", which is left out because it {LEFT_OUT[name]}" if name in LEFT_OUT else ""
            raise ValueError(f"press must be one of {', '.join(PRESSES)}, got {name!r}{reason}")


def unknown_presses() -> list[str]:
    """Return the presses of the installed kvpress that are neither measured nor left out."""
    known = {part for name in PRESSES for part in name.rstrip("+)").split("(")} | set(LEFT_OUT)
    exports = {name: getattr(kvpress, name) for name in kvpress.__all__}
    return [
        name
        for name, export in exports.items()
        if inspect.isclass(export) and issubclass(export, kvpress.BasePress) and name not in known
        if export not in (kvpress.BasePress, kvpress.ScorerPress)
    ]


@dataclass(frozen=True)
class Ragged(Equal):
    """An allocation under which the selection may keep a different number of entries in each head."""

    @property
    def per_head(self) -> bool:
        return True


@dataclass
class AttentionCall:
    """The attention call that is running: what presses use besides keys and values."""

    module: Any = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    entries: EntryIndex | None = None  # keys and values of the layer
    attention: Tensor | None = None

    @contextmanager
    def follow(self, model: Any) -> Generator[None]:
        """Record every attention call of a model inside this context."""

        def begin(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self.module, self.kwargs, self.entries, self.attention = module, kwargs, None, None

        hooks: list[Any] = []
        try:
            for layer in model.model.layers:
                layer.self_attn.rotary_emb = model.model.rotary_emb
                hooks.append(layer.self_attn.register_forward_pre_hook(begin, with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.module, self.kwargs, self.entries, self.attention = None, {}, None, None

    def index(self, keys: Tensor, values: Tensor) -> EntryIndex:
        """Return the index of this layer's keys and values."""
        if self.entries is None:
            self.entries = EntryIndex(keys, values)
        return self.entries

    def attention_weights(self, stats: AttentionStats) -> Tensor:
        """Return the causal attention weights [1, heads, tokens, tokens] that eager attention would have returned."""
        if self.attention is None:
            keys = stats.keys.repeat_interleave(stats.num_key_value_groups, 1)
            logits = stats.queries @ keys.mT * self.module.scaling
            logits += torch.full(logits.shape[-2:], float("-inf")).triu(1)
            self.attention = logits.softmax(-1)
        return self.attention


class EntryIndex:
    """Finds the positions of given keys and values among all entries of a layer, by exact comparison."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        self.factors = [torch.randint(1, 2**62, x.shape[-1:], generator=generator) * 2 + 1 for x in (keys, values)]
        self.hashes = [self._hash(x, factors) for x, factors in zip((keys, values), self.factors, strict=True)]
        self.sorted, self.order = self.hashes[0].sort(-1)

    def _hash(self, x: Tensor, factors: Tensor) -> Tensor:
        return (x.view(torch.int32).long() * factors).sum(-1)

    def find(self, keys: Tensor, values: Tensor) -> Tensor:
        """Return the positions of entries [1, heads, kept, dim], in ascending order.

        Raises:
            ValueError: an entry does not belong to the layer.

        """
        hashes = [self._hash(x, factors) for x, factors in zip((keys, values), self.factors, strict=True)]
        indices = torch.searchsorted(self.sorted, hashes[0]).clamp_max(self.sorted.shape[-1] - 1)
        found = self.order.gather(-1, indices)
        if not all(torch.equal(own.gather(-1, found), h) for own, h in zip(self.hashes, hashes, strict=True)):
            raise ValueError("a press must return keys and values of the prefill, got others")
        return found.sort(-1).values


@dataclass(frozen=True, eq=False)
class PressSelection(Selection):
    """Keeps what a press keeps.

    Args:
        press: a press of kvpress, for one compression ratio.
        call: the running attention call.
        seed: seed of the press's random choices, combined with the layer.

    """

    press: Any
    call: AttentionCall
    seed: int = 0

    def select(self, estimator: Estimator, objective: Objective, budget: LayerBudget) -> Tensor:
        """Return the positions that the press keeps, −1 where a head keeps fewer than another."""
        call, stats = self.call, objective.stats
        keys, values = stats.keys, stats.values
        needs_attention = isinstance(self.press, kvpress.ObservedAttentionPress)
        attention = call.attention_weights(stats) if needs_attention else None
        compress = with_seed(self.press.compress, self.seed)
        found = compress(call.module, call.kwargs["hidden_states"], keys, values, attention, call.kwargs)
        if (masked := take_mask(call.module)) is not None:
            return unmasked_positions(masked, keys.shape[1], keys.shape[2])
        return call.index(keys, values).find(*found)

    def __str__(self) -> str:
        return str(self.press)


@dataclass(frozen=True, eq=False)
class FixedSelection(Selection):
    """Keeps given positions.

    Args:
        kept: positions for each layer, long [1, kv_heads, width], −1 for none.

    """

    kept: Sequence[Tensor]

    def select(self, estimator: Estimator, objective: Objective, budget: LayerBudget) -> Tensor:
        """Return the positions of this layer."""
        return self.kept[objective.stats.context.layer]

    def __str__(self) -> str:
        return "fixed"


def with_seed(compress: Callable[..., Any], seed: int) -> Callable[..., Any]:
    """Return a press's `compress` with its own random numbers in each layer, independent of other random draws."""

    def seeded(module: Any, *arguments: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * seed + module.layer_idx)
            return compress(module, *arguments)

    return seeded


def take_mask(module: Any) -> tuple[Tensor, ...] | None:
    """Return the indices of the entries that a press masked in a layer, and remove the mask."""
    masked = getattr(module, "masked_key_indices", None)
    module.masked_key_indices = None
    return masked


def unmasked_positions(masked: tuple[Tensor, ...], heads: int, tokens: int) -> Tensor:
    """Return the positions that are not masked, long [1, heads, width], ascending, −1 for none."""
    kept = torch.ones(1, heads, tokens, dtype=torch.bool)
    kept[masked] = False
    width = int(kept.sum(-1).max())
    return torch.arange(tokens).where(kept, -1).sort(-1).values[..., -width:]


def press_configs(
    model: Any,
    names: Sequence[str],
    budgets: Sequence[float],
    call: AttentionCall,
    input_ids: Tensor,
    chat: bool,
    seed: int,
) -> list[CacheConfig]:
    """Return the cache configurations for `evaluate`; the budget varies fastest.

    Args:
        model: the model.
        names: names of presses.
        budgets: fractions to keep.
        call: follows the shared prefill.
        input_ids: the ids that will be prefilled, for presses that replay them.
        chat: whether they begin with the start of the chat template, which a replay leaves out.
        seed: seed of the presses' random choices.

    """
    configs: list[CacheConfig] = []
    for name in names:
        selections: list[Selection] = []
        if name in SEVERAL_PASSES:
            selections += [FixedSelection(kept) for kept in replay(model, name, budgets, input_ids, chat)]
        else:
            for budget in budgets:
                press = ONE_PASS[name](compression_ratio(budget))
                press.post_init_from_model(model)
                selections.append(PressSelection(press, call, seed))
        configs += [
            CacheConfig(Policy(weights=Uniform(), selection=selection, allocation=Ragged(), name=name), budget)
            for selection, budget in zip(selections, budgets, strict=True)
        ]
    return configs


def compression_ratio(budget: float) -> float:
    """Return the compression ratio of a budget. The small term keeps 900 · (1 − 0.9) from becoming 89."""
    return 1 - budget - 1e-9


def replay(model: Any, name: str, budgets: Sequence[float], input_ids: Tensor, chat: bool) -> list[list[Tensor]]:
    """Let a press replay a context once; return the positions that it keeps, by budget and layer."""
    press = SEVERAL_PASSES[name]()
    by_budget: list[list[Tensor]] = []
    heads, tokens = model.config.num_key_value_heads, input_ids.shape[1]
    compress_post = press.compress_post

    def compress_for_each_budget(network: Any) -> None:
        for budget in budgets:
            press.compression_ratio = compression_ratio(budget)
            compress_post(network)
            masks = [take_mask(layer.self_attn) for layer in network.model.layers]
            by_budget.append([unmasked_positions(mask, heads, tokens) for mask in masks if mask is not None])

    press.compress_post = compress_for_each_budget
    with torch.no_grad(), press(model):
        model.model(input_ids=input_ids, past_key_values=DynamicCache())
        if not chat:
            press.prefix_length = 0
    return by_budget


def run_with_kvpress(
    model: Any, name: str, budget: float, input_ids: Tensor, chat: bool, seed: int
) -> tuple[Any, list[Tensor]]:
    """Run a press as kvpress documents it.

    Entries that it masks stay masked, so read the cache before using the model for anything else.

    Returns:
        kvpress's cache, and the positions that each layer keeps.

    """
    cache, full_cache = DynamicCache(), DynamicCache()
    press = ONE_PASS[name](compression_ratio(budget)) if name in ONE_PASS else SEVERAL_PASSES[name]()
    if name in ONE_PASS:
        # An attribute of the instance, which works for wrappers and for dataclasses.
        press.compress = with_seed(press.compress, seed)
    else:
        press.compression_ratio = compression_ratio(budget)
    with torch.no_grad(), ExitStack() as stack:
        if isinstance(press, kvpress.ObservedAttentionPress):
            model.set_attn_implementation("eager")
            stack.callback(model.set_attn_implementation, "sdpa")
        model.model(input_ids=input_ids, past_key_values=full_cache)
        stack.enter_context(press(model))
        model.model(input_ids=input_ids, past_key_values=cache)
        if name in SEVERAL_PASSES and not chat:
            press.prefix_length = 0
    kept: list[Tensor] = []
    for index, layer in enumerate(model.model.layers):
        full, compressed = full_cache.layers[index], cache.layers[index]
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        if masked is not None:
            kept.append(unmasked_positions(masked, compressed.keys.shape[1], compressed.keys.shape[2]))
        else:
            kept.append(EntryIndex(full.keys, full.values).find(compressed.keys, compressed.values))
    return cache, kept
