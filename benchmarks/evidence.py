"""Which policy stays closest to the full cache: every policy as published, and every policy with the same head profile.

Text: the words that follow a document. Questions: four six-digit codes planted in real English, one asked, after
eviction (agnostic) or before it (aware). KL divergence from the full cache's next-token distribution in nats a token,
on the true continuation or answer. All caches of a sample share one prefill, so differences are paired. The text that
the head profile was measured on is left out, and the seeds are none that a policy was designed on.

    python benchmarks/evidence.py --samples 8                  # the short form, `make evidence`
    python benchmarks/evidence.py --samples 40 --folder out/evidence --write

It keeps every finished sample in its folder and goes on from there. `--write` puts the tables into docs/evidence.md and
the numbers into docs/evidence.json; for prompts of another length (`--tokens 2048`) into that length's part of the
page, and into docs/evidence-2048.json. The last line printed is one JSON object.
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
from suffice.kv.eval.runs import loaded
from suffice.kv.eval.tasks import manual

OURS = "capkv-spread/profile"

LEFT_OUT = ("full", "random", "capkv-profile")  # the last one is OURS by its short name
FIRST_SEED = 1000
TOKENS = 900
PAGE = Path("docs/evidence.md")
END = "<!-- end -->"


def haystack(folder: Path, dtype: str) -> str:
    """Write Python's manual without what the head profile was measured on, and return where."""
    _, tokenizer = loaded(None, "cpu", dtype, "sdpa")
    read = tokenizer(manual(), add_special_tokens=False, verbose=False).input_ids[:700]
    place = folder / "haystack.txt"
    folder.mkdir(parents=True, exist_ok=True)
    place.write_text(manual()[len(str(tokenizer.decode(read))) :], encoding="utf-8")
    return str(place)


def part(found: Comparison, kept: Callable[[str, str], bool]) -> Comparison:
    """Return the comparison of some contestants alone."""
    groups = [one for one in found.groups if kept(one.settings["policy"], one.settings["allocation"])]
    return Comparison(found.settings, groups)


def views(found: Comparison) -> dict[str, Comparison]:
    """Return the two tables: rivals as published, and rivals with the same head profile."""

    def ours(policy: str, allocation: str) -> bool:
        return f"{policy}/{allocation}" == OURS

    return {
        "as published": part(found, lambda policy, allocation: allocation == "own" or ours(policy, allocation)),
        "with the same head profile": part(found, lambda policy, allocation: allocation == "profile"),
    }


def table(found: Comparison, ours: str = OURS) -> list[str]:
    """Return a table in Markdown: mean KL, a star where it differs from ours."""
    against = {(row["of"], row["task"], row["mode"], row["budget"]): row for row in found.against(ours)}
    columns = [f"{'text' if task == 'text' else mode} {budget:.0%}" for task, mode, budget in found.cells]
    lines = [f"| policy | {' | '.join(columns)} | mean rank |", "|---" * (len(columns) + 2) + "|"]
    for name, rank in found.ranks().items():
        cells: list[str] = []
        for cell in found.cells:
            row = against.get((name, *cell))
            star = "*" if row and (row["low"] > 0 or row["high"] < 0) else ""
            cells.append(f"{found.find(name, cell).interval('kl').mean:.3f}{star}")
        lines.append(f"| {name} | {' | '.join(cells)} | {rank:.1f} |")
    return lines


def losses(found: Comparison, ours: str = OURS) -> list[str]:
    """Say in words where ours is beaten."""
    rows = found.losses(ours)
    if not rows:
        return [f"No rival is closer than {ours} in any cell, as far as intervals of 95 % tell."]
    return [
        f"* {row['of']} is closer at {'text' if row['task'] == 'text' else row['mode']} {row['budget']:.0%} by "
        f"{-row['mean']:.4f} [{-row['high']:.4f}, {-row['low']:.4f}]."
        for row in rows
    ]


def facts(found: Comparison) -> dict[str, Any]:
    """Return what the last line tells."""
    tables = views(found)
    return {
        "samples_per_cell": found.settings["samples"],
        "best_policy": next(iter(tables["as published"].ranks())),
        "mean_rank": tables["as published"].ranks(),
        "mean_rank_same_allocation": tables["with the same head profile"].ranks(),
        "significant_losses": {
            name: [
                {key: row[key] for key in ("of", "task", "mode", "budget", "mean", "low", "high")}
                for row in view.losses(OURS)
            ]
            for name, view in tables.items()
        },
        "capacity": found.capacity(),
        "settings": {key: value for key, value in found.settings.items() if key != "haystack"},
        "torch": torch.__version__,
    }


def markdown(found: Comparison) -> str:
    """Return both tables and what follows from them."""
    lines: list[str] = []
    for name, view in views(found).items():
        best = next(iter(view.ranks()))
        lines += [f"### Rivals {name}", "", *table(view), "", f"Best mean rank: {best}.", "", *losses(view), ""]
    rhos = [f"{row['spearman']:+.2f}" for row in found.capacity()]
    lines += ["### Capacity and fidelity", "", f"Spearman over caches, cell by cell: {', '.join(rhos)}.", ""]
    return "\n".join(lines)


def write(said: str, numbers: dict[str, Any], length: str) -> None:
    """Put tables into their part of the page and numbers beside it; the length is named where it is not the usual."""
    start = f"<!-- written by benchmarks/evidence.py{f' --tokens {length}' if length else ''} -->"
    before, _, after = PAGE.read_text(encoding="utf-8").partition(start)
    PAGE.write_text(f"{before}{start}\n\n{said}\n{END}{after.partition(END)[2]}", encoding="utf-8")
    file = PAGE.with_name(f"evidence{f'-{length}' if length else ''}.json")
    file.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--policies", nargs="+", default=[name for name in policies() if name not in LEFT_OUT])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.25, 0.1])
    parser.add_argument("--folder", type=Path, default=Path("out/evidence"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="into docs/")
    options = parser.parse_args()
    found = compare(
        policies=options.policies,
        allocations=("own", "profile"),
        budgets=options.budgets,
        tokens=options.tokens,
        samples=options.samples,
        seed=options.seed,
        haystack=haystack(options.folder, options.dtype),
        answer=False,
        dtype=options.dtype,
        folder=options.folder,
        workers=options.workers,
        watch=lambda progress, line: print(line, flush=True) if line else None,
    )
    said = markdown(found)
    print(said)
    if options.write:
        write(said, facts(found), "" if options.tokens == TOKENS else str(options.tokens))
    print(json.dumps(facts(found)))


if __name__ == "__main__":
    main()
