"""Values that scoring may change, with what is needed to restore them, or to notice that they have changed."""

from __future__ import annotations

import random
import zlib
from abc import ABC, abstractmethod
from collections import deque
from types import CellType
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor


class Saved(Protocol):
    """Something that can be restored."""

    def restore(self) -> None:
        """Restore what has changed."""
        ...


class Watched(ABC):
    """Something that is too large to be copied, so that it cannot be restored."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def has_changed(self) -> bool:
        """Return whether it has changed since."""


class SavedTensor:
    """A tensor and a copy of its content."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._copy = tensor, tensor.detach().clone()

    def restore(self) -> None:
        """Restore what has changed."""
        if self._tensor.shape != self._copy.shape:
            self._tensor.data = self._copy.clone()
        # The version of a tensor does not count changes of running statistics by BatchNorm.
        elif not torch.equal(self._tensor, self._copy):
            self._tensor.copy_(self._copy)


class SavedArray:
    """An array and a copy of its content."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array, self._copy = array, array.copy()

    def restore(self) -> None:
        """Restore what has changed."""
        if self._array.flags.writeable:
            self._array[...] = self._copy


class SavedContainer:
    """A dictionary, list, deque or set, and the entries that it contains."""

    def __init__(self, container: Any) -> None:
        self._container = container
        self._entries: Any = dict(container) if isinstance(container, dict) else list(container)

    def restore(self) -> None:
        """Restore what has changed."""
        if not _has_same_entries(self._container, self._entries):
            self._container.clear()
            add = self._container.extend if isinstance(self._container, (list, deque)) else self._container.update
            add(self._entries)


class SavedAttributes:
    """The attributes of an object and the values that they have."""

    def __init__(self, attributes: dict[str, Any], values: dict[str, Any]) -> None:
        self._attributes, self._values = attributes, dict(values)

    def restore(self) -> None:
        """Restore what has changed."""
        for key in [key for key in self._attributes if key not in self._values and is_state(key)]:
            del self._attributes[key]
        self._attributes.update(self._values)


class SavedSlots:
    """The attributes of an object without a dictionary of them, and the values that they have."""

    def __init__(self, owner: object, values: dict[str, Any]) -> None:
        self._owner, self._values = owner, values

    def restore(self) -> None:
        """Restore what has changed."""
        for key, value in self._values.items():
            if getattr(self._owner, key, None) is not value:
                object.__setattr__(self._owner, key, value)


class SavedGlobals:
    """Global variables and the values that they have."""

    def __init__(self, variables: dict[str, Any], values: dict[str, object]) -> None:
        self._variables, self._values = variables, values

    def restore(self) -> None:
        """Restore what has changed."""
        self._variables.update(self._values)


class SavedCell:
    """A variable that a function shares with the one around it, and its value."""

    def __init__(self, cell: CellType) -> None:
        self._cell, self._value = cell, cell.cell_contents

    def restore(self) -> None:
        """Restore what has changed."""
        self._cell.cell_contents = self._value


class SavedGenerator:
    """A random generator and its state."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self._state = self._read()

    def _read(self) -> Any:
        generator: Any = self._generator
        if isinstance(generator, np.random.Generator):
            return generator.bit_generator.state
        read = "getstate" if isinstance(generator, random.Random) else "get_state"
        return getattr(generator, read)()

    def restore(self) -> None:
        """Restore what has changed."""
        generator: Any = self._generator
        if isinstance(generator, np.random.Generator):
            generator.bit_generator.state = self._state
        else:
            write = "setstate" if isinstance(generator, random.Random) else "set_state"
            getattr(generator, write)(self._state)


class WatchedTensor(Watched):
    """A tensor that is too large to be copied, with the number of its changes in place."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        super().__init__(name)
        self._tensor = tensor
        self._version = self._read_version()

    def _read_version(self) -> int | None:
        """Return how often the tensor was changed in place; None if torch does not count it."""
        return None if self._tensor.is_inference() else self._tensor._version

    def has_changed(self) -> bool:
        """Return whether it has changed since."""
        return self._version != self._read_version()


class WatchedArray(Watched):
    """An array that is too large to be copied, with a checksum."""

    def __init__(self, name: str, array: np.ndarray[Any, Any]) -> None:
        super().__init__(name)
        self._array = array
        self._checksum = self._compute_checksum()

    def _compute_checksum(self) -> int:
        checksum = 0
        for row in self._array if self._array.ndim > 1 else (self._array,):
            checksum = zlib.crc32(np.ascontiguousarray(row).data.cast("B"), checksum)
        return checksum

    def has_changed(self) -> bool:
        """Return whether it has changed since."""
        return self._checksum != self._compute_checksum()


def is_state(attribute: str) -> bool:
    """Return whether an attribute of a module or object is restored; modes and hooks are not."""
    return attribute != "training" and "_hooks" not in attribute


def _has_same_entries(container: Any, entries: Any) -> bool:
    if len(container) != len(entries):
        return False
    if isinstance(container, dict):
        # The order of the entries is part of the state, too.
        current = cast(dict[Any, Any], container).items()
        return all(
            key is other_key and value is other
            for (key, value), (other_key, other) in zip(current, entries.items(), strict=True)
        )
    return all(value is other for value, other in zip(container, entries, strict=True))
