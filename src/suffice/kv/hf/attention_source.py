"""What the attention modules of a model do with their cache, read from their source code.

Before the first forward pass, this can only be read from the source code: a model class may claim to support every
attention implementation, and still compute the attention of some layers itself.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from enum import Enum
from typing import TypeGuard

from torch import nn


class CacheUse(Enum):
    """What an attention module does with the keys and values that `Cache.update` returns."""

    DIRECT = "passes them to transformers' attention interface"
    CHANGED = "changes them before it passes them to transformers' attention interface"
    READ = "passes them to transformers' attention interface, and computes something else from them"
    BYPASSED = "does not call transformers' attention interface"
    UNKNOWN = "has no source code, or no call of `Cache.update` in it"


def cache_use(module: nn.Module) -> CacheUse:
    """Return what an attention module does with the keys and values that its cache returns."""
    return _cache_use(type(module))


@functools.cache
def _cache_use(module_class: type[nn.Module]) -> CacheUse:
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(module_class.forward)))
        function = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        return CacheUse.UNKNOWN
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and _is_attention_call(node)]
    if not calls:
        return CacheUse.BYPASSED
    updates = [(line, names) for line, names, value in _assignments(function) if _is_cache_update(value)]
    if not updates:
        return CacheUse.UNKNOWN
    first_update = min(line for line, _ in updates)
    updated = {name for _, names in updates for name in names}
    # Names that get other values after the update.
    changed = {
        name
        for line, names, value in _assignments(function)
        if line > first_update and not _is_cache_update(value)
        for name in names
    }
    for call in calls:
        passed = {argument.id for argument in call.args[2:4] if isinstance(argument, ast.Name)}
        if len(passed) < 2 or not passed <= updated - changed:
            return CacheUse.CHANGED
    if any(_computes_from(node, updated) and node.lineno > first_update for node in ast.walk(function)):
        return CacheUse.READ
    return CacheUse.DIRECT


def _computes_from(node: ast.AST, names: set[str]) -> TypeGuard[ast.Attribute]:
    """Return whether a node computes something from a name, such as `key_states.transpose(1, 2)`."""
    if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
        return False
    return node.value.id in names and node.attr not in ("shape", "size", "dtype", "device", "contiguous", "to")


def _is_attention_call(node: ast.Call) -> bool:
    """Return whether a call has the form `attention_interface(self, query, key, value, ...)`."""
    is_interface = isinstance(node.func, ast.Name) and "attention_interface" in node.func.id
    return is_interface and isinstance(node.args[0], ast.Name) and node.args[0].id == "self" and len(node.args) >= 4


def _is_cache_update(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "update"


def _assignments(function: ast.AST) -> Iterator[tuple[int, list[str], ast.expr]]:
    """Yield the line, the assigned names and the value of each assignment."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            targets = [name for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            yield node.lineno, [name.id for name in targets if isinstance(name.ctx, ast.Store)], node.value
