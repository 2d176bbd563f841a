"""Decoding over a compressed cache: tokens a second and process memory, beside stock transformers and kvpress 0.5.5.

Speed: one process, one thread. After a prompt of 4,096 tokens every cache decodes one token in turn, so that all meet
the same machine; a ratio is taken within each turn, and the median over turns is told with its quartiles. Time is the
process's own processor time, which other processes of a shared machine disturb less. The bound is stock transformers
on a prompt as short as what the cache kept.

Memory: a fresh process for each setting; the most that it held from the prompt to the last new token, above what it
held with the model loaded.

Run with `make bench-kv`. Options: --tokens 4096, --budgets .5 .25 .1, --steps 32, --json PATH, --only speed|memory.
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
from transformers import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from machine import forget_peak, machine, status
from suffice.kv import CompressedCache, load_model
from suffice.kv.cache.shared_prefill import prefill

try:
    import kvpress
except ImportError:
    sys.exit("kvpress is missing: run this with `make bench-kv`, which has an environment of its own")

POLICY = "snapkv"  # which entries are kept does not change how long reading them takes; kvpress has the same one
OURS = {"uniform": "equal", "ragged, pooled scores": "adakv", "ragged, head profile": "profile"}
PRESSES: dict[str, Callable[[float], Any]] = {
    "kvpress uniform": lambda ratio: kvpress.SnapKVPress(compression_ratio=ratio),
    "kvpress AdaKV": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=ratio)),
}
BOUND, STOCK = "stock, shorter prompt", "stock"
MEASURED = (BOUND, "uniform", "ragged, head profile", *PRESSES)  # for memory: one ragged form, the other differs little


def twin(model: Any) -> Any:
    """Return another model of the same weights: what is set on its modules does not show in the first."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def fill(model: Any, ids: Tensor, name: str, budget: float) -> tuple[Any, Cache]:
    """Read a prompt under a setting; the model to go on with, and the cache."""
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
    """Return the processor seconds of one decoding step."""
    start = time.process_time()
    with torch.no_grad():
        model(token, past_key_values=cache, position_ids=torch.tensor([[position]]), use_cache=True, logits_to_keep=1)
    return time.process_time() - start


def quartiles(values: list[float]) -> list[float]:
    """Median, lower and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return [middle, low, high]


def speed(model: Any, ids: Tensor, budgets: list[float], steps: int) -> dict[str, Any]:
    """Decode in turn over every cache; milliseconds and shares of the bound."""
    caches: dict[tuple[str, float], tuple[Any, Cache]] = {(STOCK, 1.0): fill(twin(model), ids, STOCK, 1.0)}
    # Models of their own: kvpress keeps what it masks on the modules, and ours selects its attention there.
    own = twin(model)
    ours = {
        (name, budget): CompressedCache(own, POLICY, budget, allocation=allocation, measure_capacity=False)
        for budget in budgets
        for name, allocation in OURS.items()
    }
    prefill(own, {"input_ids": ids}, list(ours.values()))
    for budget in budgets:
        caches[BOUND, budget] = fill(twin(model), ids, BOUND, budget)
        caches |= {key: (own, cache) for key, cache in ours.items() if key[1] == budget}
        caches |= {(name, budget): fill(twin(model), ids, name, budget) for name in PRESSES}
        print(f"prompt read by all caches of {budget:.0%}", flush=True)
    seconds: dict[tuple[str, float], list[float]] = {key: [] for key in caches}
    warm = 4
    for number in range(steps + warm):
        order = list(caches)[number % len(caches) :] + list(caches)[: number % len(caches)]
        for key in order:
            own_time = step(*caches[key], ids[:, number : number + 1], ids.shape[1] + number)
            if number >= warm:
                seconds[key].append(own_time)
    rows = []
    for (name, budget), taken in seconds.items():
        bound = seconds[(BOUND, budget) if budget < 1 else (STOCK, 1.0)]
        rows.append(
            {
                "setting": name,
                "budget": budget,
                "ms": 1000 * statistics.median(taken),
                "tokens_per_second": 1 / statistics.median(taken),
                "of_bound": quartiles([b / o for b, o in zip(bound, taken, strict=True)]),
                "of_full": quartiles([f / o for f, o in zip(seconds[STOCK, 1.0], taken, strict=True)]),
            }
        )
    attention = {
        f"{name} {budget}": attention_ratio(caches[name, budget], caches[BOUND, budget], steps)
        for budget in budgets
        for name in OURS
    }
    return {"decoding": rows, "attention_of_stock": attention}


def attention_ratio(own: tuple[Any, Cache], stock: tuple[Any, Cache], steps: int) -> list[float]:
    """Time of ours over stock's: a new token's entries stored and all attention computed, in every layer.

    Everything that a cache adds to a step is in it, the checks of each layer too; the rest of the model is not.
    """

    def once(model: Any, cache: Cache, implementation: str) -> float:
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
        pair = [lambda: once(*own, "suffice_sdpa"), lambda: once(*stock, "sdpa")]
        first = number % 2
        times = {first: pair[first](), 1 - first: pair[1 - first]()}
        ratios.append(times[0] / times[1])
    return quartiles(ratios[4:])


def memory_of(name: str, budget: float, tokens: int, steps: int) -> None:
    """Print what a process that does this, and nothing else, holds at most, in bytes above the loaded model."""
    model, ids = inputs(tokens)
    fill(model, ids[:, :8], STOCK, 1.0)  # weights come from the file when they are first used
    before = status("VmRSS")
    forget_peak()
    model, cache = fill(model, ids, name, budget)
    for number in range(steps):
        step(model, cache, ids[:, number : number + 1], tokens + number)
    print(json.dumps({"peak": status("VmHWM") - before, "after": status("VmRSS") - before, "model": before}))


def memory(budgets: list[float], tokens: int) -> list[dict[str, Any]]:
    """Peak memory of every setting, each in a process of its own."""
    rows = []
    for name, budget in [(STOCK, 1.0), *((name, budget) for budget in budgets for name in MEASURED)]:
        command = [sys.executable, __file__, "--memory-of", name, "--budgets", str(budget), "--tokens", str(tokens)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        row = {"setting": name, "budget": budget, **json.loads(done.stdout.splitlines()[-1])}
        rows.append(row)
        print(f"memory: {name}, {budget:.0%}: {row['peak'] / 1e6:.0f} MB at most", flush=True)
    return rows


def inputs(tokens: int) -> tuple[Any, Tensor]:
    """Return the default model in float32, and real English."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokenizer = load_model(dtype="float32")
    text = "\n\n".join(value for _, value in sorted(pydoc_data.topics.topics.items()))
    return model, tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :tokens]


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return the figures by which it is judged, from all that was measured."""
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
    """Print what was measured."""
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
    parser.add_argument("--only", choices=["speed", "memory"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        memory_of(options.memory_of, options.budgets[0], options.tokens, steps=16)
        return
    # What one part measured stays when the other is measured again.
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
