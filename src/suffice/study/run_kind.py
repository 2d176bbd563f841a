"""Kinds of runs: which settings a run accepts, and which function executes it."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import suffice
from suffice.arguments import did_you_mean
from suffice.plain_numbers import plain_number
from suffice.study.nested_settings import flatten, is_group, nest
from suffice.study.run_key import canonical_json


@dataclass(frozen=True)
class RunKind:
    """A kind of run.

    Functions are given as `module:function`, so that worker processes can import them.

    Args:
        name: the name that studies use, for example `link.correct`.
        function: called as `function(settings, seed, context)` in a worker; returns a dict that JSON can represent.
            Its `values` are the numbers to compare, by metric. A run that measures several things at once returns
            `rows` instead, each with its own `settings` and `values`. All other items are stored as they are.
        settings: default settings. A value must have the type of its default, unless the default is None. A mapping
            is a group of nested settings; dotted names such as `train.epochs` address its values. An empty mapping is a
            group that accepts any names; `check` may reject some of them.
        check: called as `check(settings)` with complete settings before any work; raises an error for impossible
            settings and returns the settings, to which it may add values such as the digest of a file.
        report_sections: called as `report_sections(page, records, folder)` to add sections of this kind to a report.
        compared_setting: dotted name of the setting whose values a report compares; by default the first that is text.
        version: to be increased when the same settings give different numbers than before.
        description: one sentence on what a run does.

    Raises:
        ValueError: the name of a setting contains a dot.

    """

    name: str
    function: str
    settings: Mapping[str, Any]
    check: str = ""
    report_sections: str = ""
    compared_setting: str = ""
    version: int = 1
    description: str = ""

    def __post_init__(self) -> None:
        _refuse_dots(self.settings)

    @property
    def code_version(self) -> str:
        """Version of the code of a run: the version of this package and that of the kind."""
        return f"{suffice.__version__}/{self.version}"

    def complete(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return complete nested settings, with defaults filled in, after checking them.

        Args:
            settings: settings that differ from the defaults, nested or by dotted name.

        Raises:
            ValueError: a setting is unknown, set twice, of a wrong type, or not accepted.

        """
        full = self._fill(nest(settings), self.settings, "")
        if self.check:
            full = import_object(self.check)(full)
        canonical_json(full)
        return full

    def flatten(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return nested settings by dotted name, as tables show them."""
        return flatten(settings, self.settings)

    def _fill(self, given: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        for name, value in given.items():
            if name not in defaults:
                unknown = ".".join([name, *value][:2]) if is_group(value) else name
                check_names([prefix + unknown], self.flatten(self.settings), f"settings of {self.name}")
        full: dict[str, Any] = {}
        for name, default in defaults.items():
            value = given.get(name, {} if is_group(default) else default)
            if not is_group(default):
                full[name] = _typed(prefix + name, value, default)
            elif not is_group(value):
                _refuse(prefix + name, value, "a mapping of settings")
            else:
                full[name] = self._fill(value, default, f"{prefix}{name}.") if default else dict(value)
        return full


def import_object(path: str) -> Any:
    """Import the object with the path `module:name`.

    Raises:
        ValueError: the module cannot be imported or has no such name.

    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"module:name must be an importable object, got {path!r} ({error})") from error


def find_run_kind(name: str, known: Mapping[str, RunKind]) -> RunKind:
    """Return a kind of run by its name, or a user's own by `module:NAME`.

    Raises:
        ValueError: there is no such kind.

    """
    accepted = f"one of {', '.join(known)}, or module:NAME of a RunKind"
    if ":" in name:
        found = import_object(name)
        if not isinstance(found, RunKind):
            _refuse("kind", name, accepted)
        return found
    if name not in known:
        raise ValueError(f"kind must be {accepted}, got {name!r}{suggestion(name, known)}")
    return known[name]


def check_names(names: Iterable[str], accepted: Iterable[str], what: str) -> None:
    """Raise unless all names are accepted.

    Args:
        names: names that a user gave.
        accepted: valid names.
        what: description of the names for the error.

    Raises:
        ValueError: a name is unknown; the error suggests the most similar valid name.

    """
    accepted = list(accepted)
    for name in names:
        if name not in accepted:
            raise ValueError(
                f"{what} must be among {', '.join(accepted) or 'none'}, got {name!r}{suggestion(name, accepted)}"
            )


def suggestion(name: str, accepted: Iterable[str]) -> str:
    """Return `. Did you mean 'x'?` with the most similar valid name, or an empty text if none is similar."""
    accepted = list(accepted)
    last = name.rpartition(".")[2]
    same = [candidate for candidate in accepted if candidate.rpartition(".")[2] == last]
    return f". Did you mean {same[0]!r}?" if same else did_you_mean(name, accepted)


def _refuse_dots(settings: Mapping[str, Any]) -> None:
    for name, default in settings.items():
        if "." in name:
            _refuse("settings", name, "named without dots")
        if is_group(default):
            _refuse_dots(default)


def _typed(name: str, value: Any, default: Any) -> Any:
    items: Any = value
    value = [plain_number(item) for item in items] if isinstance(value, list | tuple) else plain_number(value)
    if default is None:
        return value
    if isinstance(default, bool):
        accepted, fits = "true or false", isinstance(value, bool)
    elif isinstance(default, int):
        accepted, fits = "an integer", isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(default, float):
        # YAML reads 1e-3 as text.
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            _refuse(name, value, "a number")
        try:
            return float(value)
        except ValueError:
            _refuse(name, value, "a number")
    elif isinstance(default, str):
        accepted, fits = "text", isinstance(value, str)
    else:
        accepted, fits = "a list", isinstance(value, list | tuple)
    return value if fits else _refuse(name, value, accepted)


def _refuse(name: str, value: Any, accepted: str) -> NoReturn:
    raise ValueError(f"{name} must be {accepted}, got {value!r}")
