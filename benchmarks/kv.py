"""What scoring and eviction cost, as a share of a prefill: ours and kvpress 0.5.5 on the same tensors.

One process, one prefill: in every layer, right after its attention, each policy of ours and each press of
kvpress scores and evicts the same keys, values and queries (kvpress re-projects its queries from the same
hidden states, as it always does). The prefill itself is timed alone. Medians over several repetitions.

Run with `make bench-kv`. Options: --tokens 2048 4096, --repeats 3, --budget 0.25, --json PATH.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from machine import machine
from suffice.kv import CompressedCache, get_policy, load_model
from suffice.kv.attention.hook import Call
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.policy.attention_stats import AttentionStats

try:
    import kvpress
except ImportError:
    sys.exit("kvpress is missing: run this with `make bench-kv`, which has an environment of its own")

# Their press for each of our policies, with the settings that ours takes from the papers.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "capkv": ("CapPress", {}),
    "capkv-profile": ("CapPress", {}),
    "capkv-spread": ("CapPress", {}),
    "capkv-window": ("CapPress", {}),
    "capkv-paper": ("CapPress", {}),
    "h2o": ("ObservedAttentionPress", {}),
    "tova": ("TOVAPress", {}),
    "snapkv": ("SnapKVPress", {}),
    "pyramidkv": ("PyramidKVPress", {}),
    "expected-attention": ("ExpectedAttentionPress", {}),
    "criticalkv": ("CriticalKVPress", {}),
    "knorm": ("KnormPress", {}),
    "keydiff": ("KeyDiffPress", {}),
    "key-leverage": ("LeverageScorePress", {"sketch_dimension": 64}),
    "streaming-llm": ("StreamingLLMPress", {}),
    "random": ("RandomPress", {}),
}
WHY_DIFFERENT = {
    "capkv": "other weights: attention, expected attention and salience in place of the mean query",
    "capkv-profile": "other weights: attention, expected attention and salience in place of the mean query",
    "capkv-spread": "other weights: attention, expected attention and salience in place of the mean query",
    "capkv-window": "other weights: attention in place of the mean query",
    "capkv-paper": "the press brings keys and query to length one, and averages the rotary embedding over the future",
    "h2o": "the press divides by the number of queries that saw a token, the paper does not",
    "key-leverage": "the press projects the keys at random before it takes their leverage",
    "random": "random",
    "streaming-llm": "the press scores 0 and 1 only: ties",
    "criticalkv": "the press multiplies average scores of a group, and adds 1e-4 to them",
    "pyramidkv": "the same scores as snapkv; the split over layers differs",
}


def press_of(name: str, budget: float) -> Any:
    kind, options = PEERS[name]
    if kind == "CriticalKVPress":
        return kvpress.CriticalKVPress(kvpress.SnapKVPress(compression_ratio=1 - budget))
    return getattr(kvpress, kind)(compression_ratio=1 - budget, **options)


class Probe:
    """Times every policy and press in each layer of one prefill, and keeps the scores of some layers."""

    def __init__(self, model: Any, names: list[str], budget: float, attentions: bool) -> None:
        self.model, self.names, self.budget, self.attentions = model, names, budget, attentions
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.correlations: dict[str, list[float]] = defaultdict(list)
        self.bytes: dict[str, list[int]] = {"ours": [], "kvpress": []}
        self.caches = {name: CompressedCache(model, name, budget, measure_capacity=False) for name in names}
        self.measuring = CompressedCache(model, budget=budget, measure_capacity=True)
        self.presses = {name: press_of(name, budget) for name in names if name in PEERS}
        self.carrier = CompressedCache(model, "full", 1.0, measure_capacity=False)
        self.call: Any = None
        self.returned: list[int] = []  # bytes that CapPress keeps of each layer

    def run(self, ids: Tensor) -> None:
        """One prefill with everything in it."""
        hooks = []
        for layer in self.carrier.compressed_layers:
            module = layer._module()
            module.rotary_emb = self.model.model.rotary_emb
            layer.after = self._record(layer, layer.after)
            hooks.append(module.register_forward_hook(self._measure, with_kwargs=True))
        with torch.no_grad():
            self.model(ids, past_key_values=self.carrier, use_cache=True, logits_to_keep=1)
        for hook in hooks:
            hook.remove()

    def _record(self, layer: CompressedLayer, after: Any) -> Any:
        def record(call: Call, attention: Any) -> None:
            self.call = call
            after(call, attention)

        return record

    def _measure(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        call, index = self.call, module.layer_idx
        for name in self.names:
            # Theirs and ours in turn, so that both meet the same machine.
            if name in self.presses:
                self._time(("kvpress", name), self._press, name, module, kwargs, output[1])
            layer = self.caches[name].layers[index]
            self._time(("ours", name), self._own, layer)
        self._time(("ours", "default with capacity"), self._own, self.measuring.layers[index])
        full = call.key.nbytes + call.value.nbytes
        stored = sum(part.storage.nbytes for part in self.measuring.compressed_layers if part.index < index)
        self.bytes["ours"].append(stored + full)
        if self.returned:
            self.bytes["kvpress"].append(sum(self.returned[:-1]) + full)
        if index % 6 == 3 and not self.attentions:
            self._correlate(index, module, kwargs)

    def _time(self, name: tuple[str, str], work: Any, *arguments: Any) -> None:
        start = time.perf_counter()
        work(*arguments)
        self.seconds[name] += time.perf_counter() - start

    def _own(self, layer: CompressedLayer) -> None:
        layer.update(self.call.key, self.call.value)
        layer.before(self.call)
        layer.after(self.call, None)

    def _press(self, name: str, module: Any, kwargs: Any, attentions: Any) -> None:
        if name == "h2o" and attentions is None:
            return
        call = self.call
        kept = self.presses[name].compress(module, kwargs["hidden_states"], call.key, call.value, attentions, kwargs)
        if name == "capkv":
            self.returned.append(sum(part.nbytes for part in kept))

    def _correlate(self, index: int, module: Any, kwargs: Any) -> None:
        call = self.call
        attention = None
        for name in self.presses:
            layer = self.caches[name].layers[index]
            stats = AttentionStats(
                call.query,
                call.key,
                call.value,
                scaling=call.scaling,
                layer=layer.layer,
                layers=layer.settings.layers,
                output=module.o_proj.weight,
                rotary=layer._rotary,
            )
            ours = get_policy(name).score(stats)
            if name == "h2o" and attention is None:
                logits = call.query @ call.key.repeat_interleave(stats.group, 1).mT * call.scaling
                logits += torch.full(logits.shape[-2:], float("-inf")).triu(1)
                attention = logits.softmax(-1)
            theirs = self.presses[name].score(
                module,
                kwargs["hidden_states"],
                call.key,
                call.value,
                attention if name == "h2o" else None,
                kwargs,
            )
            # Not compared: what either side keeps or drops whatever it holds.
            last = 64 if name in ("snapkv", "pyramidkv", "criticalkv") else 1
            rows = zip(ours[0, :, 4:-last], theirs[0, :, 4:-last], strict=True)
            for mine, other in rows:
                free = other < other.max() if name == "criticalkv" else torch.ones_like(other, dtype=torch.bool)
                if bool((other[free] != other[free][0]).any()) and bool((mine[free] != mine[free][0]).any()):
                    self.correlations[name].append(float(spearmanr(mine[free], other[free]).statistic))


def prefill_seconds(model: Any, ids: Tensor) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--policies", nargs="+", default=list(PEERS), choices=list(PEERS), metavar="NAME")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokenizer = load_model(dtype="float32", on_progress=lambda line: print(line, flush=True))
    text = "\n\n".join(value for _, value in sorted(pydoc_data.topics.topics.items()))
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids

    names = options.policies
    shares: dict[tuple[str, str, int], float] = {}
    spread: dict[tuple[str, str, int], tuple[float, float]] = {}
    correlations: dict[str, list[float]] = defaultdict(list)
    peak: dict[str, int] = {}
    for tokens in options.tokens:
        part = ids[:, :tokens]
        prefill_seconds(model, part)
        measured: dict[tuple[str, str], list[float]] = defaultdict(list)
        for repeat in range(options.repeats):
            # The plain prefill before and after, since the machine's speed drifts.
            before = prefill_seconds(model, part)
            probe = Probe(model, names, options.budget, attentions=False)
            probe.run(part)
            plain = (before + prefill_seconds(model, part)) / 2
            for name, seconds in probe.seconds.items():
                measured[name].append(100 * seconds / plain)
            for name, values in probe.correlations.items():
                correlations[name] += values
            peak = {side: max(values, default=0) for side, values in probe.bytes.items()}
            print(f"{tokens} tokens, repetition {repeat + 1}: prefill {plain:.2f} s", flush=True)
        if "h2o" in names:
            measured["kvpress", "h2o"] = [eager_cost(model, part, options.budget)]
        for (side, name), values in measured.items():
            shares[side, name, tokens] = statistics.median(values)
            spread[side, name, tokens] = (min(values), max(values))

    print(f"\nScoring and eviction, % of a prefill ({machine()}), budget {options.budget:.0%}: median [min-max]")
    header = "".join(f"{f'ours {t}':>26}{f'kvpress {t}':>26}" for t in options.tokens)
    print(f"{'policy':<20}{header}   Spearman with kvpress")
    for name in [*names, "default with capacity"]:
        cells = ""
        for tokens in options.tokens:
            for side in ("ours", "kvpress"):
                value = shares.get((side, name, tokens))
                low, high = spread.get((side, name, tokens), (0, 0))
                cells += f"{'-' if value is None else f'{value:.2f} [{low:.2f}-{high:.2f}]':>26}"
        rank = correlations.get(name)
        agreement = "-" if not rank else f"{statistics.median(rank):.4f}"
        why = WHY_DIFFERENT.get(name, "") if rank and statistics.median(rank) < 0.99 else ""
        print(f"{name:<20}{cells}   {agreement}  {why}")
    print("kvpress has no VATP. Its h2o needs eager attention: its cost is that of eager over sdpa, plus scoring.")
    longest = max(options.tokens)
    result = {
        "capkv_percent_4k": shares["ours", "capkv", longest],
        **{
            f"{name.replace('-', '_')}_percent_4k": shares["ours", name, longest]
            for name in ("capkv-profile", "capkv-window", "capkv-paper")
            if name in names
        },
        "kvpress_cap_percent_4k": shares["kvpress", "capkv", longest],
        "peak_cache_bytes_25": peak["ours"],
        "kvpress_peak_cache_bytes_25": peak["kvpress"],
        "tokens": longest,
        "budget": options.budget,
        "repeats": options.repeats,
        "machine": machine(),
        "percent": {f"{side} {name} {tokens}": value for (side, name, tokens), value in shares.items()},
        "spearman": {name: statistics.median(values) for name, values in correlations.items()},
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def eager_cost(model: Any, ids: Tensor, budget: float) -> float:
    """Percent of a plain prefill that kvpress's ObservedAttentionPress adds: eager attention, then scoring."""
    plain = prefill_seconds(model, ids)
    model.set_attn_implementation("eager")
    press = kvpress.ObservedAttentionPress(compression_ratio=1 - budget)
    start = time.perf_counter()
    with torch.no_grad(), press(model):
        model(ids, use_cache=True, logits_to_keep=1, output_attentions=False)
    total = time.perf_counter() - start
    model.set_attn_implementation("sdpa")
    return 100 * (total - plain) / plain


if __name__ == "__main__":
    main()
