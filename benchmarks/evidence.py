"""Which policy stays closest to the full cache: with its own allocation, and with the same head profile for all.

Text: the continuation of a document. Questions: four six-digit codes hidden in real English, one of them asked, seen
after eviction (agnostic) or before it (aware). The measure is the KL divergence from the full cache's next-token
distribution, in nats per token of the right continuation or answer. All caches of a sample share one prefill, so
differences are paired by sample. The haystack leaves out the text that the head profile was measured on, and no policy
was designed on these seeds.

    python benchmarks/evidence.py --samples 8                  # the short form, `make evidence`
    python benchmarks/evidence.py --samples 40 --folder out/evidence --write

Finished samples are kept in the folder, and a second call continues. `--write` puts the tables into
docs/results/evidence.md and the numbers into docs/results/evidence.json; with another prompt length (`--tokens 2048`),
into the section of that length and into docs/results/evidence-2048.json. The last line of the output is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from suffice.kv import policies
from suffice.kv.eval.compare import Comparison, compare
from suffice.kv.eval.run_options import RunOptions
from suffice.kv.eval.samples import load_cached
from suffice.kv.eval.tasks import python_manual
from suffice.kv.hf.loading import ModelSource

OUR_METHOD = "capkv-spread/profile"

LEFT_OUT = ("full", "random", "capkv-profile")  # the last one is another name of OUR_METHOD
FIRST_SEED = 1000
TOKENS = 900
PAGE = Path("docs/results/evidence.md")
END = "<!-- end -->"


def write_haystack(folder: Path, source: ModelSource) -> str:
    """Write Python's help texts without the part that a model's head profile is measured on; return the file's path."""
    _, tokenizer = load_cached(source)
    measured = tokenizer(python_manual(), add_special_tokens=False, verbose=False).input_ids[:700]
    path = folder / "haystack.txt"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(python_manual()[len(str(tokenizer.decode(measured))) :], encoding="utf-8")
    return str(path)


def select(comparison: Comparison, keep: Callable[[str, str], bool]) -> Comparison:
    """Return the part of a comparison whose (policy, allocation) satisfies a condition."""
    groups = [group for group in comparison.groups if keep(group.settings["policy"], group.settings["allocation"])]
    return Comparison(comparison.settings, groups)


def split_by_allocation(comparison: Comparison) -> dict[str, Comparison]:
    """Return two comparisons by title: policies with their own allocation, and with the same head profile."""

    def is_ours(policy: str, allocation: str) -> bool:
        return f"{policy}/{allocation}" == OUR_METHOD

    return {
        "Policies as published": select(
            comparison, lambda policy, allocation: allocation == "own" or is_ours(policy, allocation)
        ),
        "Policies with the same head profile": select(comparison, lambda policy, allocation: allocation == "profile"),
    }


def kl_table(comparison: Comparison, our_method: str = OUR_METHOD) -> list[str]:
    """Return the lines of a Markdown table of mean KL; a star marks a significant difference from our method."""
    differences = {
        (row["method"], row["task"], row["mode"], row["budget"]): row for row in comparison.differences(our_method)
    }
    columns = [f"{_task_text(each.task, each.mode)} {each.budget:.0%}" for each in comparison.conditions]
    lines = [f"| policy | {' | '.join(columns)} | mean rank |", "|---" * (len(columns) + 2) + "|"]
    for method, rank in comparison.mean_ranks().items():
        cells: list[str] = []
        for condition in comparison.conditions:
            row = differences.get((method, *condition[:3]))
            star = "*" if row and (row["low"] > 0 or row["high"] < 0) else ""
            cells.append(f"{comparison.group(method, condition).interval('kl').mean:.3f}{star}")
        lines.append(f"| {method} | {' | '.join(cells)} | {rank:.1f} |")
    return lines


def describe_losses(comparison: Comparison, our_method: str = OUR_METHOD) -> list[str]:
    """Return Markdown lines that list where another method is significantly closer than ours."""
    rows = comparison.closer_methods(our_method)
    if not rows:
        return [f"No other method is significantly closer than {our_method} under any condition (95 % intervals)."]
    return [
        f"* {row['method']} is closer at {_task_text(row['task'], row['mode'])} {row['budget']:.0%} by "
        f"{-row['mean']:.4f} [{-row['high']:.4f}, {-row['low']:.4f}]."
        for row in rows
    ]


def numbers(comparison: Comparison) -> dict[str, Any]:
    """Return the content of the JSON file."""
    as_published, same_profile = split_by_allocation(comparison).values()
    columns = ("method", "task", "mode", "budget", "mean", "low", "high")
    return {
        "samples_per_cell": comparison.settings["samples"],
        "best_policy": next(iter(as_published.mean_ranks())),
        "mean_rank": as_published.mean_ranks(),
        "mean_rank_same_allocation": same_profile.mean_ranks(),
        "significant_losses": {
            name: [{column: row[column] for column in columns} for row in part.closer_methods(OUR_METHOD)]
            for name, part in (("as published", as_published), ("with the same head profile", same_profile))
        },
        "capacity": comparison.capacity_correlations(),
        "settings": {name: value for name, value in comparison.settings.items() if name != "haystack"},
        "torch": torch.__version__,
    }


def markdown(comparison: Comparison) -> str:
    """Return both tables, the losses, and the correlations of capacity and KL."""
    lines: list[str] = []
    for title, part in split_by_allocation(comparison).items():
        best = next(iter(part.mean_ranks()))
        lines += [f"### {title}", "", *kl_table(part), "", f"Best mean rank: {best}.", "", *describe_losses(part), ""]
    correlations = [f"{row['spearman']:+.2f}" for row in comparison.capacity_correlations()]
    text = f"Spearman's correlation over caches, for each condition: {', '.join(correlations)}."
    return "\n".join([*lines, "### Capacity and fidelity", "", text, ""])


def write(text: str, content: dict[str, Any], length: str) -> None:
    """Write the tables into their section of the page, and the numbers into the JSON file.

    Args:
        text: the tables.
        content: the numbers.
        length: number of tokens per prompt; empty for the usual length.

    """
    start = f"<!-- written by benchmarks/evidence.py{f' --tokens {length}' if length else ''} -->"
    before, _, after = PAGE.read_text(encoding="utf-8").partition(start)
    PAGE.write_text(f"{before}{start}\n\n{text}\n{END}{after.partition(END)[2]}", encoding="utf-8")
    file = PAGE.with_name(f"evidence{f'-{length}' if length else ''}.json")
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _task_text(task: str, mode: str) -> str:
    return "text" if task == "text" else mode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument(
        "--policies", nargs="+", default=[name for name in policies(replay=False) if name not in LEFT_OUT]
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.25, 0.1])
    parser.add_argument("--folder", type=Path, default=Path("out/evidence"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the results into docs/")
    options = parser.parse_args()
    comparison = compare(
        policies=options.policies,
        allocations=("own", "profile"),
        budgets=options.budgets,
        tokens=options.tokens,
        samples=options.samples,
        seed=options.seed,
        haystack=write_haystack(options.folder, ModelSource(dtype=options.dtype)),
        answer=False,
        model=ModelSource(dtype=options.dtype),
        run=RunOptions(
            folder=options.folder,
            workers=options.workers,
            on_progress=lambda progress, line: print(line, flush=True) if line else None,
        ),
    )
    text = markdown(comparison)
    print(text)
    if options.write:
        write(text, numbers(comparison), "" if options.tokens == TOKENS else str(options.tokens))
    print(json.dumps(numbers(comparison)))


if __name__ == "__main__":
    main()
