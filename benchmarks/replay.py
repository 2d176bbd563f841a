"""Policies with a replay: the same kept entries as kvpress's presses, and the time of the second pass and of a repair.

    python benchmarks/replay.py --json docs/results/kv-replay-peers.json     # in the environment of make bench-kv

Both libraries compress the same prompt of the default model, in float32. The presses read the prompt without a chat
template, because they leave the tokens of the template before the document out of the replay. A part size below the
length of the prompt tests that both divide the prompt in the same way. Times are processor times with one thread,
relative to the prefill without compression in the same round: median and range.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from machine import machine
from suffice.kv import DEFAULT_POLICY, CompressedCache, load_model, policies, prefill
from suffice.kv.cache import replay
from suffice.kv.eval.tasks import python_manual

PRESSES = {"kvzip": "KVzipPress", "kvzip+": "KVzipPress", "kvgrad": "KVgradPress"}
RATIO = 0.75  # the share of entries that are evicted


def load_without_template() -> tuple[Any, Any]:
    """Return the default model and its tokenizer, both from a folder, and without a chat template."""
    model, tokenizer = load_model(dtype="float32")
    tokenizer.chat_template = None
    folder = tempfile.mkdtemp()  # the presses load the tokenizer by the name of the model
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return loaded, transformers.AutoTokenizer.from_pretrained(folder)


def make_press(name: str, part_size: int) -> Any:
    """Return the press of kvpress that a policy corresponds to."""
    import kvpress

    press: Any = getattr(kvpress, PRESSES[name])(RATIO)
    press.chunk_size = part_size
    press.kvzip_plus_normalization = name == "kvzip+"
    return press


def kept_by_press(model: Any, ids: Tensor, name: str, part_size: int) -> Tensor:
    """Return which tokens each head keeps with a press, bool [layers, heads, tokens]."""
    with torch.no_grad(), make_press(name, part_size)(model):
        model.model(input_ids=ids, past_key_values=transformers.DynamicCache())
    kept = torch.ones(len(model.model.layers), model.config.num_key_value_heads, ids.shape[1], dtype=torch.bool)
    for layer, own in zip(model.model.layers, kept, strict=True):
        _, heads, tokens = layer.self_attn.masked_key_indices
        own[heads, tokens] = False
        layer.self_attn.masked_key_indices = None
    return kept


def kept_by_policy(model: Any, tokenizer: Any, ids: Tensor, name: str, part_size: int) -> Tensor:
    """Return which tokens each head keeps with a policy, bool [layers, heads, tokens]."""
    replay._PART_SIZE = replay._PART_SIZE_OF_GRADIENT = part_size
    cache = CompressedCache(model, name, 1 - RATIO)
    prefill(model, {"input_ids": ids}, [cache], tokenizer=tokenizer)
    layers: list[Tensor] = []
    for layer in cache.compressed_layers:
        positions = cache.kept_positions(layer.index)[0].long()
        mask = torch.zeros(len(positions), ids.shape[1] + 1, dtype=torch.bool)
        layers.append(mask.scatter_(1, positions.where(positions >= 0, ids.shape[1]), True)[:, :-1])
    return torch.stack(layers)


def compare_with_presses(num_tokens: int, part_sizes: list[int]) -> list[dict[str, Any]]:
    """Compare the kept entries of every policy and press."""
    model, tokenizer = load_without_template()
    ids = tokenizer(python_manual(), return_tensors="pt").input_ids[:, :num_tokens]
    rows: list[dict[str, Any]] = []
    for name in PRESSES:
        for part_size in part_sizes:
            press = kept_by_press(model, ids, name, part_size)
            policy = kept_by_policy(model, tokenizer, ids, name, part_size)
            same = int((press & policy).sum())
            rows.append({"policy": name, "part_size": part_size, "kept": int(policy.sum()), "same": same})
            print(f"{name}, parts of {part_size}: {same} of {rows[-1]['kept']} kept entries are the same", flush=True)
    return rows


def measure_time(num_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Measure the processor time of a prefill with each policy, relative to a prefill without compression."""
    model, tokenizer = load_model(dtype="float32")
    ids = tokenizer(python_manual(), return_tensors="pt").input_ids[:, :num_tokens]
    caches: dict[str, dict[str, Any]] = {
        "full": {"policy": "full", "budget": 1.0},
        DEFAULT_POLICY: {},
        f"{DEFAULT_POLICY}, repair": {"repair": True},
        **{name: {"policy": name} for name in policies(replay=True)},
    }
    ratios: dict[str, list[float]] = {name: [] for name in caches if name != "full"}
    for number in range(rounds + 1):
        seconds: dict[str, float] = {}
        for name, options in caches.items():
            cache = CompressedCache(model, **{"budget": 1 - RATIO, "measure_capacity": False, **options})
            start = time.process_time()
            prefill(model, {"input_ids": ids}, [cache], tokenizer=tokenizer)
            seconds[name] = time.process_time() - start
        for name, values in ratios.items():
            if number:  # the first round warms up
                values.append(seconds[name] / seconds["full"])
    rows: list[dict[str, Any]] = []
    for name, values in ratios.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        rows.append({"policy": name, "tokens": num_tokens, "ratio": middle, "low": low, "high": high})
        print(f"{name}: {middle:.2f} times the prefill ({low:.2f} to {high:.2f})", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400, help="length of the prompt in the comparison with kvpress")
    parser.add_argument("--part-sizes", type=int, nargs="+", default=[2048, 128])
    parser.add_argument("--time-tokens", type=int, default=1000, help="length of the prompt whose replay is timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true", help="measure times only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    part_sizes = (replay._PART_SIZE, replay._PART_SIZE_OF_GRADIENT)
    content: dict[str, Any] = {"machine": machine(), "transformers": transformers.__version__}
    # First, because kvpress wraps every attention function that is registered when it is imported.
    if not options.no_peers:
        content["kept"] = compare_with_presses(options.tokens, options.part_sizes)
        replay._PART_SIZE, replay._PART_SIZE_OF_GRADIENT = part_sizes
    content["time"] = measure_time(options.time_tokens, options.rounds)
    if options.json is not None:
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content))


if __name__ == "__main__":
    main()
