"""Does the promise of `tune` hold? Tune on some prompts, and measure the recommended cache on others.

Three sets of prompts are made locally: a text from Python's help pages (no question), a text with four codes of which
one is asked (evicted before the question is seen), and made-up biographies with a question about one person. Every
cache is measured once on every prompt of a set, by `tune` itself. Each repetition then draws the prompts to tune on and
fresh ones without overlap, and decides with the function that `tune` uses.

    python benchmarks/tune_coverage.py --folder out/tune-coverage            # about 20 minutes on one core
    python benchmarks/tune_coverage.py --folder out/tune-coverage --write

Finished prompts are kept in the folder, and a second call continues. `--write` puts the tables into
docs/results/tune-coverage.md and the numbers into docs/results/tune-coverage.json. The last line of the output is one
JSON object.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from evidence import write_haystack
from suffice.kv.eval.run_options import RunOptions
from suffice.kv.eval.samples import load_cached
from suffice.kv.eval.tasks import make_example
from suffice.kv.eval.tune import tune
from suffice.kv.eval.user_prompts import UserPrompt
from suffice.kv.hf.loading import ModelSource
from suffice.study.results import Group, group_records
from suffice.study.store import Store

FIRST_SEED = 5000
TOKENS = 400
SETS = {
    "text": ("text", "aware"),
    "codes": ("multikey", "agnostic"),
    "biographies": ("qa", "aware"),
}
MEMORY = [0.12, 0.08, 0.05, 0.03]


def make_prompts(name: str, count: int, folder: Path) -> list[UserPrompt]:
    """Make the prompts of a set."""
    source = ModelSource()
    _, tokenizer = load_cached(source)
    task, _ = SETS[name]
    options = {} if task == "qa" else {"haystack": Path(write_haystack(folder, source)).read_text(encoding="utf-8")}
    examples = [make_example(task, tokenizer, tokens=TOKENS, seed=FIRST_SEED + i, **options) for i in range(count)]
    return [UserPrompt(example.document, example.question) for example in examples]


def measure(name: str, options: argparse.Namespace) -> list[Group]:
    """Measure every cache on every prompt of a set, and return the values by cache and prompt."""
    folder = options.folder / name
    tune(
        make_prompts(name, options.prompts, options.folder),
        target_kl=1.0,
        policies=["capkv-salience"],
        allocations=["own"],
        memory=MEMORY,
        repair=[False, True],
        mode=SETS[name][1],
        max_new_tokens=8,
        model=ModelSource(),
        run=RunOptions(folder, on_progress=lambda progress, line: print(line, flush=True) if line else None),
    )
    with Store(folder, read_only=True) as store:
        return group_records(store.records(store.study_name()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40, help="prompts of each set")
    parser.add_argument("--folder", type=Path, default=Path("out/tune-coverage"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in SETS:
        measure(name, options)


if __name__ == "__main__":
    main()
