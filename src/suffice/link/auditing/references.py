"""What a function, a container or an object refers to."""

from __future__ import annotations

import functools
import sys
import weakref
from collections import deque
from collections.abc import Iterable
from types import CellType, FunctionType, MethodType
from typing import Any, cast


def references(value: object) -> Iterable[object]:
    """Return what a function, a container or an object refers to; of containers, the first 100 entries."""
    if isinstance(value, FunctionType):
        return [*closure(value).values(), *used_globals(value).values(), *(value.__defaults__ or ())]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, dict):
        return list(cast(dict[Any, Any], value).values())[:100]
    if isinstance(value, (list, tuple, set, deque)):
        return list(cast(Iterable[Any], value))[:100]
    called = call_method(value)
    return [*getattr(value, "__dict__", {}).values(), *([] if called is None else [called])]


def call_method(value: object) -> FunctionType | None:
    """Return the method `__call__` of an object if it is written in Python."""
    called = type(value).__call__ if callable(value) else None
    return called if isinstance(called, FunctionType) else None


def cells(function: FunctionType) -> dict[str, CellType]:
    """Return the cells of the variables that a function shares with the one around it, by name, without empty ones."""
    named = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell for name, cell in named if _is_filled(cell)}


def closure(function: FunctionType) -> dict[str, object]:
    """Return the values of the variables that a function shares with the one around it, by name."""
    return {name: cell.cell_contents for name, cell in cells(function).items()}


def used_globals(function: FunctionType) -> dict[str, object]:
    """Return the global variables that a function names."""
    return {name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__}


def is_of_standard_library(kind: type) -> bool:
    """Return whether a class is part of Python, and no container or namespace."""
    top_level = kind.__module__.partition(".")[0]
    return top_level in sys.stdlib_module_names and top_level not in ("argparse", "collections", "types", "__main__")


def is_weak(value: object) -> bool:
    """Return whether a value is a weak proxy: it looks like another object, but does not own it."""
    return type(value) in weakref.ProxyTypes


def is_installed(function: FunctionType) -> bool:
    """Return whether a function is part of Python or of an installed package."""
    path = function.__code__.co_filename
    is_standard = str(function.__module__).partition(".")[0] in sys.stdlib_module_names - {"__main__"}
    return is_standard or "site-packages" in path or "dist-packages" in path


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
