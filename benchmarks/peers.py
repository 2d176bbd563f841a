"""kvpress's presses as selections of ours: each chooses in the one prefill that all caches of a sample share.

A press of one pass is called right after each layer's attention, as its own hook would call it, with the tensors that
the shared prefill has there: hidden states, keys, values, rotary embedding. What it keeps is read off what it returns
(or masks) and becomes an ordinary cache of ours, so that every number comes from the same code. A press that replays
the context chooses in passes of its own before.
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
from suffice.kv.eval.fidelity import Cell
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.selection import Budget, Selection
from suffice.kv.policy.weights import Uniform

if importlib.util.find_spec("kvpress") is None:
    sys.exit(
        "kvpress is not installed here. `make bench-evidence-peers` makes an environment that has it, in .venv-bench; "
        "or: pip install kvpress==0.5.5"
    )
logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzip warns of its passes, each time

import kvpress  # noqa: E402  (said above what to do without it)

# Name: the press for a compression ratio, with kvpress's own defaults. Wrappers as kvpress's own evaluation has them.
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
MORE_PASSES: dict[str, Callable[[], Any]] = {
    "KVzipPress": lambda: kvpress.KVzipPress(0.5),
    "KVzipPress+": lambda: kvpress.KVzipPress(0.5, kvzip_plus_normalization=True),
    "KVgradPress": lambda: kvpress.KVgradPress(0.5),
}
PRESSES = (*ONE_PASS, *MORE_PASSES)
WITHOUT: dict[str, str] = {
    "RandomPress": "random",
    "ChunkPress": "chunks of 1,024 tokens: at these lengths the press inside it",
    "ComposedPress": "no rule of its own",
    "PerLayerCompressionPress": "no rule of its own",
    "KeyRerotationPress": "moves keys, chooses nothing",
    "ThinKPress": "drops channels of keys, no entries",
    "MergingPress": "changes the values of what it keeps",
    "FinchPress": "needs a new token in the vocabulary and a question in the prompt",
    "SimLayerKVPress": "takes a threshold, no ratio; keeps 1,024 recent tokens",
    "DMSPress": "takes a threshold, no ratio",
    "QFilterPress": "needs filters made for a model, downloaded",
    "ExpectedAttentionStatsPress": "needs statistics made for a model, downloaded",
    "DuoAttentionPress": "needs patterns made for a model, downloaded",
    "KVzapPress": "needs weights trained for a model, downloaded",
    "FastKVzipPress": "needs weights trained for a model, downloaded",
    "RestoreKVPress": "needs weights trained for a model, downloaded",
    "LUKVPress": "needs budgets made for a model, downloaded",
    "KVComposePress": "needs eager attention over twice the context",
    "DecodingPress": "evicts while decoding",
    "CompressionRatioDecodingPress": "evicts while decoding",
    "PrefillDecodingPress": "evicts while decoding",
    "CAMPress": "evicts while decoding",
}


def check_presses(names: Sequence[str]) -> None:
    """Refuse a name that is not known.

    Raises:
        ValueError: which, and what is accepted.

    """
    for name in names:
        if name not in PRESSES:
            why = f", which is left out: {WITHOUT[name]}" if name in WITHOUT else ""
            raise ValueError(f"press is {name!r}{why}; accepted: {', '.join(PRESSES)}")


def unknown_presses() -> list[str]:
    """Return the presses of the installed kvpress that neither are measured nor have a reason why not."""
    known = {part for name in PRESSES for part in name.rstrip("+)").split("(")} | set(WITHOUT)
    kinds = {name: getattr(kvpress, name) for name in kvpress.__all__}
    return [
        name
        for name, kind in kinds.items()
        if inspect.isclass(kind) and issubclass(kind, kvpress.BasePress) and name not in known
        if kind not in (kvpress.BasePress, kvpress.ScorerPress)
    ]


@dataclass(frozen=True)
class Ragged(Equal):
    """Leaves the numbers to the selection: heads may keep different ones."""

    @property
    def ragged(self) -> bool:
        return True


@dataclass
class Prefill:
    """What presses look at beside keys and values: the attention call under way, as it was called."""

    module: Any = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    whole: Places | None = None  # keys and values of the layer, and what finds their places
    attention: Tensor | None = None

    @contextmanager
    def watch(self, model: Any) -> Generator[None]:
        """Follow a prefill of a model."""

        def begin(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self.module, self.kwargs, self.whole, self.attention = module, kwargs, None, None

        hooks: list[Any] = []
        try:
            for layer in model.model.layers:
                layer.self_attn.rotary_emb = model.model.rotary_emb
                hooks.append(layer.self_attn.register_forward_pre_hook(begin, with_kwargs=True))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.module, self.kwargs, self.whole, self.attention = None, {}, None, None

    def places(self, keys: Tensor, values: Tensor) -> Places:
        """Return what finds the places of this layer's keys and values."""
        if self.whole is None:
            self.whole = Places(keys, values)
        return self.whole

    def attentions(self, stats: AttentionStats) -> Tensor:
        """Return causal attention [1, heads, tokens, tokens], which eager attention would have returned."""
        if self.attention is None:
            keys = stats.keys.repeat_interleave(stats.queries.shape[1] // stats.kv_heads, 1)
            logits = stats.queries @ keys.mT * self.module.scaling
            logits += torch.full(logits.shape[-2:], float("-inf")).triu(1)
            self.attention = logits.softmax(-1)
        return self.attention


class Places:
    """Finds where given keys and values stand among all of a layer's, by bit."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        self.factors = [torch.randint(1, 2**62, x.shape[-1:], generator=generator) * 2 + 1 for x in (keys, values)]
        self.whole = [self._sums(x, f) for x, f in zip((keys, values), self.factors, strict=True)]
        self.sorted, self.order = self.whole[0].sort(-1)

    def _sums(self, x: Tensor, factors: Tensor) -> Tensor:
        return (x.view(torch.int32).long() * factors).sum(-1)

    def find(self, keys: Tensor, values: Tensor) -> Tensor:
        """Return the places of entries [1, heads, kept, dim], ascending.

        Raises:
            ValueError: an entry is not one of the layer's.

        """
        own, beside = (self._sums(x, f) for x, f in zip((keys, values), self.factors, strict=True))
        at = torch.searchsorted(self.sorted, own).clamp_max(self.sorted.shape[-1] - 1)
        found = self.order.gather(-1, at)
        if not all(torch.equal(w.gather(-1, found), o) for w, o in zip(self.whole, (own, beside), strict=True)):
            raise ValueError("a press returned keys or values that the prefill did not have")
        return found.sort(-1).values


@dataclass(frozen=True, eq=False)
class ByPress(Selection):
    """Keeps what a press keeps.

    Args:
        press: of kvpress, for one compression ratio.
        prefill: the one under way.
        seed: of what the press draws at random; layer and sample.

    """

    press: Any
    prefill: Prefill
    seed: int = 0

    def choose(self, policy: Policy, stats: AttentionStats, budget: Budget) -> Tensor:
        """Return what the press keeps, −1 where a head keeps fewer than another."""
        now, keys, values = self.prefill, stats.keys, stats.values
        observed = isinstance(self.press, kvpress.ObservedAttentionPress)
        attention = now.attentions(stats) if observed else None
        compress = seeded(self.press.compress, self.seed)
        found = compress(now.module, now.kwargs["hidden_states"], keys, values, attention, now.kwargs)
        if (masked := take_mask(now.module)) is not None:
            return unmasked(masked, stats.kv_heads, stats.tokens)
        return now.places(keys, values).find(*found)

    def __str__(self) -> str:
        return str(self.press)


@dataclass(frozen=True, eq=False)
class Given(Selection):
    """Keeps what was chosen before, given for each layer: long [1, kv_heads, width], −1 for none."""

    kept: Sequence[Tensor]

    def choose(self, policy: Policy, stats: AttentionStats, budget: Budget) -> Tensor:
        """Return this layer's."""
        return self.kept[stats.layer]

    def __str__(self) -> str:
        return "given"


def seeded(compress: Callable[..., Any], seed: int) -> Callable[..., Any]:
    """Return a press's function with random numbers of its own in each layer, whatever else draws some."""

    def drawn(module: Any, *arguments: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * seed + module.layer_idx)
            return compress(module, *arguments)

    return drawn


def take_mask(module: Any) -> tuple[Tensor, ...] | None:
    """Return which entries a press has masked in a layer, and unmask them."""
    masked = getattr(module, "masked_key_indices", None)
    module.masked_key_indices = None
    return masked


def unmasked(masked: tuple[Tensor, ...], heads: int, tokens: int) -> Tensor:
    """Return what is left, long [1, heads, width], ascending, −1 for none."""
    left = torch.ones(1, heads, tokens, dtype=torch.bool)
    left[masked] = False
    width = int(left.sum(-1).max())
    return torch.arange(tokens).where(left, -1).sort(-1).values[..., -width:]


def cells(
    model: Any, names: Sequence[str], budgets: Sequence[float], prefill: Prefill, ids: Tensor, chat: bool, seed: int
) -> list[Cell]:
    """Return what `evaluate` measures, budgets fastest.

    Args:
        model: the model.
        names: of presses.
        budgets: shares to keep.
        prefill: the shared one, to come.
        ids: what will be prefilled, for presses that replay it.
        chat: whether it begins with the chat template's opening, which a replay leaves out.
        seed: of what presses draw at random.

    """
    found: list[Cell] = []
    for name in names:
        if name in MORE_PASSES:
            chosen: list[Selection] = [Given(kept) for kept in replayed(model, name, budgets, ids, chat)]
        else:
            chosen = [ByPress(ONE_PASS[name](ratio(budget)), prefill, seed) for budget in budgets]
            for one in chosen:
                one.press.post_init_from_model(model)  # pyright: ignore[reportAttributeAccessIssue]
        found += [
            Cell(Policy(weights=Uniform(), selection=one, allocation=Ragged(), name=name), budget)
            for one, budget in zip(chosen, budgets, strict=True)
        ]
    return found


def ratio(budget: float) -> float:
    """Return the compression ratio of a budget; the small term keeps 900 * (1 - 0.9) from becoming 89."""
    return 1 - budget - 1e-9


def replayed(model: Any, name: str, budgets: Sequence[float], ids: Tensor, chat: bool) -> list[list[Tensor]]:
    """Let a press replay a context once, and return what it keeps of each layer for each budget."""
    press = MORE_PASSES[name]()
    found: list[list[Tensor]] = []
    heads, tokens = model.config.num_key_value_heads, ids.shape[1]
    evict = press.compress_post

    def for_each(network: Any) -> None:
        for budget in budgets:
            press.compression_ratio = ratio(budget)
            evict(network)
            masks = [take_mask(layer.self_attn) for layer in network.model.layers]
            found.append([unmasked(mask, heads, tokens) for mask in masks if mask is not None])

    press.compress_post = for_each
    with torch.no_grad(), press(model):
        model.model(input_ids=ids, past_key_values=DynamicCache())
        if not chat:
            press.prefix_length = 0
    return found


def official(model: Any, name: str, budget: float, ids: Tensor, chat: bool, seed: int) -> tuple[Any, list[Tensor]]:
    """Run a press as kvpress's documentation does; return its cache, and what each layer keeps.

    What it masks stays masked: read from the cache before the model is used for anything else.
    """
    cache, whole = DynamicCache(), DynamicCache()
    press = ONE_PASS[name](ratio(budget)) if name in ONE_PASS else MORE_PASSES[name]()
    if name in ONE_PASS:
        # Wrappers and dataclasses alike: an attribute of the instance.
        press.compress = seeded(press.compress, seed)
    else:
        press.compression_ratio = ratio(budget)
    with torch.no_grad(), ExitStack() as stack:
        if isinstance(press, kvpress.ObservedAttentionPress):
            model.set_attn_implementation("eager")
            stack.callback(model.set_attn_implementation, "sdpa")
        model.model(input_ids=ids, past_key_values=whole)
        stack.enter_context(press(model))
        model.model(input_ids=ids, past_key_values=cache)
        if name in MORE_PASSES and not chat:
            press.prefix_length = 0
    kept: list[Tensor] = []
    for index, layer in enumerate(model.model.layers):
        all_of, own = whole.layers[index], cache.layers[index]
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        if masked is not None:
            kept.append(unmasked(masked, own.keys.shape[1], own.keys.shape[2]))
        else:
            kept.append(Places(all_of.keys, all_of.values).find(own.keys, own.values))
    return cache, kept
