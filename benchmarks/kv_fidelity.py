"""How close a part of the cache stays to the full one: every policy, text and questions, equal heads.

Text: the next 64 tokens of a document after 900. Questions: four six-digit numbers planted in 900 tokens of
real English, one asked, before eviction (aware) or after it (agnostic). KL divergence from the full cache's
next-token distribution in nats a token, on the true continuation or answer; mean and standard error.

    python benchmarks/kv_fidelity.py --samples 12 --seed 2 --json docs/results/kv-fidelity.json
"""

from __future__ import annotations

import argparse
import copy
import json
import pydoc_data.topics
import random
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suffice.kv import CompressedCache, load_model, policies
from suffice.kv.cache.shared_prefill import prefill

NAMES = ("river", "castle", "garden", "violin", "harbor", "lantern", "meadow", "orchard")
TASKS = ("text", "agnostic", "aware")


def log_probabilities(model: Any, cache: CompressedCache, rest: Tensor, count: int) -> Tensor:
    """Log-probabilities for the last `count` of the tokens that follow the cache."""
    with torch.no_grad():
        logits = model(rest[None], past_key_values=copy.deepcopy(cache)).logits[0]
    return logits[-count - 1 : -1].float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(dtype="float32")
    text = "\n\n".join(value for _, value in sorted(pydoc_data.topics.topics.items()) if len(value) > 400)
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    names = [name for name, policy in policies().items() if name != "full" and not policy.allocation.ragged]
    generator = random.Random(options.seed)
    found: dict[tuple[str, str, float], list[float]] = defaultdict(list)

    def encode(part: str) -> Tensor:
        return tokenizer(part, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]

    def measure(task: str, prompt: Tensor, between: Tensor, target: Tensor) -> None:
        """Prefill and evict the prompt, then read `between` and score the target."""
        settings = [("full", 1.0), *((name, budget) for name in names for budget in options.budgets)]
        caches = [CompressedCache(model, name, budget, measure_capacity=False) for name, budget in settings]
        # The last token of the prompt is read after eviction, so that the first of the target is predicted.
        head, rest = prompt[:-1], torch.cat((prompt[-1:], between, target))
        prefill(model, {"input_ids": head[None]}, caches)
        reference = log_probabilities(model, caches[0], rest, len(target))
        for (name, budget), cache in zip(settings[1:], caches[1:], strict=True):
            own = log_probabilities(model, cache, rest, len(target))
            found[task, name, budget].append(float((reference.exp() * (reference - own)).sum(-1).mean()))

    for sample in range(options.samples):
        start = generator.randrange(len(ids) - options.tokens - 64)
        document = ids[start : start + options.tokens]
        measure("text", document, ids[:0], ids[start + options.tokens : start + options.tokens + 64])
        facts = [(name, str(generator.randrange(100_000, 1_000_000))) for name in generator.sample(NAMES, 4)]
        fifth = options.tokens // 5
        parts = [tokenizer.decode(document[fifth * j : fifth * (j + 1)]) for j in range(5)]
        # Plain text comes last: a fact there would show the last queries what a fact looks like.
        story = "".join(
            f"{part}\n\nThe secret number of the {name} is {number}.\n\n"
            for part, (name, number) in zip(parts, facts, strict=False)
        )
        story += parts[4]
        name, number = generator.choice(facts)
        context = encode(f"<|im_start|>user\n{story}")
        question = encode(
            f"\nWhat is the secret number of the {name}?<|im_end|>\n<|im_start|>assistant\n"
            f"The secret number of the {name} is"
        )
        gold = encode(f" {number}.")
        measure("agnostic", context, question, gold)
        measure("aware", torch.cat((context, question)), ids[:0], gold)
        print(f"sample {sample + 1} of {options.samples}", flush=True)

    cells = [(task, budget) for task in TASKS for budget in options.budgets]
    print("KL to the full cache, nats a token: mean ± standard error")
    print(f"{'policy':<20}" + "".join(f"{f'{task} {budget:.0%}':>18}" for task, budget in cells) + f"{'mean rank':>12}")
    means = {(name, cell): statistics.mean(found[cell[0], name, cell[1]]) for name in names for cell in cells}
    ranks = {
        name: statistics.mean(1 + sum(means[other, cell] < means[name, cell] for other in names) for cell in cells)
        for name in names
    }
    rows = []
    for name in sorted(names, key=lambda name: ranks[name]):
        line = f"{name:<20}"
        for task, budget in cells:
            values = found[task, name, budget]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            line += f"{f'{means[name, (task, budget)]:.3f} ± {error:.3f}':>18}"
            rows.append(
                {"policy": name, "task": task, "budget": budget, "kl": means[name, (task, budget)], "se": error}
            )
        print(f"{line}{ranks[name]:>12.1f}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {"samples": options.samples, "seed": options.seed, "tokens": options.tokens, "mean_rank": ranks}
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
