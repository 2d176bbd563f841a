"""Compare every allocation of the budget over heads with equal heads, at the same total.

Text: the next 32 tokens of a document. Questions: four six-digit numbers hidden in real English, one of them asked,
seen before eviction (aware) or after it (agnostic). The measure is the KL divergence from the full cache's next-token
distribution, in nats per token of the right continuation or answer. Every policy, allocation and budget selects from
one shared prefill of each sample, so differences are paired. The text that the head profile was measured on is left
out.

Each row is written to a file when it is measured, and a second call continues:

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

from suffice.kv import Policy, load_model
from suffice.kv.eval.compare import DEFAULT_TASKS
from suffice.kv.eval.fidelity import CacheConfig, evaluate
from suffice.kv.eval.tasks import make_example, python_manual
from suffice.kv.policy.estimators import Leverage
from suffice.kv.policy.registry import allocations
from suffice.kv.policy.weights import ExpectedAttention, KeySalience, WindowAttention
from suffice.study.results import mean_interval

BUDGETS = (0.5, 0.25, 0.1)
# The best one-pass policy of the search that led to `capkv`, without its attention in chunks, which made no
# difference. `capkv` differs from it by a cheaper estimate of the expected attention and a window of 16.
SEARCHED = Policy(
    name="searched",
    weights=WindowAttention(window_size=32, kernel_size=5) + ExpectedAttention() + 2 * KeySalience(),
    estimator=Leverage(power=0.5, ridge=0.1),
)
POLICIES: tuple[str | Policy, ...] = ("capkv", "capkv-paper", SEARCHED, "h2o", "snapkv", "keydiff")
COLUMNS = (
    "task", "mode", "seed", "policy", "allocation", "budget", "tokens_kept", "kl", "log_likelihood_change", "top1",
)  # fmt: skip


def measure(options: argparse.Namespace) -> None:
    """Measure the samples that the file does not hold yet, and add their rows."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(dtype=options.dtype)
    profiled = tokenizer(python_manual(), add_special_tokens=False, verbose=False).input_ids[:700]
    haystack = python_manual()[len(str(tokenizer.decode(profiled))) :]
    configs = [CacheConfig(policy, budget, name) for policy in POLICIES for name in allocations() for budget in BUDGETS]
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["seed"], row["task"], row["mode"]) for row in read_complete(options.rows, len(configs) + 1)}
    for seed in range(options.seed, options.seed + options.samples):
        for task, mode in DEFAULT_TASKS:
            if (seed, task, mode) in done:
                continue
            length = {"max_new_tokens": 32} if task == "text" else {}
            example = make_example(task, tokenizer, tokens=options.tokens, seed=seed, haystack=haystack, **length)
            rows = evaluate(model, tokenizer, example, configs, mode=mode, answer=False)
            with options.rows.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({column: row[column] for column in COLUMNS}) + "\n" for row in rows)
            print(f"sample {seed}, {task} {mode}", flush=True)


def read_complete(path: Path, num_rows: int) -> list[dict[str, Any]]:
    """Return the rows of all samples that have `num_rows` rows."""
    if not path.exists():
        return []
    samples: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # the line that was being written when the run was interrupted
            continue
        samples[row["seed"], row["task"], row["mode"]].append(row)
    # An interrupted sample that was measured again has the rows of both attempts: the last ones are complete.
    return [row for rows in samples.values() if len(rows) >= num_rows for row in rows[-num_rows:]]


def interval(values: list[float]) -> tuple[float, float, float]:
    """Return the mean and its 95 % t interval, rounded; the interval of a single value is infinite."""
    if len(values) < 2:
        return round(values[0], 4), float("-inf"), float("inf")
    found = mean_interval(values)
    return round(found.mean, 4), round(found.low, 4), round(found.high, 4)


def summarize(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each condition, policy and allocation.

    It has the mean KL, the paired change from equal heads with the same policy, and the paired excess over the policy
    `capkv` with the same allocation, all with 95 % t intervals.
    """
    by_condition: dict[tuple[str, float], dict[tuple[str, str], dict[int, dict[str, Any]]]] = defaultdict(dict)
    for row in rows:
        if row["policy"] != "full":
            setting = "text" if row["task"] == "text" else row["mode"]
            methods = by_condition[setting, row["budget"]]
            methods.setdefault((row["policy"], row["allocation"]), {})[row["seed"]] = row
    summary: list[dict[str, Any]] = []
    for (setting, budget), methods in by_condition.items():
        for (policy, allocation), by_seed in methods.items():
            facts: dict[str, Any] = {"policy": policy, "allocation": allocation, "setting": setting, "budget": budget}
            facts["kl"], *facts["kl_interval"] = interval([row["kl"] for row in by_seed.values()])
            baselines = {"change": (policy, "equal"), "over_default": (POLICIES[0], allocation)}
            for name, baseline in baselines.items():
                pairs = [row["kl"] - methods[baseline][seed]["kl"] for seed, row in by_seed.items()]
                facts[name], *facts[f"{name}_interval"] = interval(pairs)
            facts["top1"] = round(statistics.mean(row["top1"] for row in by_seed.values()), 4)
            equal = methods[policy, "equal"]
            facts["tokens_off_equal"] = max(
                abs(row["tokens_kept"] - equal[seed]["tokens_kept"]) for seed, row in by_seed.items()
            )
            summary.append(facts)
    return summary


def show(rows: list[dict[str, Any]]) -> None:
    """Print the tables of docs/results/kv.md."""
    conditions = [(setting, budget) for setting in ("text", "agnostic", "aware") for budget in BUDGETS]
    index = {(row["policy"], row["allocation"], row["setting"], row["budget"]): row for row in rows}
    methods = list(dict.fromkeys((row["policy"], row["allocation"]) for row in rows))
    names = list(dict.fromkeys(policy for policy, _ in methods))
    print("KL to the full cache; ↓ and ↑ mark a significant change from equal heads (paired 95 % t interval)")
    print_header(("policy", "allocation"), conditions)
    for method in methods:
        found = [index[(*method, *condition)] for condition in conditions]
        cells = [f"{row['kl']:.3f}{arrow(row, 'change')}" for row in found]
        print(f"| {' | '.join((*method, *cells))} |")
    print("\nChange from equal heads with the head profile, and its interval")
    print_header(("policy",), conditions)
    for name in names:
        cells = [with_interval(index[(name, "profile", *condition)], "change") for condition in conditions]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\nExcess over capkv, both with the head profile, and its interval")
    print_header(("policy",), conditions)
    for name in names:
        if name != POLICIES[0]:
            cells = [with_interval(index[(name, "profile", *condition)], "over_default") for condition in conditions]
            print(f"| {name} | {' | '.join(cells)} |")
    for allocation in dict.fromkeys(allocation for _, allocation in methods):
        arrows = [arrow(row, "change") for row in rows if row["allocation"] == allocation]
        print(f"{allocation}: lower in {arrows.count(' ↓')}, higher in {arrows.count(' ↑')} of {len(arrows)} cells")


def print_header(first: tuple[str, ...], conditions: list[tuple[str, float]]) -> None:
    """Print the header of a Markdown table."""
    headers = (*first, *(f"{setting} {budget:.0%}" for setting, budget in conditions))
    print(f"| {' | '.join(headers)} |\n|{'---|' * len(headers)}")


def arrow(row: dict[str, Any], name: str) -> str:
    """Return an arrow if a difference is significant."""
    low, high = row[f"{name}_interval"]
    return " ↓" if high < 0 else " ↑" if low > 0 else ""


def with_interval(row: dict[str, Any], name: str) -> str:
    """Return a difference and its interval as text."""
    low, high = row[f"{name}_interval"]
    return f"{row[name]:+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--dtype", default="float32", help="of the model; scores are always computed in float32")
    parser.add_argument("--rows", type=Path, default=Path("out/kv-allocation.jsonl"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measure(options)
    rows = summarize(read_complete(options.rows, len(POLICIES) * len(allocations()) * len(BUDGETS) + 1))
    show(rows)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {name: getattr(options, name) for name in ("samples", "seed", "tokens", "dtype")}
        facts["torch"] = torch.__version__
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        options.json.write_text(f'{json.dumps(facts)[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
