"""Write the page of supported families, docs/results/support.md, from the results of the tests.

SUFFICE_SUPPORT=out/support python -m pytest -m "" tests/kv/test_families.py
python -m tests.kv.support_page out/support
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from tests.kv.families import NOT_BUILDABLE, model_classes
from tests.kv.family_checks import BITS_TOLERANCES, DOES_NOT_APPLY, NOT_SUPPORTED, POLICIES, SUPPORTED, Answer
from tests.kv.family_status import FAST, NOT_RUNNABLE, difference_of, reason_of, refusal_of

PAGE = Path(__file__).parents[2] / "docs" / "results" / "support.md"
ALWAYS_NEEDED = ("construction", "full", "untouched", "padding", "window")


@dataclass(frozen=True)
class Column:
    """A column of the page.

    Args:
        check: the check whose result it shows.
        legend: what `yes` means.

    """

    check: str
    legend: str


COLUMNS = {
    "default": Column(
        "half",
        f"the default policy, `{POLICIES[0]}`, whose heads keep different numbers of entries: with half the budget, "
        "the number of entries is exact, and logits equal those of the model's own attention over the kept entries",
    ),
    "equal": Column("equal", f"the same with `{POLICIES[1]}`, whose heads keep equal numbers of entries"),
    "stream": Column(
        "always", '`evict="always"`: the same over chunks of a prompt and generated tokens, with both policies'
    ),
    "cross": Column(
        "cross",
        "`CrossAttentionCache`: with the full budget, tokens and logits equal those of the model's own cache; with "
        "half of it, half of the entries of the encoder are kept. – without a number: it has no encoder",
    ),
    "bits": Column(
        "bits",
        "`bits=8` with the full budget and both policies: compared with all bits, the logits of "
        + " and ".join(
            f"{share:.0%} of the tokens differ by at most {tolerance:.1%} of the largest logit"
            for share, tolerance in BITS_TOLERANCES.items()
        ),
    ),
    "replay": Column(
        "replay",
        "policies that [replay the prompt](../how-to/replay-the-prompt.md): with half the budget, the number of "
        "entries is exact, and later logits equal those of the model's own attention over the kept entries, with "
        "scores from attention (`kvzip`) and from gradients (`kvgrad`). part: with `kvzip` only",
    ),
    "repair": Column(
        "repair",
        "`repair=True` with both policies: the same entries are kept, the held-out error of no head increases, and "
        "with the full budget nothing changes",
    ),
    "flash": Column(
        "flash",
        "FlashAttention 2 with both policies: with the full budget, logits equal those of the model's own cache; with "
        "half the budget, logits and kept entries equal those with the model's own attention implementation, where "
        "its own cache gives the same logits with both. A stand-in in plain PyTorch replaces the FlashAttention "
        "package, so that no GPU is needed. – without a number: transformers does not offer FlashAttention for it",
    ),
}
Row = dict[str, Answer]  # by column


def row_of(family: str, results: dict[str, Any] | None) -> Row:
    """Return the row of a family from its results; None if it was not built.

    Raises:
        ValueError: the results are missing, or the reason for a refusal is not one that the page knows.

    """
    not_tested = NOT_BUILDABLE.get(family) or next(iter(NOT_RUNNABLE.get(family, ())), None)
    if not_tested is not None:
        return dict.fromkeys(COLUMNS, Answer(DOES_NOT_APPLY, f"not tested: {not_tested}"))
    if results is None:
        raise ValueError(f"the results must hold all families, {family} is missing")
    refusal = refusal_of(family)
    is_sound = refusal is not None or all(results[name]["status"] == "passed" for name in ALWAYS_NEEDED)
    row: Row = {}
    for name, column in COLUMNS.items():
        result = results[column.check]
        if is_sound and result["status"] == "passed":
            row[name] = _answer(family, column.check, result)
        elif (difference := difference_of(family, column.check)) and difference.support == DOES_NOT_APPLY:
            row[name] = Answer(DOES_NOT_APPLY, difference.reason)
        else:
            row[name] = Answer(NOT_SUPPORTED, "it does not work yet" if refusal is None else refusal.reason)
    return row


def _answer(family: str, check: str, result: dict[str, str]) -> Answer:
    """Return the answer of a check that has passed, with the reason in the words of the page."""
    reason = result["reason"]
    return Answer(result["support"], reason_of(family, check, reason) if reason else "")


def page(rows: dict[str, Row], version: str) -> str:
    """Return the text of the page."""
    reasons = Counter(answer.reason for row in rows.values() for answer in row.values() if answer.reason)
    numbers = {reason: number for number, (reason, _) in enumerate(reasons.most_common(), 1)}
    text = f"""# Supported model families

Which features of Suffice each family of transformers models supports, with transformers {version}. `make test-families`
builds a tiny random model of every family that transformers registers for generation, runs these checks, and writes
this page:

```sh
make test-families
```

* **yes**: the checks of the column below pass.
* **no**: refused with an error that says why. The number leads to [the reason](#reasons).
* **part**: a part is refused; the number leads to the reason.
* **–**: does not apply, or could not be tested here.

{_table(["column", "families", "what was checked"], _legend(rows))}
For a family with **yes** in the first column, more checks pass:

* With the full budget, tokens and logits equal those of the model's own cache.
* Rows of a padded batch equal single runs, where they do with the model's own cache.
* Layers that are not compressed hold the same state as in the model's own cache, and windows longer than the prompt
  change nothing.

The default is refused when the cache is made, and so are all columns that are checked with both policies. The checks
use text only, also for models that take images or audio. Families in bold are checked by every run of the tests.

## Families

"""
    lines: list[list[str]] = []
    for family, row in rows.items():
        name = f"**{family}**" if family in FAST else family
        cells = [answer.support + (f" [{numbers[answer.reason]}]" if answer.reason else "") for answer in row.values()]
        lines.append([name, model_classes()[family], *cells])
    text += _table(["family", "model class", *COLUMNS], lines)
    return text + "\n## Reasons\n\n" + "".join(f"* [{number}] {reason}\n" for reason, number in numbers.items())


def _legend(rows: dict[str, Row]) -> list[list[str]]:
    lines: list[list[str]] = []
    for name, column in COLUMNS.items():
        counts = Counter(row[name].support for row in rows.values())
        lines.append([f"**{name}**", f"{counts[SUPPORTED]} of {len(rows) - counts[DOES_NOT_APPLY]}", column.legend])
    return lines


def _table(header: list[str], lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ["---"] * len(header), *lines)).replace(
        f"| {' | '.join(['---'] * len(header))} |", "|" + "---|" * len(header)
    )


def read_rows() -> dict[str, Row]:
    """Return the rows of the page as it is."""
    reasons = dict(re.findall(r"^\* \[(\d+)\] (.*)$", _text(), flags=re.MULTILINE))
    cell = r" \| (\S+(?: \[\d+\])?)" * len(COLUMNS)
    rows: dict[str, Row] = {}
    for family, *cells in re.findall(rf"^\| \**([\w.-]+?)\** \| \w+{cell} \|$", _text(), flags=re.MULTILINE):
        parts = [found.rstrip("]").partition(" [") for found in cells]
        answers = [Answer(support, reasons[number] if number else "") for support, _, number in parts]
        rows[family] = dict(zip(COLUMNS, answers, strict=True))
    return rows


def _text() -> str:
    return PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""


VERSION = next(iter(re.findall(r"with transformers ([\d.]+\d)", _text())), "")
"""The version of transformers that the page was made with."""


def main(folder: str) -> None:
    """Write the page from the results in a folder, one file for each family."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in Path(folder).glob("*.json")}
    rows = {family: row_of(family, results.get(family)) for family in sorted(model_classes())}
    PAGE.write_text(page(rows, transformers.__version__), encoding="utf-8")
    for name in COLUMNS:
        print(f"{name}: {dict(Counter(row[name].support for row in rows.values()))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
