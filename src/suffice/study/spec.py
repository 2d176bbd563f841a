"""What a study is to run: settings, a grid over some of them, and seeds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from suffice.study.keys import canonical
from suffice.study.kinds import Kind, refuse_unknown

_MOST = 1_000_000


@dataclass(frozen=True)
class Planned:
    """A run that a study wants: complete settings, a seed, and files in the study's folder that it reads."""

    settings: Mapping[str, Any]
    seed: int
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spec:
    """A study: every combination of the grid's values, each with every seed.

    Args:
        name: letters, digits, dots, dashes, spaces; what it is called in the store.
        kind: kind of run.
        settings: the same for all runs.
        grid: values to combine, by setting.
        exclude: combinations to leave out; each names some settings of the grid.
        seeds: how many, from 0, or which.

    Raises:
        ValueError: the grid is impossible.

    Example:
        >>> spec = Spec("rates", "link.correct", grid={"arm": ["fixed/batch", "random/batch"]}, seeds=3)
        >>> len(spec.combinations()), spec.numbers
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
            raise ValueError(f"name is {self.name!r}; accepted: letters, digits, dots, dashes and spaces")
        _mapping("settings", self.settings)
        _mapping("grid", self.grid)
        for key, values in self.grid.items():
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ValueError(f"grid[{key!r}] is {values!r}; accepted: a list of at least one value")
            if len({canonical(value) for value in values}) < len(values):
                raise ValueError(f"grid[{key!r}] is {list(values)!r}; accepted: each value once")
            if key in self.settings:
                raise ValueError(f"{key!r} is in settings and in grid; accepted: in one of them")
        for entry in self.exclude:
            _mapping("exclude", entry)
            refuse_unknown(entry, self.grid, "exclude")
            for key, value in entry.items():
                if value not in self.grid[key]:
                    raise ValueError(f"exclude has {key}={value!r}; accepted: one of {list(self.grid[key])!r}")
        numbers = self.numbers
        if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0:
            raise ValueError(f"seeds is {self.seeds!r}; accepted: a number from 1, or distinct seeds from 0")
        size = len(numbers)
        for values in self.grid.values():
            size *= len(values)
        if size > _MOST:
            raise ValueError(f"grid has {size} runs; accepted: at most {_MOST}")
        if not self.combinations():
            raise ValueError(f"exclude leaves none of the grid's runs: {list(self.exclude)!r}; accepted: at least one")

    @property
    def numbers(self) -> tuple[int, ...]:
        """Every seed."""
        if isinstance(self.seeds, bool) or not isinstance(self.seeds, int | Sequence) or isinstance(self.seeds, str):
            raise ValueError(f"seeds is {self.seeds!r}; accepted: a number from 1, or a list of seeds")
        found = range(self.seeds) if isinstance(self.seeds, int) else self.seeds
        if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in found):
            raise ValueError(f"seeds is {self.seeds!r}; accepted: whole numbers")
        return tuple(found)

    def combinations(self) -> list[dict[str, Any]]:
        """Return settings of every combination that is not excluded, the grid's last setting fastest."""
        drawn = (dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values()))
        return [
            {**self.settings, **chosen}
            for chosen in drawn
            if not any(all(chosen[key] == value for key, value in entry.items()) for entry in self.exclude)
        ]

    def plan(self, kind: Kind) -> list[Planned]:
        """Return every run with complete settings, all settings of a seed before the next seed.

        So an interrupted study has whole seeds to compare.

        Raises:
            ValueError: the kind refuses a setting.

        """
        refuse_unknown({**self.settings, **self.grid}, kind.settings, f"settings of {kind.name}")
        full = [kind.complete(settings) for settings in self.combinations()]
        return [Planned(settings, seed) for seed in self.numbers for settings in full]

    def to_dict(self) -> dict[str, Any]:
        """Return the study as JSON and YAML hold it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "settings": dict(self.settings),
            "grid": {key: list(values) for key, values in self.grid.items()},
            "exclude": [dict(entry) for entry in self.exclude],
            "seeds": self.seeds if isinstance(self.seeds, int) else list(self.seeds),
        }

    @classmethod
    def from_dict(cls, found: Any, *, name: str = "study") -> Spec:
        """Make a study of a mapping, as YAML holds it; its name is the given one if it has none.

        Raises:
            ValueError: it is no mapping, a key is unknown, or the grid is impossible.

        """
        accepted = ("name", "kind", "settings", "grid", "exclude", "seeds")
        _mapping("study", found)
        refuse_unknown(found, accepted, "studies")
        if not isinstance(found.get("kind"), str):
            raise ValueError(f"kind is {found.get('kind')!r}; accepted: the name of a kind of run")
        kept = {key: value for key, value in found.items() if value is not None}
        return cls(
            kept.get("name", name),
            kept["kind"],
            kept.get("settings", {}),
            kept.get("grid", {}),
            kept.get("exclude", ()),
            kept.get("seeds", 1),
        )

    @classmethod
    def read(cls, path: str | Path) -> Spec:
        """Read a study from a YAML file.

        Raises:
            ValueError: the file can't be read, is no YAML, or describes no study.

        """
        path = Path(path)
        try:
            found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} can't be read as a study: {' '.join(str(error).split())}") from None
        try:
            return cls.from_dict(found, name=path.stem)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which it would silently drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} is {value!r}; accepted: a mapping by names")
