"""Link prediction on graphs: audit a model for composition bias, correct it, and measure what it keeps.

The public names are listed in one table, `__init__.pyi`, where type checkers and editors find them too. They are
imported on first use, because PyTorch Geometric takes seconds to import.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any


def _read_exports() -> dict[str, str]:
    """Return the module of each public name, from the `from module import name` lines of the stub file."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module for node in imports if node.module for alias in node.names}


_EXPORTS = _read_exports()
__all__ = list(_EXPORTS)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_EXPORTS)
