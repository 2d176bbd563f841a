"""Write the page of supported families, docs/results/support.md, from the results of the tests.

SUFFICE_SUPPORT=out/support python -m pytest -m "" tests/kv/test_families.py
python -m tests.kv.support_page out/support
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from tests.kv.families import NOT_BUILDABLE, model_classes
from tests.kv.family_status import FAST, KNOWN_FAILURES, NOT_RUNNABLE, refusal_of

PAGE = Path(__file__).parents[2] / "docs" / "results" / "support.md"
COLUMNS = {"default": "half", "equal_heads": "equal", "streaming": "always"}  # the check of each column
ALWAYS_NEEDED = ("construction", "full", "untouched", "padding", "window")


@dataclass(frozen=True)
class Row:
    """What the page says of a family."""

    default: str
    equal_heads: str
    streaming: str
    notes: str = ""


def row_of(family: str, results: dict[str, Any] | None) -> Row:
    """Return the row of a family from its results; None if it was not built."""
    if family in NOT_BUILDABLE:
        return Row("–", "–", "–", f"not tested: {NOT_BUILDABLE[family]}")
    if family in NOT_RUNNABLE:
        return Row("–", "–", "–", f"not tested: {NOT_RUNNABLE[family][0]}")
    if results is None:
        raise ValueError(f"the results must hold all families, {family} is missing")
    is_sound = all(results[name]["status"] == "passed" for name in ALWAYS_NEEDED)
    cells = {}
    for column, check in COLUMNS.items():
        passed = results[check]["status"] == "passed" and (is_sound or refusal_of(family) is not None)
        cells[column] = "yes" if passed else "no"
    refusal = refusal_of(family)
    notes = refusal.reason if refusal is not None else "does not work yet" if family in KNOWN_FAILURES else ""
    return Row(**cells, notes=notes)


def page(rows: dict[str, Row], version: str) -> str:
    """Return the text of the page."""
    supported = [family for family, row in rows.items() if row.default == "yes"]
    text = f"""# Supported model families

Which families of transformers models a `CompressedCache` supports, with transformers {version}. `make test-families`
builds a tiny random model of every family that transformers registers for generation, runs these checks, and writes
this page:

```sh
make test-families
```

* With the full budget, tokens and logits equal those of the model's own cache.
* With half the budget, the number of entries is exact, and logits equal those of the model's own attention over the
  kept entries. **default** is the policy `capkv-salience`, whose heads keep different numbers of entries, **equal
  heads** is `capkv`, and **streaming** is `evict="always"` with both, over chunks of a prompt and generated tokens.
* Rows of a padded batch equal single runs, where they do with the model's own cache.
* Layers that are not compressed hold the same state as in the model's own cache, and windows longer than the prompt
  change nothing.

A family that is not supported is refused when the cache is made, with an error that gives the reason in the last
column. The checks use text only, also for models that take images or audio.

The default is supported for {len(supported)} of {len(rows)} families.

| family | model class | default | equal heads | streaming | notes |
|---|---|---|---|---|---|
"""
    for family, row in rows.items():
        name = f"**{family}**" if family in FAST else family
        text += f"| {name} | {model_classes()[family]} | {row.default} | {row.equal_heads} | {row.streaming} "
        text += f"| {row.notes} |\n"
    return text + "\nFamilies in bold are checked by every run of the tests.\n"


def read_rows() -> dict[str, Row]:
    """Return the rows of the page as it is."""
    found = re.findall(
        r"^\| \**([\w.-]+?)\** \| \w+ \| (\S+) \| (\S+) \| (\S+) \| (.*) \|$", _text(), flags=re.MULTILINE
    )
    return {family: Row(*cells) for family, *cells in found}


def _text() -> str:
    return PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""


VERSION = next(iter(re.findall(r"with transformers ([\d.]+\d)", _text())), "")
"""The version of transformers that the page was made with."""


def main(folder: str) -> None:
    """Write the page from the results in a folder, one file for each family."""
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in Path(folder).glob("*.json")}
    rows = {family: row_of(family, results.get(family)) for family in sorted(model_classes())}
    PAGE.write_text(page(rows, transformers.__version__), encoding="utf-8")
    counts = {value: sum(row.default == value for row in rows.values()) for value in ("yes", "no", "–")}
    print(f"{PAGE}: {counts}")


if __name__ == "__main__":
    main(*sys.argv[1:])
