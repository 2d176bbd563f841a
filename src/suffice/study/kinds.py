"""Kinds of runs: what a run accepts and which function does it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import suffice
from suffice.study.keys import canonical


@dataclass(frozen=True)
class Kind:
    """A kind of run.

    Args:
        name: as a study names it, `link.correct`.
        run: `module:function`, called as `function(settings, seed, context)` in a worker; returns a JSON object.
            Numbers to compare are under `values`, by metric; a run that measures several things at once gives
            `rows` instead, each with `settings` of its own and `values`. Everything else is kept as it is.
        settings: what a run accepts, with defaults; a value has the type of its default, unless that is None.
        check: `module:function`, called as `function(settings)` before any work; refuses impossible settings and
            returns them complete (a file by its digest, say). Empty for no further check.
        view: `module:function`, called as `function(page, records)`; adds this kind's sections to a report. Empty
            for none.
        compares: setting whose values a report compares, pair by pair; empty for the first that is text.
        version: raised when the same settings no longer give the same numbers.
        about: one sentence.

    """

    name: str
    run: str
    settings: Mapping[str, Any]
    check: str = ""
    view: str = ""
    compares: str = ""
    version: int = 1
    about: str = ""

    @property
    def code(self) -> str:
        """Code version of a run."""
        return f"{suffice.__version__}/{self.version}"

    def complete(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings with every default filled in.

        Raises:
            ValueError: a setting is unknown, of another type, or impossible.

        """
        refuse_unknown(settings, self.settings, f"settings of {self.name}")
        full = {name: _typed(name, settings.get(name, default), default) for name, default in self.settings.items()}
        if self.check:
            full = resolve(self.check)(full)
        canonical(full)
        return full


def resolve(entry: str) -> Callable[..., Any]:
    """Return what `module:name` names.

    Raises:
        ValueError: there is no such module or name.

    """
    module, _, name = entry.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"entry is {entry!r}; accepted: module:name of something importable ({error})") from error
    return found


def find_kind(name: str, known: Mapping[str, Kind]) -> Kind:
    """Return a kind by its name, or a user's own by `module:NAME`.

    Raises:
        ValueError: there is none.

    """
    if ":" in name:
        found = resolve(name)
        if not isinstance(found, Kind):
            raise ValueError(f"kind is {name!r}, which is no Kind; accepted: {', '.join(known)}, or module:NAME")
        return found
    if name not in known:
        raise ValueError(f"kind is {name!r}{nearest(name, known)}; accepted: {', '.join(known)}, or module:NAME")
    return known[name]


def refuse_unknown(given: Iterable[str], accepted: Iterable[str], what: str) -> None:
    """Refuse keys that nothing reads, with the nearest one that something does.

    Raises:
        ValueError: a key is unknown.

    """
    accepted = list(accepted)
    for key in given:
        if key not in accepted:
            raise ValueError(f"{what} hold {key!r}{nearest(key, accepted)}; accepted: {', '.join(accepted)}")


def nearest(name: object, accepted: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` for the nearest valid name, or nothing where none is near."""
    close = difflib.get_close_matches(str(name), list(accepted), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _typed(name: str, value: Any, default: Any) -> Any:
    if default is None:
        return value
    if isinstance(default, bool):
        accepted, fits = "true or false", isinstance(value, bool)
    elif isinstance(default, int):
        accepted, fits = "a whole number", isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(default, float):
        # YAML reads 1e-3 as text.
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return _refuse(name, value, "a number")
        try:
            return float(value)
        except ValueError:
            return _refuse(name, value, "a number")
    elif isinstance(default, str):
        accepted, fits = "text", isinstance(value, str)
    elif isinstance(default, list | tuple):
        accepted, fits = "a list", isinstance(value, list | tuple)
    else:
        accepted, fits = "a mapping", isinstance(value, Mapping)
    return value if fits else _refuse(name, value, accepted)


def _refuse(name: str, value: Any, accepted: str) -> Any:
    raise ValueError(f"{name} is {value!r}; accepted: {accepted}")
