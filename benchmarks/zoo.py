"""The zoo: decoders and batches of public code bases, trained as they train, audited, and compared with expectations.

    python benchmarks/zoo.py --folder runs [--entries NAMES] [--seeds 3] [--write]

Each entry of `zoo_entries.py` is written in the words of this project after its code base was read. It is trained on a
small graph, audited, and then trained and audited again with each correction. A second call with the same folder
resumes. `--write` puts the tables into docs/results/zoo.md and the numbers into docs/results/zoo.json. The last line of
the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest

from machine import machine
from suffice.study.results import mean_interval
from zoo_entries import ENTRIES, UNAFFECTED
from zoo_training import Entry, run

PAGE, NUMBERS = Path("docs/results/zoo.md"), Path("docs/results/zoo.json")
START, END = "<!-- written by benchmarks/zoo.py -->", "<!-- end -->"
CORRECTIONS = {"layer": "LayerNorm", "random": "random fractions, balanced loss"}
ALARMS = ("affected", "dominated")
Results = dict[tuple[str, str], list[dict[str, Any]]]


def arms(entry: Entry) -> list[str]:
    """Return the ways to train an entry; where nothing couples a batch, there is nothing to correct."""
    return ["published"] if entry.expected == UNAFFECTED else ["published", *CORRECTIONS]


def result_file(folder: Path, entry: Entry, arm: str, seed: int) -> Path:
    return folder / f"{re.sub('[^a-z0-9]+', '-', entry.name.lower())}-{arm}-{seed}.json"


def measure(folder: Path, entries: Sequence[Entry], chosen_arms: Sequence[str], seeds: int) -> None:
    """Train and audit everything that the folder does not contain; all seeds of the published way come first."""
    folder.mkdir(parents=True, exist_ok=True)
    for arm in chosen_arms:
        for seed in range(seeds):
            for entry in entries:
                file = result_file(folder, entry, arm, seed)
                if arm not in arms(entry) or file.is_file():
                    continue
                result = run(entry, arm, seed)
                file.write_text(json.dumps(result), encoding="utf-8")
                heldout = result["statistics"]["heldout"]
                print(
                    f"{entry.name}, {arm}, seed {seed}: {result['level']}, A_pure {heldout['a_pure']:.2f} of "
                    f"{heldout['accuracy_balanced']:.2f}, κ {heldout['kappa']:.2f}, AUC {heldout['auc_eval']:.2f}, "
                    f"{result['seconds']}",
                    flush=True,
                )


def collect(folder: Path, seeds: int) -> Results:
    """Return the finished results of each entry and arm; those of the published way only if all seeds are finished."""
    found: Results = {}
    for entry in ENTRIES:
        for arm in arms(entry):
            files = [result_file(folder, entry, arm, seed) for seed in range(seeds)]
            finished = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
            if len(finished) == seeds or (finished and arm != "published"):
                found[entry.name, arm] = finished
    return found


def number(value: float) -> str:
    """Return two decimals without the leading zero."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.2f}").replace("-.00", ".00")


def interval(results: Sequence[dict[str, Any]], name: str) -> str:
    """Return mean and Student's t interval of a statistic of the held-out edges."""
    found = mean_interval([result["statistics"]["heldout"][name] for result in results])
    if not found.has_bounds:
        return number(found.mean)
    return f"{number(found.mean)} [{number(found.low)}, {number(found.high)}]"


def levels(results: Sequence[dict[str, Any]]) -> str:
    """Return the verdicts, with how often each was given if they differ."""
    counts = Counter(result["level"] for result in results)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{level} ({n})" for level, n in counts.most_common())


def main_table(found: Results) -> Iterator[str]:
    yield "| code base | coupling | batches | A_pure (balanced) | τ | κ | verdict | expected |"
    yield "|---|---|---|---|---|---|---|---|"
    for entry in ENTRIES:
        if (entry.name, "published") not in found:
            continue
        results = found[entry.name, "published"]
        balanced = mean_interval([result["statistics"]["heldout"]["accuracy_balanced"] for result in results]).mean
        coupling = "none" if entry.expected == UNAFFECTED else "BatchNorm"
        batches = "one, all pairs" if entry.layout == "full" else f"{entry.layout}, {entry.batch_size:,}"
        yield (
            f"| {entry.name} | {coupling} | {batches} | {interval(results, 'a_pure')} ({number(balanced)}) | "
            f"{interval(results, 'tau')} | {interval(results, 'kappa')} | {levels(results)} | "
            f"{' or '.join(entry.expected)} |"
        )


def correction_table(found: Results) -> Iterator[str]:
    yield "| code base | verdict | " + " | ".join(f"with {name}" for name in CORRECTIONS.values()) + " | AUC |"
    yield "|---|" + "---|" * (len(CORRECTIONS) + 2)
    for entry in ENTRIES:
        keys = [(entry.name, arm) for arm in arms(entry)]
        if len(keys) == 1 or not all(key in found for key in keys):
            continue
        most = max(len(found[key]) for key in keys)
        cells = [
            f"{levels(found[key])}, {number(mean_of(found[key], 'a_pure'))}"
            + (f" ({len(found[key])} of {most} seeds)" if len(found[key]) < most else "")
            for key in keys
        ]
        aucs = " → ".join(number(mean_of(found[key], "auc_eval")) for key in keys)
        yield f"| {entry.name} | " + " | ".join(cells) + f" | {aucs} |"


def mean_of(results: Sequence[dict[str, Any]], name: str) -> float:
    return mean_interval([result["statistics"]["heldout"][name] for result in results]).mean


def rate(hits: int, count: int) -> dict[str, Any]:
    """Return a rate with its Clopper-Pearson interval."""
    bounds = binomtest(hits, count).proportion_ci(0.95, "exact")
    return {"hits": hits, "count": count, "low": float(bounds.low), "high": float(bounds.high)}


def rates(found: Results) -> dict[str, dict[str, Any]]:
    """Return how often verdicts were wrong, over entries and seeds of the published way to train."""
    controls, coupled = [], []
    for entry in ENTRIES:
        verdicts = [result["level"] for result in found.get((entry.name, "published"), [])]
        (controls if entry.expected == UNAFFECTED else coupled).append((entry, verdicts))
    of_controls = [level for _, verdicts in controls for level in verdicts]
    of_coupled = [level for _, verdicts in coupled for level in verdicts]
    as_expected = [level in entry.expected for entry, verdicts in controls + coupled for level in verdicts]
    counts = {
        "false_alarms": (sum(level in ALARMS for level in of_controls), len(of_controls)),
        "misses": (sum(level not in ALARMS for level in of_coupled), len(of_coupled)),
        "not_as_expected": (as_expected.count(False), len(as_expected)),
    }
    return {name: rate(*value) for name, value in counts.items() if value[1]}


def rate_sentences(found: Results) -> Iterator[str]:
    texts = {
        "false_alarms": "False alarms among entries without a coupling",
        "misses": "Misses among entries with one (neither affected nor dominated)",
        "not_as_expected": "Verdicts other than the expected ones, of all entries",
    }
    for name, value in rates(found).items():
        hits, count, low, high = value.values()
        percent = f"{100 * hits / count:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"
        yield f"* {texts[name]}: {hits} of {count} audits, {percent}."


def entry_list() -> Iterator[str]:
    for entry in ENTRIES:
        yield f"* **{entry.name}** (`{entry.repository}`)"
        yield f"    * Read: {entry.source}."
        yield f"    * Coupling: {entry.coupling}."
        yield f"    * Training batches: {entry.batches}."
        yield f"    * Expected: {' or '.join(entry.expected)}, because {entry.why}."


def page_part(found: Results, seeds: int) -> str:
    """Return the generated part of the page."""
    parts = [
        "\n".join(rate_sentences(found)),
        "## Verdicts",
        "Training batches: positives and negatives shuffled together, paired (equally many of both in every batch), or "
        "in separate passes; with the number of examples in a pass.",
        "\n".join(main_table(found)),
        "## After a correction",
        "Each cell has the verdict and A_pure. The last column has the AUC in eval mode: without a correction, with "
        "LayerNorm, and with random fractions.",
        "\n".join(correction_table(found)),
        "## What was read",
        "\n".join(entry_list()),
        f"Seeds 0 to {seeds - 1}; {machine()}.",
    ]
    return "\n\n".join(parts)


def write(found: Results, seeds: int) -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n\n{page_part(found, seeds)}\n\n{END}{after}", encoding="utf-8")
    rows = [result for results in found.values() for result in results]
    numbers = {"machine": machine(), "seeds": seeds, "rates": rates(found), "runs": rows}
    NUMBERS.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("zoo"), help="folder of finished runs")
    parser.add_argument("--entries", help="names of entries, separated by semicolons; all by default")
    parser.add_argument("--arms", default="published,layer,random", help="ways to train, separated by commas")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--write", action="store_true", help="write the page and the numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [entry.name for entry in ENTRIES]
    chosen = options.entries.split(";") if options.entries else names
    if unknown := set(chosen) - set(names):
        parser.error(f"--entries must be among {'; '.join(names)}, got {'; '.join(sorted(unknown))}")
    entries = [entry for entry in ENTRIES if entry.name in chosen]
    measure(options.folder, entries, options.arms.split(","), options.seeds)
    found = collect(options.folder, options.seeds)
    if options.write:
        write(found, options.seeds)
    print(json.dumps(rates(found)))


if __name__ == "__main__":
    main()
