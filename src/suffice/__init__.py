"""Suffice answers what information a model keeps.

`suffice.kv` keeps the most information of a transformer's KV cache in the fewest bytes. `suffice.link` audits link
predictors on graphs for a bias by the composition of mini-batches, and corrects it. Both are built on
`suffice.information` (log-determinants and leverage scores), `suffice.study` (resumable grids of experiments) and
`suffice.report` (pages and figures).
"""

import importlib
from types import ModuleType

__version__ = "0.1.0.dev0"
_HALVES = ("kv", "link")


class SufficeError(RuntimeError):
    """An operation failed for a reason other than a wrong argument; the message says what to do."""


def __getattr__(name: str) -> ModuleType:
    """Import a half of the library on first use, because torch and transformers take seconds to import."""
    if name in _HALVES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(("SufficeError", "__doc__", "__version__", *_HALVES))
