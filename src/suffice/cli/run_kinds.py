"""The kinds of runs that a study can have, from the parts of the package whose libraries are installed."""

from __future__ import annotations

import importlib
import importlib.util

from suffice.study.run_kind import RunKind

_REQUIRED_LIBRARIES = {
    "suffice.kv.eval.run_kinds": "transformers",
    "suffice.link.study.run_kinds": "torch_geometric",
}


def installed_run_kinds() -> dict[str, RunKind]:
    """Return the kinds of runs by name."""
    kinds: dict[str, RunKind] = {}
    for module, library in _REQUIRED_LIBRARIES.items():
        if importlib.util.find_spec(library):
            kinds |= importlib.import_module(module).KINDS
    return kinds
