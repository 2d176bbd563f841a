"""Compare sources of the head profile: text, random tokens, a short text, or the weights alone.

The default policy with equal heads, with the profile that is shipped for the model, with profiles from other sources,
and with the shipped profile assigned to the wrong heads. The measure is the KL divergence from the full cache's
next-token distribution, in nats per token. Texts, questions and seeds are those of benchmarks/evidence.py; the text
that the profile was measured on is left out.

    python benchmarks/kv_profile.py --samples 20 --json docs/results/kv-profile.json

A star marks a mean that differs from the shipped profile's according to a paired 95 % t interval. The method that uses
the weights was developed on this model (docstrings of PyTorch, seeds 0 to 5).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from evidence import FIRST_SEED, write_haystack
from machine import machine
from suffice.kv import DEFAULT_POLICY, calibrate, load_model
from suffice.kv.budget.calibration import get_profile
from suffice.kv.budget.head_profile import HeadProfile
from suffice.kv.budget.profile import Profile
from suffice.kv.budget.profile_from_weights import profile_from_weights
from suffice.kv.eval.compare import DEFAULT_TASKS
from suffice.kv.eval.fidelity import CacheConfig, evaluate
from suffice.kv.eval.tasks import make_example
from suffice.kv.hf.loading import ModelSource
from suffice.study.results import mean_interval

BUDGETS = (0.5, 0.25, 0.1)
SHIPPED = "700 tokens of text (shipped)"


def shuffle_heads(profile: Profile) -> Profile:
    """Return a profile with its numbers assigned to random heads."""
    values = torch.tensor([value for layer in profile.attention for value in layer])
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    attention = [part.tolist() for part in values[order].split(profile.num_heads)]
    return dataclasses.replace(profile, attention=tuple(map(tuple, attention)))


def allocations(model: Any, tokenizer: Any) -> dict[str, str | HeadProfile]:
    """Return the allocation of each row of the table, by its label."""
    shipped = get_profile(model)
    profiles = {
        SHIPPED: shipped,
        "128 tokens of text": calibrate(model, tokenizer, tokens=128),
        "700 random tokens": calibrate(model),
        "weights alone": profile_from_weights(model),
        "shipped, heads shuffled": shuffle_heads(shipped),
    }
    return {"none: equal heads": "equal", **{name: HeadProfile(profile=profiles[name]) for name in profiles}}


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return the KL of each sample, by allocation and condition."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(dtype="float32")
    haystack = Path(write_haystack(options.folder, ModelSource(dtype="float32"))).read_text(encoding="utf-8")
    by_name = allocations(model, tokenizer)
    configs = [CacheConfig(DEFAULT_POLICY, budget, allocation) for allocation in by_name.values() for budget in BUDGETS]
    names = [(name, budget) for name in by_name for budget in BUDGETS]
    kl: dict[str, dict[str, list[float]]] = {name: {} for name in by_name}
    for seed in range(options.seed, options.seed + options.samples):
        for task, mode in DEFAULT_TASKS:
            example = make_example(task, tokenizer, tokens=options.tokens, seed=seed, haystack=haystack)
            rows = evaluate(model, tokenizer, example, configs, mode=mode, answer=False)[1:]
            for (name, budget), row in zip(names, rows, strict=True):
                condition = f"{'text' if task == 'text' else mode} {budget:.0%}"
                kl[name].setdefault(condition, []).append(row["kl"])
        print(f"sample {seed}", flush=True)
    return kl


def table(kl: dict[str, dict[str, list[float]]]) -> list[str]:
    """Return the lines of the Markdown table."""
    conditions = list(kl[SHIPPED])
    lines = [f"| profile | {' | '.join(conditions)} |", "|---" * (len(conditions) + 1) + "|"]
    for name, by_condition in kl.items():
        cells: list[str] = []
        for condition in conditions:
            values, shipped = by_condition[condition], kl[SHIPPED][condition]
            difference = mean_interval([one - other for one, other in zip(values, shipped, strict=True)])
            star = "*" if difference.low > 0 or difference.high < 0 else ""
            cells.append(f"{mean_interval(values).mean:.3f}{star}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--folder", type=Path, default=Path("out/kv-profile"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    kl = measure(options)
    print("\n".join(table(kl)))
    result = {"samples": options.samples, "seed": options.seed, "tokens": options.tokens, "machine": machine()}
    result["kl"] = {
        name: {condition: [round(value, 5) for value in values] for condition, values in by_condition.items()}
        for name, by_condition in kl.items()
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "kl"}))


if __name__ == "__main__":
    main()
