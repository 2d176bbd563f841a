"""What the split of a budget over heads is worth: every allocation against equal heads, at the same total.

Text: the next 32 tokens of a document. Questions: four six-digit numbers planted in real English, one asked, before
eviction (aware) or after it (agnostic). KL divergence from the full cache's next-token distribution in nats a token,
on the true continuation or answer. Each sample is read once, and every policy, allocation and budget keeps its part of
that one prefill; so differences are paired. The text that the head profile was measured on is left out.

Writes a line for each row as it goes, and goes on where it stopped:

    python benchmarks/kv_allocation.py --samples 40 --dtype bfloat16 --json docs/results/kv-allocation.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student

from suffice.kv import Policy, load_model
from suffice.kv.eval.compare import TASKS
from suffice.kv.eval.fidelity import Cell, evaluate
from suffice.kv.eval.tasks import make, manual
from suffice.kv.policy.estimators import Leverage
from suffice.kv.policy.registry import allocations
from suffice.kv.policy.weights import ExpectedAttention, KeySalience, WindowAttention

BUDGETS = (0.5, 0.25, 0.1)
# The best one-pass policy of the search that led to `capkv`, without its attention in chunks, which was found to
# change nothing. `capkv` differs from it by a cheaper estimate of the expected attention and a window of 16.
SEARCHED = Policy(
    name="searched",
    weights=WindowAttention(window_size=32, kernel_size=5) + ExpectedAttention() + 2 * KeySalience(),
    estimator=Leverage(power=0.5, ridge=0.1),
)
POLICIES: tuple[str | Policy, ...] = ("capkv", "capkv-paper", SEARCHED, "h2o", "snapkv", "keydiff")
FACTS = ("task", "mode", "seed", "policy", "allocation", "budget", "tokens_kept", "kl", "log_likelihood_change", "top1")


def measure(options: argparse.Namespace) -> None:
    """Run the samples that are not in the file yet, and add their rows."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(dtype=options.dtype)
    read = tokenizer(manual(), add_special_tokens=False, verbose=False).input_ids[:700]
    haystack = manual()[len(str(tokenizer.decode(read))) :]
    cells = [Cell(policy, budget, name) for policy in POLICIES for name in allocations() for budget in BUDGETS]
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["seed"], row["task"], row["mode"]) for row in complete(options.rows, len(cells) + 1)}
    for seed in range(options.seed, options.seed + options.samples):
        for task, mode in TASKS:
            if (seed, task, mode) in done:
                continue
            more = {"new_tokens": 32} if task == "text" else {}
            example = make(task, tokenizer, tokens=options.tokens, seed=seed, haystack=haystack, **more)
            rows = evaluate(model, tokenizer, example, cells, mode=mode, answer=False)
            with options.rows.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({fact: row[fact] for fact in FACTS}) + "\n" for row in rows)
            print(f"sample {seed}, {task} {mode}", flush=True)


def complete(path: Path, rows: int) -> list[dict[str, Any]]:
    """Return the rows of the samples that were measured to their end."""
    if not path.exists():
        return []
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the line that was being written when the run was stopped
            continue
        groups[row["seed"], row["task"], row["mode"]].append(row)
    # A sample that was stopped and begun again has the rows of both: the last are whole.
    return [row for group in groups.values() if len(group) >= rows for row in group[-rows:]]


def interval(values: list[float]) -> tuple[float, float, float]:
    """Return the mean and its 95 % interval by Student's t."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return round(mean, 4), float("-inf"), float("inf")
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return round(mean, 4), round(mean - half, 4), round(mean + half, 4)


def summarise(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each setting, budget, policy and allocation.

    Each has the mean KL, its paired change from equal heads under the same policy, and its paired excess over the
    policy `capkv` under the same allocation, all with 95 % intervals.
    """
    found: dict[tuple[str, float], dict[tuple[str, str], dict[int, dict[str, Any]]]] = defaultdict(dict)
    for row in rows:
        if row["policy"] != "full":
            setting = "text" if row["task"] == "text" else row["mode"]
            found[setting, row["budget"]].setdefault((row["policy"], row["allocation"]), {})[row["seed"]] = row
    out: list[dict[str, Any]] = []
    for (setting, budget), cells in found.items():
        for (policy, allocation), own in cells.items():
            facts: dict[str, Any] = {"policy": policy, "allocation": allocation, "setting": setting, "budget": budget}
            facts["kl"], *facts["kl_interval"] = interval([row["kl"] for row in own.values()])
            others = {"change": (policy, "equal"), "over_default": (POLICIES[0], allocation)}
            for name, other in others.items():
                pairs = [row["kl"] - cells[other][seed]["kl"] for seed, row in own.items()]
                facts[name], *facts[f"{name}_interval"] = interval(pairs)
            facts["top1"] = round(statistics.mean(row["top1"] for row in own.values()), 4)
            equal = cells[policy, "equal"]
            facts["tokens_off_equal"] = max(
                abs(row["tokens_kept"] - equal[seed]["tokens_kept"]) for seed, row in own.items()
            )
            out.append(facts)
    return out


def show(rows: list[dict[str, Any]]) -> None:
    """Print the tables of docs/results/kv.md."""
    places = [(setting, budget) for setting in ("text", "agnostic", "aware") for budget in BUDGETS]
    index = {(row["policy"], row["allocation"], row["setting"], row["budget"]): row for row in rows}
    heads = dict.fromkeys((row["policy"], row["allocation"]) for row in rows)
    print("KL to the full cache; ↓ and ↑ where the paired 95 % interval of the change from equal heads leaves out 0")
    table(("policy", "allocation"), places)
    for policy, allocation in heads:
        cells = [f"{(row := index[(policy, allocation, *place)])['kl']:.3f}{arrow(row, 'change')}" for place in places]
        print(f"| {policy} | {allocation} | {' | '.join(cells)} |")
    print("\nChange from equal heads under the head profile, with its interval")
    table(("policy",), places)
    for policy in dict.fromkeys(policy for policy, _ in heads):
        print(f"| {policy} | {' | '.join(spread(index[(policy, 'profile', *place)], 'change') for place in places)} |")
    print("\nExcess over capkv, both under the head profile, with its interval")
    table(("policy",), places)
    for policy in dict.fromkeys(policy for policy, _ in heads):
        if policy != POLICIES[0]:
            cells = [spread(index[(policy, "profile", *place)], "over_default") for place in places]
            print(f"| {policy} | {' | '.join(cells)} |")
    for allocation in dict.fromkeys(allocation for _, allocation in heads):
        marks = [arrow(row, "change") for row in rows if row["allocation"] == allocation]
        print(f"{allocation}: lower in {marks.count(' ↓')}, higher in {marks.count(' ↑')} of {len(marks)} cells")


def table(first: tuple[str, ...], places: list[tuple[str, float]]) -> None:
    """Print the head of a table."""
    heads = (*first, *(f"{setting} {budget:.0%}" for setting, budget in places))
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")


def arrow(row: dict[str, Any], name: str) -> str:
    """Return whether a difference is one."""
    low, high = row[f"{name}_interval"]
    return " ↓" if high < 0 else " ↑" if low > 0 else ""


def spread(row: dict[str, Any], name: str) -> str:
    """Return a difference and its interval."""
    low, high = row[f"{name}_interval"]
    return f"{row[name]:+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--dtype", default="float32", help="of the model; scores are float32 whatever it is")
    parser.add_argument("--rows", type=Path, default=Path("out/kv-allocation.jsonl"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measure(options)
    rows = summarise(complete(options.rows, len(POLICIES) * len(allocations()) * len(BUDGETS) + 1))
    show(rows)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {name: getattr(options, name) for name in ("samples", "seed", "tokens", "dtype")}
        facts["torch"] = torch.__version__
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        options.json.write_text(f'{json.dumps(facts)[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
