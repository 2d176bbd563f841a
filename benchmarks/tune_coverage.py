"""Does the promise of `tune` hold? Tune on some prompts, and measure the recommended cache on others.

Three sets of prompts are made locally: a text from Python's help pages (no question), a text with four codes of which
one is asked (evicted before the question is seen), and made-up biographies with a question about one person. A fourth
set is the union of them. Every cache is measured once on every prompt of a set, by `tune` itself. Samples are then
drawn from these numbers, and the function of `tune` decides.

* Fresh prompts: each repetition draws prompts to tune on and fresh ones, without overlap, for targets that a user might
  choose. The promise holds if the mean KL of the recommended cache on the fresh prompts is within the target. The bytes
  of a cache are those of everything that it holds, as `tune` and `compare` count them, as a share of the keys and
  values of the full cache.
* Hardest targets: the measured prompts are taken as the whole population, so that the mean is known, and prompts to
  tune on are drawn with replacement. The target is 2 % below the mean of one of the caches. The promise holds if no
  cache with a larger mean is recommended.

    python benchmarks/tune_coverage.py --folder out/tune-coverage            # about 20 minutes on one core
    python benchmarks/tune_coverage.py --folder out/tune-coverage --stored --write

Finished prompts are kept in the folder, and a second call continues. `--stored` measures nothing and uses the prompts
that are finished. `--write` puts the tables into docs/results/tune-coverage.md and the numbers into
docs/results/tune-coverage.json. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from scipy.stats import beta

from evidence import write_haystack
from machine import machine
from suffice.kv.eval.run_options import RunOptions
from suffice.kv.eval.samples import load_cached
from suffice.kv.eval.tasks import make_example
from suffice.kv.eval.tune import Trial, TuningResult, make_trials, tune
from suffice.kv.eval.user_prompts import UserPrompt
from suffice.kv.hf.loading import ModelSource
from suffice.study.results import Group, group_records, mean_bound
from suffice.study.store import Store

FIRST_SEED = 5000
TOKENS = 400
SETS = {"text": ("text", "aware"), "codes": ("multikey", "agnostic"), "biographies": ("qa", "aware")}
ALL = "all three"
MEMORY = [0.12, 0.08, 0.05, 0.03]
TARGETS = [0.02, 0.05, 0.1]
CONFIDENCE = 0.95
MIN_FRESH = 8  # number of fresh prompts
METRICS = ("kl", "bytes", "bytes_kept")
BOUND = "suffice.kv.eval.tune.skewed_mean_bound"
PAGE = Path("docs/results/tune-coverage.md")
START, END = "<!-- written by benchmarks/tune_coverage.py -->", "<!-- end -->"


def make_prompts(name: str, count: int, folder: Path) -> list[UserPrompt]:
    """Make the prompts of a set."""
    source = ModelSource()
    _, tokenizer = load_cached(source)
    task, _ = SETS[name]
    options = {} if task == "qa" else {"haystack": Path(write_haystack(folder, source)).read_text(encoding="utf-8")}
    examples = [make_example(task, tokenizer, tokens=TOKENS, seed=FIRST_SEED + i, **options) for i in range(count)]
    return [UserPrompt(example.document, example.question) for example in examples]


def measure(name: str, options: argparse.Namespace) -> None:
    """Measure every cache on every prompt of a set."""
    tune(
        make_prompts(name, options.prompts, options.folder),
        target_kl=1.0,
        policies=["capkv-salience"],
        memory=MEMORY,
        repair=[False, True],
        mode=SETS[name][1],
        max_new_tokens=8,
        run=RunOptions(options.folder / name, on_progress=lambda _, line: print(line, flush=True) if line else None),
    )


def read(name: str, folder: Path) -> list[Group]:
    """Return the values of each cache of a set, by prompt."""
    with Store(folder / name, read_only=True) as store:
        return group_records(store.records(store.study_name()))


def united(sets: Sequence[Sequence[Group]]) -> list[Group]:
    """Return the union of sets that have the same caches."""
    return [
        Group(
            same[0].settings,
            {
                metric: dict(enumerate(value for group in same for value in group.values[metric].values()))
                for metric in METRICS
            },
        )
        for same in zip(*sets, strict=True)
    ]


def drawn(groups: Sequence[Group], prompts: Sequence[int]) -> list[Group]:
    """Return the values of some prompts, of which one may occur several times."""
    return [
        Group(
            group.settings,
            {metric: {i: group.values[metric][p] for i, p in enumerate(prompts)} for metric in METRICS},
        )
        for group in groups
    ]


def recommend(groups: Sequence[Group], target: float) -> Trial | None:
    """Return what `tune` recommends for these values."""
    trials = make_trials(groups, "kl", target, CONFIDENCE)
    return TuningResult("kl", target, CONFIDENCE, len(groups[0].values["kl"]), trials, {}).best


def mean_of(trial: Trial, groups: Sequence[Group]) -> float:
    """Return the mean KL of the cache of a trial."""
    (group,) = [
        group
        for group in groups
        if (group.settings["policy"], group.settings.get("memory"), group.settings.get("repair", False))
        == (trial.policy, trial.memory, trial.repair)
    ]
    return statistics.fmean(group.values["kl"].values())


def without_repair(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if not group.settings.get("repair")]


def fresh_prompts(groups: Sequence[Group], size: int, repetitions: int, target: float, seed: int) -> dict[str, Any]:
    """Tune on `size` prompts and measure the recommended cache on all others."""
    generator = random.Random(f"fresh {size} {target} {seed}")
    prompts = sorted(groups[0].values["kl"])
    full_bytes = statistics.fmean(groups[0].values["bytes_kept"].values())
    holds, shares, plain_shares = [], [], []
    for _ in range(repetitions):
        order = generator.sample(prompts, len(prompts))
        tuning, fresh = drawn(groups, order[:size]), drawn(groups, order[size:])
        best = recommend(tuning, target)
        holds.append(best is None or mean_of(best, fresh) <= target)
        shares.append(1.0 if best is None else best.bytes / full_bytes)
        plain = recommend(without_repair(tuning), target)
        plain_shares.append(1.0 if plain is None else plain.bytes / full_bytes)
    return {
        "held": sum(holds),
        "of": len(holds),
        "bytes": statistics.fmean(shares),
        "bytes_without_repair": statistics.fmean(plain_shares),
        "not_recommended": sum(share == 1.0 for share in shares),
    }


def hardest_targets(groups: Sequence[Group], size: int, repetitions: int, seed: int) -> dict[str, Any]:
    """Tune with targets 2 % below the mean of each cache, on prompts that are drawn with replacement."""
    generator = random.Random(f"hardest {size} {seed}")
    prompts = sorted(groups[0].values["kl"])
    rates: list[float] = []
    held = 0
    for group in groups[1:]:
        target = 0.98 * statistics.fmean(group.values["kl"].values())
        own = 0
        for _ in range(repetitions):
            best = recommend(drawn(groups, generator.choices(prompts, k=size)), target)
            own += best is None or mean_of(best, groups) <= target
        rates.append(own / repetitions)
        held += own
    return {"held": held, "of": repetitions * len(rates), "lowest": min(rates)}


def with_both_bounds(compute: Callable[[], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Compute a result with Student's bound and with the bound that `tune` uses."""
    with mock.patch(BOUND, mean_bound):
        student = compute()
    return {"student": student, "tune": compute()}


def analyse(sets: dict[str, list[Group]], options: argparse.Namespace) -> dict[str, Any]:
    """Return the content of the JSON file."""
    rows: list[dict[str, Any]] = []
    hardest: list[dict[str, Any]] = []
    for name, groups in sets.items():
        for size in options.sizes:
            has_fresh = len(groups[0].values["kl"]) - size >= MIN_FRESH
            for target in TARGETS if has_fresh else ():
                found = with_both_bounds(
                    lambda g=groups, n=size, t=target: fresh_prompts(g, n, options.repetitions, t, options.seed)
                )
                rows.append({"set": name, "size": size, "target": target, **found})
            found = with_both_bounds(lambda g=groups, n=size: hardest_targets(g, n, options.draws, options.seed))
            hardest.append({"set": name, "size": size, **found})
    return {
        "confidence": CONFIDENCE,
        "seed": options.seed,
        "first_prompt_seed": FIRST_SEED,
        "tokens": TOKENS,
        "memory": MEMORY,
        "prompts": {name: len(groups[0].values["kl"]) for name, groups in sets.items()},
        "machine": machine(),
        "fresh": rows,
        "hardest": hardest,
    }


def clopper_pearson(held: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact two-sided interval of a share."""
    tail = (1 - confidence) / 2
    low = 0.0 if held == 0 else float(beta.ppf(tail, held, of - held + 1))
    high = 1.0 if held == of else float(beta.ppf(1 - tail, held + 1, of - held))
    return low, high


def coverage_text(found: dict[str, Any]) -> str:
    low, high = clopper_pearson(found["held"], found["of"])
    return f"{found['held']}/{found['of']} [{low:.2f}, {high:.2f}]"


def markdown(content: dict[str, Any]) -> str:
    """Return the tables."""
    counts = ", ".join(f"{count} of {name}" for name, count in content["prompts"].items())
    lines = [f"Measured prompts: {counts}. Seed of the draws: {content['seed']}. {content['machine']}.", ""]
    lines += ["### Fresh prompts", ""]
    lines += ["| set | tuned on | target | held, Student's t | held, `tune` | bytes, Student's t | bytes, `tune` |"]
    lines += ["|---" * 7 + "|"]
    for row in content["fresh"]:
        shares = [
            f"{row[bound]['bytes']:.1%} ({row[bound]['bytes_without_repair']:.1%})" for bound in ("student", "tune")
        ]
        held = [coverage_text(row[bound]) for bound in ("student", "tune")]
        lines.append(f"| {row['set']} | {row['size']} | {row['target']} | {' | '.join(held)} | {' | '.join(shares)} |")
    lines += ["", "### Hardest targets", ""]
    lines += ["| set | tuned on | held, Student's t | worst target | held, `tune` | worst target |", "|---" * 6 + "|"]
    for row in content["hardest"]:
        cells = [
            f"{row[bound]['held'] / row[bound]['of']:.3f} | {row[bound]['lowest']:.3f}" for bound in ("student", "tune")
        ]
        lines.append(f"| {row['set']} | {row['size']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def write(text: str, content: dict[str, Any]) -> None:
    """Write the tables into their section of the page, and the numbers into the JSON file."""
    before, _, after = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(f"{before}{START}\n\n{text}\n{END}{after.partition(END)[2]}", encoding="utf-8")
    PAGE.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS), help="sets to measure")
    parser.add_argument("--prompts", type=int, default=40, help="prompts of each set")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 20], help="numbers of prompts to tune on")
    parser.add_argument("--repetitions", type=int, default=20, help="repetitions with fresh prompts")
    parser.add_argument("--draws", type=int, default=200, help="draws for each of the hardest targets")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws")
    parser.add_argument("--folder", type=Path, default=Path("out/tune-coverage"))
    parser.add_argument("--stored", action="store_true", help="use the finished prompts, and measure none")
    parser.add_argument("--write", action="store_true", help="write the results into docs/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.stored:
        for name in options.sets:
            measure(name, options)
    sets = {name: read(name, options.folder) for name in options.sets}
    if len(sets) > 1:
        sets[ALL] = united(list(sets.values()))
    content = analyse(sets, options)
    text = markdown(content)
    print(text)
    if options.write:
        write(text, content)
    print(json.dumps(content))


if __name__ == "__main__":
    main()
