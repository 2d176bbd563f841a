"""The class `NamedParts`, a table of classes by name.

The tables are `ENCODERS`, `DECODERS` and `NORMS`, in the modules of the same name, and `MODELS` in `registry.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from suffice.study.run_kind import suggestion

Part = TypeVar("Part")
Registered = TypeVar("Registered")


class NamedParts(Generic[Part]):
    """Parts of one kind by name, in the order of registration.

    Args:
        kind: what the parts are, for error messages, for example `encoder`.

    Example:
        >>> shapes = NamedParts[type]("shape")
        >>> @shapes.register("square")
        ... class Square: ...
        >>> shapes.find("square").__name__
        'Square'

    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._parts: dict[str, Part] = {}

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """Return a decorator that registers a class or function under a name.

        Raises:
            ValueError: another part has this name.

        """

        def decorate(part: Registered) -> Registered:
            # A module that is reloaded, or a notebook cell that is run again, replaces its own part.
            known = self._parts.get(name)
            if known is not None and _qualified_name(known) != _qualified_name(part):
                raise ValueError(f"{self.kind} must have a name that is not registered yet, got {name!r}")
            self._parts[name] = part  # pyright: ignore[reportArgumentType]
            return part

        return decorate

    def find(self, name: str) -> Part:
        """Return the part with a name.

        Raises:
            ValueError: no part has this name.

        """
        self.check(self.kind, name)
        return self._parts[name]

    def check(self, argument: str, name: object) -> None:
        """Raise unless a part has the name that an argument was given.

        Raises:
            ValueError: no part has this name.

        """
        if name not in self._parts:
            raise ValueError(f"{argument} must be {describe_choices(self._parts, name)}")

    def entries(self) -> dict[str, Part]:
        """Return every part by name."""
        return dict(self._parts)


def describe_choices(accepted: Iterable[str], given: object) -> str:
    """Return the end of an error message: the accepted names, the given one, and the most similar accepted name."""
    accepted = list(accepted)
    return f"one of {', '.join(accepted)}, got {given!r}{suggestion(str(given), accepted)}"


def _qualified_name(part: object) -> tuple[object, object]:
    return getattr(part, "__module__", None), getattr(part, "__qualname__", None)
