"""Cost of scoring and eviction as a share of a prefill: our policies and kvpress 0.5.5 on the same tensors.

Everything happens in one prefill of one process. In every layer, right after its attention, each of our policies and
each press of kvpress scores and evicts the same keys and values; kvpress projects its queries again from the same
hidden states, as it always does. The prefill is timed without them. The times are CPU times of one thread. The results
are medians over several repetitions.

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
from suffice.kv.attention.call import AttentionCall
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.layer_context import LayerContext

try:
    import kvpress
except ImportError:
    sys.exit("kvpress is not installed. Run this with `make bench-kv`, which installs it in a separate environment")

# The press that corresponds to each of our policies, with the settings of the papers.
PRESSES: dict[str, tuple[str, dict[str, Any]]] = {
    "capkv": ("CapPress", {}),
    "capkv-profile": ("CapPress", {}),
    "capkv-salience": ("CapPress", {}),
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
    "capkv": "our weights are attention, expected attention and salience instead of the mean query",
    "capkv-profile": "our weights are attention, expected attention and salience instead of the mean query",
    "capkv-salience": "as capkv-profile, times another salience",
    "capkv-spread": "our weights are attention, expected attention and salience instead of the mean query",
    "capkv-window": "our weights are attention instead of the mean query",
    "capkv-paper": "the press normalizes keys and query, and averages the rotary embedding over future positions",
    "h2o": "the press divides by the number of queries that could read a token, the paper does not",
    "key-leverage": "the press projects the keys randomly before it computes their leverage",
    "random": "random",
    "streaming-llm": "the press scores only 0 and 1, so most scores tie",
    "criticalkv": "the press multiplies the average scores of a group and adds 1e-4 to them",
    "pyramidkv": "same scores as snapkv; the split over layers differs",
}


def make_press(name: str, budget: float) -> Any:
    class_name, options = PRESSES[name]
    if class_name == "CriticalKVPress":
        return kvpress.CriticalKVPress(kvpress.SnapKVPress(compression_ratio=1 - budget))
    return getattr(kvpress, class_name)(compression_ratio=1 - budget, **options)


class Probe:
    """Times every policy and press in each layer of one prefill, and correlates their scores in some layers.

    Args:
        model: a transformers model.
        names: of our policies.
        budget: fraction of the tokens to keep.

    """

    def __init__(self, model: Any, names: list[str], budget: float) -> None:
        self.model, self.names = model, names
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.correlations: dict[str, list[float]] = defaultdict(list)
        self.bytes: dict[str, list[int]] = {"ours": [], "kvpress": []}
        self.caches = {name: CompressedCache(model, name, budget, measure_capacity=False) for name in names}
        self.measuring = CompressedCache(model, budget=budget, measure_capacity=True)
        self.repairing = CompressedCache(model, budget=budget, measure_capacity=False, repair=True)
        self.presses = {name: make_press(name, budget) for name in names}
        self.carrier = CompressedCache(model, "full", 1.0, measure_capacity=False)
        self.call: Any = None
        self.bytes_of_cap_press: list[int] = []  # that it keeps of each layer

    def run(self, ids: Tensor) -> None:
        """Run one prefill in which everything is measured."""
        hooks = []
        for layer in self.carrier.compressed_layers:
            module = layer.module
            module.rotary_emb = self.model.model.rotary_emb
            layer.post_attention = self._recording(layer.post_attention)
            hooks.append(module.register_forward_hook(self._measure, with_kwargs=True))
        with torch.no_grad():
            self.model(ids, past_key_values=self.carrier, use_cache=True, logits_to_keep=1)
        for hook in hooks:
            hook.remove()

    def _recording(self, post_attention: Any) -> Any:
        def record(call: AttentionCall, attention: Any) -> None:
            self.call = call
            post_attention(call, attention)

        return record

    def _measure(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        call, index = self.call, module.layer_idx
        for name in self.names:
            # In turn, so that changes of the machine's speed affect both.
            self._time(("kvpress", name), self._run_press, name, module, kwargs, output[1])
            self._time(("ours", name), self._run_layer, self.caches[name].layers[index])
        self._time(("ours", "default with capacity"), self._run_layer, self.measuring.layers[index])
        self._time(("ours", "default with repair"), self._run_layer, self.repairing.layers[index])
        full = call.key.nbytes + call.value.nbytes
        stored = sum(part.storage.nbytes for part in self.measuring.compressed_layers if part.index < index)
        self.bytes["ours"].append(stored + full)
        if self.bytes_of_cap_press:
            self.bytes["kvpress"].append(sum(self.bytes_of_cap_press[:-1]) + full)
        if index % 6 == 3:
            self._correlate(index, module, kwargs)

    def _time(self, name: tuple[str, str], function: Any, *arguments: Any) -> None:
        start = time.process_time()
        function(*arguments)
        self.seconds[name] += time.process_time() - start

    def _run_layer(self, layer: CompressedLayer) -> None:
        layer.update(self.call.key, self.call.value)
        layer.pre_attention(self.call)
        layer.post_attention(self.call, None)

    def _run_press(self, name: str, module: Any, kwargs: Any, attentions: Any) -> None:
        if name == "h2o" and attentions is None:
            return
        call = self.call
        kept = self.presses[name].compress(module, kwargs["hidden_states"], call.key, call.value, attentions, kwargs)
        if name == "capkv":
            self.bytes_of_cap_press.append(sum(part.nbytes for part in kept))

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
                output_weight=module.o_proj.weight,
                rotary=layer.rotary,
                context=LayerContext(layer.order, layer.settings.num_layers),
            )
            ours = get_policy(name).score(stats)
            if name == "h2o" and attention is None:
                logits = call.query @ call.key.repeat_interleave(stats.num_key_value_groups, 1).mT * call.scaling
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
            # Entries that either side always keeps or drops are not compared.
            last = 64 if name in ("snapkv", "pyramidkv", "criticalkv") else 1
            rows = zip(ours[0, :, 4:-last], theirs[0, :, 4:-last], strict=True)
            for own, other in rows:
                compared = other < other.max() if name == "criticalkv" else torch.ones_like(other, dtype=torch.bool)
                own, other = own[compared], other[compared]
                if bool((other != other[0]).any()) and bool((own != own[0]).any()):
                    self.correlations[name].append(float(spearmanr(own, other).statistic))


def prefill_seconds(model: Any, ids: Tensor) -> float:
    start = time.process_time()
    with torch.no_grad():
        model(ids, use_cache=True, logits_to_keep=1)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--policies", nargs="+", default=list(PRESSES), choices=list(PRESSES), metavar="NAME")
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
            # The plain prefill is timed before and after, because the speed of the machine drifts.
            before = prefill_seconds(model, part)
            probe = Probe(model, names, options.budget)
            probe.run(part)
            plain = (before + prefill_seconds(model, part)) / 2
            for name, seconds in probe.seconds.items():
                measured[name].append(100 * seconds / plain)
            for name, values in probe.correlations.items():
                correlations[name] += values
            peak = {side: max(values, default=0) for side, values in probe.bytes.items()}
            print(f"{tokens} tokens, repetition {repeat + 1}: prefill {plain:.2f} s", flush=True)
        if "h2o" in names:
            measured["kvpress", "h2o"] = [percent_of_observed_attention(model, part, options.budget)]
        for (side, name), values in measured.items():
            shares[side, name, tokens] = statistics.median(values)
            spread[side, name, tokens] = (min(values), max(values))

    print(f"\nScoring and eviction, % of a prefill ({machine()}), budget {options.budget:.0%}: median [min-max]")
    header = "".join(f"{f'ours {t}':>26}{f'kvpress {t}':>26}" for t in options.tokens)
    print(f"{'policy':<20}{header}   Spearman with kvpress")
    for name in [*names, "default with capacity", "default with repair"]:
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
    print("kvpress has no VATP. Its h2o needs eager attention, whose extra time over sdpa is part of its cost.")
    longest = max(options.tokens)
    result = {
        "capkv_percent_4k": shares.get(("ours", "capkv", longest)),
        **{
            f"{name.replace('-', '_')}_percent_4k": shares["ours", name, longest]
            for name in ("capkv-profile", "capkv-salience", "capkv-window", "capkv-paper")
            if name in names
        },
        "kvpress_cap_percent_4k": shares.get(("kvpress", "capkv", longest)),
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


def percent_of_observed_attention(model: Any, ids: Tensor, budget: float) -> float:
    """Return what ObservedAttentionPress adds to a prefill, eager attention included, in percent of the prefill."""
    plain = prefill_seconds(model, ids)
    model.set_attn_implementation("eager")
    press = kvpress.ObservedAttentionPress(compression_ratio=1 - budget)
    start = time.process_time()
    with torch.no_grad(), press(model):
        model(ids, use_cache=True, logits_to_keep=1, output_attentions=False)
    total = time.process_time() - start
    model.set_attn_implementation("sdpa")
    return 100 * (total - plain) / plain


if __name__ == "__main__":
    main()
