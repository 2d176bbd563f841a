"""Speed of quantized entries: decoding, packing, and evictions in a stream, beside the same entries in float32.

All caches run in one process with one thread. They decode one token in turn, so that changes of the machine's speed
affect all of them, and ratios are computed within each turn. Time is processor time, which depends less on other
processes.

* Decoding: after a prompt of 4,096 tokens, one step with 16 bits (the model's dtype, float32 here) and with 4 bits,
  for heads of equal length (`capkv`) and of unequal length (the default policy), relative to the stock cache and to the
  same entries without bits. `with packing` contains the steps in which a block of new entries is quantized.
* Packing: the time in which the kept entries are copied and quantized, with the second moments of the queries, as a
  share of the prefill.
* Evictions: a stream is read in chunks with `evict="always"`. The time of scoring, evicting and storing with 4 bits,
  and that of whole passes, relative to the same cache without bits.

Run with `make bench-kv`, or alone. Options: --tokens 4096, --budgets 1 .36 .1, --steps 32, --chunks 12, --json PATH.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from machine import machine
from suffice.kv import DEFAULT_POLICY, CompressedCache, load_model
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.cache.prefill import prefill
from suffice.kv.storage.quantized import QuantizedStorage

POLICIES = {"equal": "capkv", "unequal": DEFAULT_POLICY}
STOCK = "stock"
BITS = 4
WARM_UP = 4


def quartiles(values: list[float]) -> list[float]:
    """Return the median and the lower and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return [middle, low, high]


def ratios(times: list[float], others: list[float]) -> list[float]:
    """Return the quartiles of the ratios of two series."""
    return quartiles([own / other for own, other in zip(times, others, strict=True)])


@contextmanager
def timed(owner: type, name: str) -> Iterator[list[float]]:
    """Collect the processor time of all calls of a method."""
    seconds: list[float] = []
    original = owner.__dict__[name]
    function = original.__func__ if isinstance(original, classmethod) else original

    def measure(*args: Any, **options: Any) -> Any:
        start = time.process_time()
        result = function(*args, **options)
        seconds.append(time.process_time() - start)
        return result

    setattr(owner, name, classmethod(measure) if isinstance(original, classmethod) else measure)
    try:
        yield seconds
    finally:
        setattr(owner, name, original)


def decoding(model: Any, ids: Tensor, budgets: list[float], steps: int) -> list[dict[str, Any]]:
    """Decode with all caches in turn."""
    stock = DynamicCache(config=model.config)
    model(ids, past_key_values=stock, logits_to_keep=1)
    caches: dict[tuple[str, float, int], Cache] = {(STOCK, 1.0, 16): stock}
    for heads, policy in POLICIES.items():
        own = {
            (heads, budget, bits): CompressedCache(
                model, policy, budget, bits=None if bits == 16 else bits, measure_capacity=False
            )
            for budget in budgets
            for bits in (16, BITS)
            if heads == "equal" or budget < 1  # with a budget of 1, all heads have the same length
        }
        prefill(model, {"input_ids": ids}, list(own.values()))
        caches |= own
    seconds: dict[tuple[str, float, int], list[float]] = {key: [] for key in caches}
    for number in range(steps + WARM_UP):
        order = list(caches)[number % len(caches) :] + list(caches)[: number % len(caches)]
        for key in order:
            start = time.process_time()
            model(ids[:, number : number + 1], past_key_values=caches[key], logits_to_keep=1)
            if number >= WARM_UP:
                seconds[key].append(time.process_time() - start)
    return [
        {
            "heads": heads,
            "budget": budget,
            "bits": bits,
            "ms": 1000 * statistics.median(times),
            "of_stock": ratios(times, seconds[STOCK, 1.0, 16]),
            "of_same_entries": ratios(times, seconds[heads, budget, 16]),
            "of_same_entries_with_packing": sum(times) / sum(seconds[heads, budget, 16]),
        }
        for (heads, budget, bits), times in seconds.items()
    ]


def packing(model: Any, ids: Tensor, budgets: list[float]) -> list[dict[str, Any]]:
    """Measure the share of the prefill in which entries are copied and quantized."""
    rows: list[dict[str, Any]] = []
    for budget in budgets:
        cache = CompressedCache(model, POLICIES["equal"], budget, bits=BITS, measure_capacity=False)
        with timed(QuantizedStorage, "gather") as seconds, timed(CompressedLayer, "query_moments") as moments:
            start = time.process_time()
            model(ids, past_key_values=cache, logits_to_keep=1)
            whole = time.process_time() - start
        rows.append({"budget": budget, "percent_of_prefill": 100 * (sum(seconds) + sum(moments)) / whole})
    return rows


def evictions(model: Any, ids: Tensor, chunks: int, chunk: int = 512, budget: int = 2048) -> list[dict[str, Any]]:
    """Read a stream with and without bits in turn."""
    rows: list[dict[str, Any]] = []
    for heads, policy in POLICIES.items():
        caches = {
            bits: CompressedCache(model, policy, budget, evict="always", bits=None if bits == 16 else bits)
            for bits in (16, BITS)
        }
        passes: dict[int, list[float]] = {bits: [] for bits in caches}
        after: dict[int, list[float]] = {bits: [] for bits in caches}
        for number in range(chunks):
            part = ids[:, number * chunk : (number + 1) * chunk]
            for bits in (16, BITS) if number % 2 else (BITS, 16):
                with timed(CompressedLayer, "post_attention") as seconds:
                    start = time.process_time()
                    model(part, past_key_values=caches[bits], logits_to_keep=1)
                    whole = time.process_time() - start
                if number * chunk >= budget:
                    passes[bits].append(whole)
                    after[bits].append(sum(seconds))
        rows.append(
            {
                "heads": heads,
                "ms_without_bits": 1000 * statistics.median(after[16]),
                "eviction_of_that_without_bits": ratios(after[BITS], after[16]),
                "pass_of_that_without_bits": ratios(passes[BITS], passes[16]),
            }
        )
    return rows


def table(result: dict[str, Any]) -> None:
    """Print a result."""
    print(f"\n{'heads':<9}{'budget':>7}{'bits':>5}{'ms':>8}{'of stock':>20}{'of same entries':>20}{'with packing':>14}")
    for row in result["decoding"]:
        own = [f"{x[0]:.2f} [{x[1]:.2f}-{x[2]:.2f}]" for x in (row["of_stock"], row["of_same_entries"])]
        print(
            f"{row['heads']:<9}{row['budget']:>7.0%}{row['bits']:>5}{row['ms']:>8.1f}{own[0]:>20}{own[1]:>20}"
            f"{row['of_same_entries_with_packing']:>14.2f}"
        )
    for row in result["packing"]:
        print(f"packing, budget {row['budget']:.0%}: {row['percent_of_prefill']:.2f} % of the prefill")
    for row in result["evictions"]:
        eviction, whole = row["eviction_of_that_without_bits"], row["pass_of_that_without_bits"]
        print(
            f"stream, {row['heads']} heads: eviction {eviction[0]:.2f} [{eviction[1]:.2f}-{eviction[2]:.2f}], "
            f"pass {whole[0]:.2f} [{whole[1]:.2f}-{whole[2]:.2f}] of that without bits"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.36, 0.1])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(dtype="float32")
    text = "\n\n".join(value for _, value in sorted(pydoc_data.topics.topics.items()))
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    with torch.no_grad():
        result: dict[str, Any] = {
            "tokens": options.tokens,
            "steps": options.steps,
            "decoding": decoding(model, ids[:, : options.tokens], options.budgets, options.steps),
            "packing": packing(model, ids[:, : options.tokens], options.budgets),
            "evictions": evictions(model, ids, options.chunks),
            "machine": machine(),
        }
    summary = {
        "bits_step_of_same_entries": max(x["of_same_entries"][0] for x in result["decoding"] if x["bits"] == BITS),
        "bits_step_of_stock": max(x["of_stock"][0] for x in result["decoding"] if x["bits"] == BITS),
        "bits_packing_percent": max(x["percent_of_prefill"] for x in result["packing"]),
        "bits_eviction_of_that_without": max(x["eviction_of_that_without_bits"][0] for x in result["evictions"]),
    }
    result |= summary
    table(result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
