"""The specification of a study: settings, a grid over some of them, and seeds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from suffice.study.nested_settings import nest
from suffice.study.run_key import canonical_json
from suffice.study.run_kind import RunKind, check_names

_MAX_RUNS = 1_000_000


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study.

    Args:
        settings: complete settings, nested as the kind of run defines them.
        seed: seed of the run.
        inputs: files that the run reads, relative to the study's folder.

    """

    settings: Mapping[str, Any]
    seed: int
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spec:
    """A study: every combination of the grid's values, each with every seed.

    Settings have plain names (`data`) or, where a kind of run nests them, dotted names (`train.epochs`).

    Args:
        name: name of the study in its store, made of letters, digits, dots, dashes and spaces.
        kind: name of the kind of run.
        settings: settings that all runs share, nested or by dotted name.
        grid: values to combine, by name of the setting.
        exclude: combinations to leave out; each gives values of some settings of the grid.
        seeds: number of seeds, counted from 0, or a list of seeds.

    Raises:
        ValueError: a value is not accepted, or the grid has no run.

    Example:
        >>> spec = Spec("rates", "link.correct", grid={"arm": ["fixed/batch", "random/batch"]}, seeds=3)
        >>> len(spec.combinations()), spec.seed_list
        (2, (0, 1, 2))

    """

    name: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    exclude: Sequence[Mapping[str, Any]] = ()
    seeds: int | Sequence[int] = 1

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.\- ]+", self.name):
            raise ValueError(f"name must consist of letters, digits, dots, dashes and spaces, got {self.name!r}")
        _check_mapping("settings", self.settings)
        _check_mapping("grid", self.grid)
        for key, values in self.grid.items():
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ValueError(f"grid[{key!r}] must be a list of at least one value, got {values!r}")
            if len({canonical_json(value) for value in values}) < len(values):
                raise ValueError(f"grid[{key!r}] must be a list of distinct values, got {list(values)!r}")
        for entry in self.exclude:
            _check_mapping("exclude", entry)
            check_names(entry, self.grid, "settings in exclude")
            for key, value in entry.items():
                if value not in self.grid[key]:
                    raise ValueError(f"{key} in exclude must be one of {list(self.grid[key])!r}, got {value!r}")
        seeds = self.seed_list
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"seeds must be a positive number of seeds or distinct seeds from 0, got {self.seeds!r}")
        size = len(seeds)
        for values in self.grid.values():
            size *= len(values)
        if size > _MAX_RUNS:
            raise ValueError(f"grid must have at most {_MAX_RUNS} runs, got {size}")
        if next(self._combinations(), None) is None:
            raise ValueError(f"exclude must leave at least one run of the grid, got {list(self.exclude)!r}")

    @property
    def seed_list(self) -> tuple[int, ...]:
        """Every seed of the study."""
        if isinstance(self.seeds, bool) or not isinstance(self.seeds, int | Sequence) or isinstance(self.seeds, str):
            raise ValueError(f"seeds must be a positive number of seeds or a list of seeds, got {self.seeds!r}")
        seeds = range(self.seeds) if isinstance(self.seeds, int) else self.seeds
        if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
            raise ValueError(f"seeds must be integers, got {self.seeds!r}")
        return tuple(seeds)

    def combinations(self) -> list[dict[str, Any]]:
        """Return the nested settings of every combination; the last setting of the grid varies fastest."""
        return list(self._combinations())

    def plan(self, kind: RunKind) -> list[PlannedRun]:
        """Return every run with complete settings.

        All combinations of a seed come before those of the next seed, so that an interrupted study has complete seeds
        to compare.

        Args:
            kind: the kind of run that `kind` names.

        Raises:
            ValueError: the kind refuses a setting.

        """
        completed = [kind.complete(settings) for settings in self._combinations()]
        return [PlannedRun(settings, seed) for seed in self.seed_list for settings in completed]

    def with_settings(self, settings: Mapping[str, Any]) -> Spec:
        """Return the study with some shared settings replaced.

        Args:
            settings: values by plain or dotted name.

        Raises:
            ValueError: the grid varies one of the settings.

        """
        replaced: dict[str, Any] = dict(self.settings)
        for name, value in settings.items():
            replaced = {**_without(replaced, name.split(".")), name: value}
        return replace(self, settings=nest(replaced))

    def to_dict(self) -> dict[str, Any]:
        """Return the study as a dictionary that JSON and YAML can represent."""
        return {
            "name": self.name,
            "kind": self.kind,
            "settings": dict(self.settings),
            "grid": {key: list(values) for key, values in self.grid.items()},
            "exclude": [dict(entry) for entry in self.exclude],
            "seeds": self.seeds if isinstance(self.seeds, int) else list(self.seeds),
        }

    @classmethod
    def from_dict(cls, content: Any, *, name: str = "study") -> Spec:
        """Return the study that a mapping describes.

        Args:
            content: mapping with the arguments of `Spec`.
            name: name of the study if the mapping has none.

        Raises:
            ValueError: it is not a mapping, has unknown keys, or a value is not accepted.

        """
        accepted = ("name", "kind", "settings", "grid", "exclude", "seeds")
        _check_mapping("study", content)
        check_names(content, accepted, "keys of a study")
        if not isinstance(content.get("kind"), str):
            raise ValueError(f"kind must be the name of a kind of run, got {content.get('kind')!r}")
        arguments: dict[str, Any] = {"name": name}
        arguments |= {key: value for key, value in content.items() if value is not None}
        return cls(**arguments)

    @classmethod
    def read(cls, path: str | Path) -> Spec:
        """Read a study from a YAML file, whose name is the default of the name of the study.

        Raises:
            ValueError: the file cannot be read, is not YAML, or does not describe a study.

        """
        path = Path(path)
        try:
            content = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(
                f"{path} must be a readable YAML file, got an error: {' '.join(str(error).split())}"
            ) from None
        try:
            return cls.from_dict(content, name=path.stem)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _combinations(self) -> Iterator[dict[str, Any]]:
        for values in itertools.product(*self.grid.values()):
            chosen = dict(zip(self.grid, values, strict=True))
            if not any(all(chosen[key] == value for key, value in entry.items()) for entry in self.exclude):
                yield nest(self.settings, chosen)


def default_folder(path: str | Path) -> Path:
    """Return the folder of a study.

    Args:
        path: the folder itself, or the study's YAML file, whose path without the suffix is its default folder.

    """
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".yaml", ".yml") else path


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return the name and the value of `NAME=VALUE`, with the value read as YAML.

    Raises:
        ValueError: the text has no name, no `=`, or a value that is not YAML.

    Example:
        >>> parse_assignment("train.epochs=3")
        ('train.epochs', 3)

    """
    name, equals, value = text.partition("=")
    try:
        if name and equals:
            return name, yaml.safe_load(value)
    except yaml.YAMLError:
        pass
    raise ValueError(f"assignment must be NAME=VALUE, got {text!r}")


class _Loader(yaml.SafeLoader):
    """A YAML loader that rejects repeated keys, of which PyYAML would silently keep only the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is repeated", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _without(settings: Mapping[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """Return settings without the value of a dotted name, which is given as its parts."""
    kept = {name: value for name, value in settings.items() if name != ".".join(path)}
    inner = kept.get(path[0])
    if len(path) > 1 and isinstance(inner, Mapping):
        kept[path[0]] = _without(inner, path[1:])
    return kept


def _check_mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must be a mapping with names as keys, got {value!r}")
