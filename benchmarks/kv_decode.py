"""Speed and memory of decoding over a compressed cache, stock transformers and kvpress 0.5.5.

Speed is measured in one process with one thread. After a prompt of 4,096 tokens, all caches decode one token in turn,
so that changes of the machine's speed affect all of them. Ratios are computed within each turn; the results are their
median and quartiles. Time is processor time, which depends less on other processes. The bound is stock transformers
with a prompt as short as the number of entries that the cache keeps.

Memory is measured in a new process for each setting: the peak between the prompt and the last new token, above the
memory with the model loaded.

`--only batch` times decoding steps of 16 rows with 256 tokens each over 8 KV heads, in a random model: the default
policy and `capkv` with half the budget, relative to the stock cache with half the tokens.

Run with `make bench-kv`. Options: --tokens 4096, --budgets .5 .25 .1, --steps 32, --json PATH,
--only speed|memory|batch.
"""

from __future__ import annotations

import argparse
import copy
import json
import pydoc_data.topics
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from machine import forget_peak, machine, status
from suffice.kv import DEFAULT_POLICY, CompressedCache, load_model
from suffice.kv.cache.prefill import prefill

try:
    import kvpress
except ImportError:
    sys.exit("kvpress is not installed. Run this with `make bench-kv`, which installs it in a separate environment")

POLICY = "snapkv"  # kvpress has it too; the time of decoding does not depend on which entries are kept
OURS = {"uniform": "equal", "ragged, pooled scores": "adakv", "ragged, head profile": "profile"}
PRESSES: dict[str, Callable[[float], Any]] = {
    "kvpress uniform": lambda ratio: kvpress.SnapKVPress(compression_ratio=ratio),
    "kvpress AdaKV": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=ratio)),
}
BOUND, STOCK = "stock, shorter prompt", "stock"
# Settings whose memory is measured; the other ragged allocation needs about the same.
MEASURED = (BOUND, "uniform", "ragged, head profile", *PRESSES)


def share_weights(model: Any) -> Any:
    """Return a copy of a model that shares its weights but has modules of its own."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def fill(model: Any, ids: Tensor, name: str, budget: float) -> tuple[Any, Cache]:
    """Read a prompt with the cache of a setting; return the model and the cache."""
    with torch.no_grad():
        if name in OURS:
            cache: Cache = CompressedCache(model, POLICY, budget, allocation=OURS[name], measure_capacity=False)
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return model, cache
        cache = DynamicCache(config=model.config)
        if name in PRESSES:
            with PRESSES[name](1 - budget)(model):
                model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return model, cache
        part = ids if name == STOCK else ids[:, : int(budget * ids.shape[1])]
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return model, cache


def step(model: Any, cache: Cache, token: Tensor, position: int) -> float:
    """Return the processor time of one decoding step in seconds."""
    start = time.process_time()
    with torch.no_grad():
        model(token, past_key_values=cache, position_ids=torch.tensor([[position]]), use_cache=True, logits_to_keep=1)
    return time.process_time() - start


def quartiles(values: list[float]) -> list[float]:
    """Return the median and the lower and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return [middle, low, high]


def speed(model: Any, ids: Tensor, budgets: list[float], steps: int) -> dict[str, Any]:
    """Decode with all caches in turn; return times and ratios to the bound."""
    caches: dict[tuple[str, float], tuple[Any, Cache]] = {(STOCK, 1.0): fill(share_weights(model), ids, STOCK, 1.0)}
    # Separate modules, because kvpress stores masks on them, and our cache selects its attention function.
    own = share_weights(model)
    ours = {
        (name, budget): CompressedCache(own, POLICY, budget, allocation=allocation, measure_capacity=False)
        for budget in budgets
        for name, allocation in OURS.items()
    }
    prefill(own, {"input_ids": ids}, list(ours.values()))
    for budget in budgets:
        caches[BOUND, budget] = fill(share_weights(model), ids, BOUND, budget)
        caches |= {key: (own, cache) for key, cache in ours.items() if key[1] == budget}
        caches |= {(name, budget): fill(share_weights(model), ids, name, budget) for name in PRESSES}
        print(f"all caches with a budget of {budget:.0%} have read the prompt", flush=True)
    seconds: dict[tuple[str, float], list[float]] = {key: [] for key in caches}
    warm_up = 4
    for number in range(steps + warm_up):
        order = list(caches)[number % len(caches) :] + list(caches)[: number % len(caches)]
        for key in order:
            step_seconds = step(*caches[key], ids[:, number : number + 1], ids.shape[1] + number)
            if number >= warm_up:
                seconds[key].append(step_seconds)
    rows = []
    for (name, budget), times in seconds.items():
        bound = seconds[(BOUND, budget) if budget < 1 else (STOCK, 1.0)]
        rows.append(
            {
                "setting": name,
                "budget": budget,
                "ms": 1000 * statistics.median(times),
                "tokens_per_second": 1 / statistics.median(times),
                "of_bound": quartiles([b / o for b, o in zip(bound, times, strict=True)]),
                "of_full": quartiles([f / o for f, o in zip(seconds[STOCK, 1.0], times, strict=True)]),
            }
        )
    attention = {
        f"{name} {budget}": attention_ratio(caches[name, budget], caches[BOUND, budget], steps)
        for budget in budgets
        for name in OURS
    }
    return {"decoding": rows, "attention_of_stock": attention}


def attention_ratio(own: tuple[Any, Cache], stock: tuple[Any, Cache], steps: int) -> list[float]:
    """Return the time in which our cache appends a token and attends in all layers, relative to the stock cache.

    It contains everything that a cache adds to a decoding step, but not the rest of the model.
    """

    def run_layers(model: Any, cache: Cache, implementation: str) -> float:
        attend = ALL_ATTENTION_FUNCTIONS[implementation]
        heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        query, new = torch.randn(1, heads, 1, 64), torch.randn(2, 1, kv_heads, 1, 64)
        start = time.process_time()
        with torch.no_grad():
            for index, layer in enumerate(model.model.layers):
                module = layer.self_attn
                keys, values = cache.update(new[0], new[1], index)
                attend(module, query, keys, values, None, dropout=0.0, scaling=module.scaling)
        return time.process_time() - start

    ratios = []
    for number in range(2 * steps):
        pair = [lambda: run_layers(*own, "suffice_sdpa"), lambda: run_layers(*stock, "sdpa")]
        first = number % 2
        times = {first: pair[first](), 1 - first: pair[1 - first]()}
        ratios.append(times[0] / times[1])
    return quartiles(ratios[4:])


def batch_speed(steps: int, rows: int = 16, tokens: int = 256) -> None:
    """Print the time of a decoding step of a batch, relative to the stock cache with half the tokens."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=1024,
    )
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(1024, (rows, tokens))
    caches: dict[str, tuple[Any, Cache]] = {BOUND: (share_weights(model), DynamicCache(config=config))}
    for policy in (DEFAULT_POLICY, "capkv"):
        caches[policy] = model, CompressedCache(model, policy, 0.5, measure_capacity=False)
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    with torch.no_grad():
        for name, (own, cache) in caches.items():
            own(ids[:, : tokens // 2] if name == BOUND else ids, past_key_values=cache, logits_to_keep=1)
    warm_up = 4
    for number in range(steps + warm_up):
        order = list(caches)[number % len(caches) :] + list(caches)[: number % len(caches)]
        for name in order:
            own, cache = caches[name]
            seconds[name].append(step(own, cache, ids[:, number, None], tokens + number))
    for name, times in seconds.items():
        ratios = [time / bound for time, bound in zip(times[warm_up:], seconds[BOUND][warm_up:], strict=True)]
        middle, low, high = quartiles(ratios)
        milliseconds = 1000 * statistics.median(times[warm_up:])
        print(f"{name:<24}{milliseconds:>8.1f} ms{middle:>8.2f} [{low:.2f}-{high:.2f}] of {BOUND}")


def memory_of(name: str, budget: float, tokens: int, steps: int) -> None:
    """Fill and use one cache in this process; print the peak memory above that of the loaded model, in bytes."""
    model, ids = inputs(tokens)
    fill(model, ids[:, :8], STOCK, 1.0)  # the weights are read from the file when they are first used
    before = status("VmRSS")
    forget_peak()
    model, cache = fill(model, ids, name, budget)
    for number in range(steps):
        step(model, cache, ids[:, number : number + 1], tokens + number)
    print(json.dumps({"peak": status("VmHWM") - before, "after": status("VmRSS") - before, "model": before}))


def memory(budgets: list[float], tokens: int) -> list[dict[str, Any]]:
    """Measure the peak memory of every setting, each in a process of its own."""
    rows = []
    for name, budget in [(STOCK, 1.0), *((name, budget) for budget in budgets for name in MEASURED)]:
        command = [sys.executable, __file__, "--memory-of", name, "--budgets", str(budget), "--tokens", str(tokens)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = {"setting": name, "budget": budget, **json.loads(done.stdout.splitlines()[-1])}
        rows.append(row)
        print(f"memory: {name}, {budget:.0%}: {row['peak'] / 1e6:.0f} MB at most", flush=True)
    return rows


def inputs(tokens: int) -> tuple[Any, Tensor]:
    """Return the default model in float32 and the token ids of an English text."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokenizer = load_model(dtype="float32")
    text = "\n\n".join(value for _, value in sorted(pydoc_data.topics.topics.items()))
    return model, tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :tokens]


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return the most important numbers of a result."""
    found: dict[str, Any] = {}
    shares = {(row["setting"], row["budget"]): row["of_bound"][0] for row in result.get("decoding", [])}
    if ("uniform", 0.25) in shares:
        ragged = [shares[name, 0.25] for name in OURS if name != "uniform"]
        attention = [own[0] for name, own in result["attention_of_stock"].items() if name.startswith("ragged")]
        found |= {
            "decode_of_bound_uniform_25": shares["uniform", 0.25],
            "decode_of_bound_ragged_25": min(ragged),
            "ragged_step_vs_uniform": max(attention),
            "kvpress_of_bound_uniform_25": shares["kvpress uniform", 0.25],
            "kvpress_of_bound_adakv_25": shares["kvpress AdaKV", 0.25],
        }
    peaks = {(row["setting"], row["budget"]): row["peak"] for row in result.get("memory", [])}
    if ("kvpress AdaKV", 0.25) in peaks:
        found |= {
            "peak_memory_ragged_25": peaks["ragged, head profile", 0.25],
            "kvpress_peak_memory_adakv_25": peaks["kvpress AdaKV", 0.25],
            "peak_memory_full": peaks[STOCK, 1.0],
        }
    return found


def table(result: dict[str, Any]) -> None:
    """Print a result as a table."""
    peaks = {(row["setting"], row["budget"]): row["peak"] / 1e6 for row in result.get("memory", [])}
    print(f"\n{'setting':<24}{'budget':>7}{'tokens/s':>10}{'of the bound':>22}{'peak MB':>9}   attention of stock's")
    for row in result.get("decoding", []):
        key = row["setting"], row["budget"]
        middle, low, high = row["of_bound"]
        peak = f"{peaks[key]:.0f}" if key in peaks else "-"
        ratio = result["attention_of_stock"].get(f"{key[0]} {key[1]}")
        own = "" if ratio is None else f"{ratio[0]:.2f} [{ratio[1]:.2f}-{ratio[2]:.2f}]"
        share = f"{middle:.2f} [{low:.2f}-{high:.2f}]"
        print(f"{key[0]:<24}{key[1]:>7.0%}{row['tokens_per_second']:>10.1f}{share:>22}{peak:>9}   {own}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--only", choices=["speed", "memory", "batch"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        memory_of(options.memory_of, options.budgets[0], options.tokens, steps=16)
        return
    if options.only == "batch":
        batch_speed(options.steps)
        return
    # With `--only`, the other part of an earlier result is kept.
    known = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    result = {**known, "tokens": options.tokens, "steps": options.steps}
    if options.only != "memory":
        result |= speed(*inputs(options.tokens), options.budgets, options.steps)
    if options.only != "speed":
        result["memory"] = memory(options.budgets, options.tokens)
    torch.set_num_threads(1)
    result |= {**summary(result), "machine": machine()}
    table(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(summary(result)))


if __name__ == "__main__":
    main()
