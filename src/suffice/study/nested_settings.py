"""Nested settings: mappings of mappings, whose values have dotted names such as `train.epochs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard


def nest(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Merge mappings of settings into one, with dotted names expanded to nested mappings.

    Args:
        parts: settings by name, plain or dotted. Mappings are merged; any other value may be set only once.

    Raises:
        ValueError: a value is set twice.

    Example:
        >>> nest({"data": "digits", "train": {"rate": 0.1}}, {"train.epochs": 3})
        {'data': 'digits', 'train': {'rate': 0.1, 'epochs': 3}}

    """
    nested: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            *groups, last = name.split(".")
            target = nested
            for group in groups:
                target = target.setdefault(group, {})
                if not isinstance(target, dict):
                    raise _set_twice(name)
            _merge(target, last, value, name)
    return nested


def flatten(settings: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name.

    Args:
        settings: nested settings.
        defaults: nested defaults. Only mappings whose default is a mapping are flattened; all other values are kept. In
            a group without defaults, which accepts any names, all mappings are flattened.
        prefix: text before each name.

    Example:
        >>> flatten({"arm": {"norm": "none"}, "train": {"epochs": 3}}, {"arm": None, "train": {"epochs": 2}})
        {'arm': {'norm': 'none'}, 'train.epochs': 3}

    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        default = defaults.get(name)
        if is_group(default) and is_group(value) and value:
            flat |= flatten(value, default or value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def is_group(default: Any) -> TypeGuard[Mapping[str, Any]]:
    """Return whether a value is a group of nested settings, as every mapping is."""
    return isinstance(default, Mapping)


def _merge(target: dict[str, Any], name: str, value: Any, full_name: str) -> None:
    if isinstance(value, Mapping):
        inner = target.setdefault(name, {})
        if not isinstance(inner, dict):
            raise _set_twice(full_name)
        for key, part in value.items():
            _merge(inner, key, part, f"{full_name}.{key}")
    elif name in target:
        raise _set_twice(full_name)
    else:
        target[name] = value


def _set_twice(name: str) -> ValueError:
    return ValueError(f"settings must be set once each, got {name!r} twice")
