"""Where a head profile may come from: text, random tokens, a short text, or the weights alone.

The default policy with equal heads, with the profile that ships for the model, and with profiles made in other ways;
also with the shipped one's numbers given to the wrong heads. KL divergence from the full cache's next-token
distribution in nats a token. Text, questions and seeds as in benchmarks/evidence.py; the profile's own text is left
out.

    python benchmarks/kv_profile.py --samples 20 --json docs/results/kv-profile.json

A star marks a mean that differs from the shipped profile's beyond a paired 95 % t interval. The way from the weights
was found on this model (docstrings of PyTorch, seeds 0 to 5).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from evidence import FIRST_SEED, haystack
from machine import machine
from suffice.kv import DEFAULT_POLICY, calibrate, load_model
from suffice.kv.budget.calibration import get_profile
from suffice.kv.budget.head_profile import HeadProfile
from suffice.kv.budget.profile import Profile
from suffice.kv.budget.profile_from_weights import profile_from_weights
from suffice.kv.eval.compare import TASKS
from suffice.kv.eval.fidelity import Cell, evaluate
from suffice.kv.eval.tasks import make
from suffice.study.results import mean_interval

BUDGETS = (0.5, 0.25, 0.1)


def shuffled(profile: Profile) -> Profile:
    """Return a profile with its numbers given to the wrong heads."""
    rows, heads = len(profile.attention), len(profile.attention[0])
    values = torch.tensor(profile.attention).flatten()
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    mixed = values[order].view(rows, heads).tolist()
    return dataclasses.replace(profile, attention=tuple(map(tuple, mixed)))


def allocations(model: Any, tokenizer: Any) -> dict[str, str | HeadProfile]:
    """Return each way to split a budget, by what the table calls it."""
    shipped = get_profile(model)
    made = {
        "700 tokens of text (shipped)": shipped,
        "128 tokens of text": calibrate(model, tokenizer, tokens=128),
        "700 random tokens": calibrate(model),
        "weights alone": profile_from_weights(model),
        "shipped, heads shuffled": shuffled(shipped),
    }
    return {"none: equal heads": "equal", **{name: HeadProfile(profile=profile) for name, profile in made.items()}}


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Return KL by allocation and cell, a number for each sample."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(dtype="float32")
    text = Path(haystack(options.folder, "float32")).read_text(encoding="utf-8")
    splits = allocations(model, tokenizer)
    cells = [Cell(DEFAULT_POLICY, budget, split) for split in splits.values() for budget in BUDGETS]
    names = [(name, budget) for name in splits for budget in BUDGETS]
    found: dict[str, dict[str, list[float]]] = {name: {} for name in splits}
    for seed in range(options.seed, options.seed + options.samples):
        for task, mode in TASKS:
            example = make(task, tokenizer, tokens=options.tokens, seed=seed, haystack=text)
            rows = evaluate(model, tokenizer, example, cells, mode=mode, answer=False)[1:]
            for (name, budget), row in zip(names, rows, strict=True):
                found[name].setdefault(f"{'text' if task == 'text' else mode} {budget:.0%}", []).append(row["kl"])
        print(f"sample {seed}", flush=True)
    return found


def table(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Return the table in Markdown."""
    shipped = next(name for name in found if "shipped)" in name)
    cells = list(found[shipped])
    lines = [f"| profile | {' | '.join(cells)} |", "|---" * (len(cells) + 1) + "|"]
    for name, values in found.items():
        row = []
        for cell in cells:
            gap = mean_interval([one - other for one, other in zip(values[cell], found[shipped][cell], strict=True)])
            star = "*" if gap.low > 0 or gap.high < 0 else ""
            row.append(f"{mean_interval(values[cell]).mean:.3f}{star}")
        lines.append(f"| {name} | {' | '.join(row)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--folder", type=Path, default=Path("out/kv-profile"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options)
    print("\n".join(table(found)))
    result = {"samples": options.samples, "seed": options.seed, "tokens": options.tokens, "machine": machine()}
    result["kl"] = {name: {cell: [round(x, 5) for x in own] for cell, own in by.items()} for name, by in found.items()}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "kl"}))


if __name__ == "__main__":
    main()
