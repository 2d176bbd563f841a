"""Kinds of runs that a study can have: those of the halves whose libraries are installed."""

from __future__ import annotations

import importlib
import importlib.util

from suffice.study.run_kind import RunKind

_HOMES = {"suffice.kv.eval.run_kinds": "transformers", "suffice.link.study.run_kinds": "torch_geometric"}


def kinds() -> dict[str, RunKind]:
    """Return every kind by name."""
    found: dict[str, RunKind] = {}
    for home, needs in _HOMES.items():
        if importlib.util.find_spec(needs):
            found |= importlib.import_module(home).KINDS
    return found
