"""Checks of the arguments of public functions.

Each check returns the argument, with numbers of NumPy as Python numbers. A wrong type raises a TypeError, and a value
that is out of range a ValueError; both name the argument, what is accepted, and the value.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from suffice.plain_numbers import plain_number

_MAX_SHOWN = 60
T = TypeVar("T")


def check_int(
    name: str, value: object, minimum: int | None = None, maximum: int | None = None, *, unit: str = ""
) -> int:
    """Return `value` if it is an integer within bounds.

    Args:
        name: name of the argument, for the error.
        value: the argument.
        minimum: smallest accepted value; None for no bound.
        maximum: largest accepted value; None for no bound.
        unit: what the number counts, for the error, such as `"token"`.

    Raises:
        TypeError: `value` is not an integer; True and False are none.
        ValueError: `value` is out of range.

    Example:
        >>> check_int("samples", 1.5, minimum=1)
        Traceback (most recent call last):
        TypeError: samples must be an int, at least 1, got 1.5

    """
    range_text = _int_range(minimum, maximum, unit)
    number = plain_number(value)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} must be an int{', ' if range_text else ''}{range_text}, got {shown(value)}")
    if (minimum is not None and number < minimum) or (maximum is not None and number > maximum):
        raise ValueError(f"{name} must be {range_text}, got {number}")
    return number


def check_seed(seed: object) -> int:
    """Return `seed` if the generators of torch and NumPy accept it.

    Raises:
        TypeError: `seed` is not an integer.
        ValueError: `seed` is negative, or larger than 64-bit integers can be.

    """
    return check_int("seed", seed, 0, 2**63 - 1)


def check_optional_int(name: str, value: object, minimum: int | None = None, *, unit: str = "") -> int | None:
    """Return `value` if it is None or an integer within bounds; see `check_int`."""
    if value is None:
        return None
    try:
        return check_int(name, value, minimum, unit=unit)
    except TypeError:
        range_text = _int_range(minimum, None, unit)
        accepted = f"an int, {range_text}," if range_text else "an int"
        raise TypeError(f"{name} must be {accepted} or None, got {shown(value)}") from None


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    minimum: float | None = None,
    below: float | None = None,
    maximum: float | None = None,
    unit: str = "",
) -> float:
    """Return `value` if it is a finite number within bounds.

    Args:
        name: name of the argument, for the error.
        value: the argument.
        above: bound that the number must exceed.
        minimum: smallest accepted value.
        below: bound that the number must not reach.
        maximum: largest accepted value.
        unit: unit of the number, for the error.

    Raises:
        TypeError: `value` is not a number; True and False are none.
        ValueError: `value` is out of range, NaN or infinite.

    Example:
        >>> check_number("confidence", 1.5, above=0.5, below=1)
        Traceback (most recent call last):
        ValueError: confidence must be above 0.5 and below 1, got 1.5

    """
    bounds = [("above", above), ("at least", minimum), ("below", below), ("at most", maximum)]
    range_text = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
    if minimum is not None and maximum is not None:
        range_text = f"from {minimum:g} to {maximum:g}"
    range_text += f" {unit}" if unit else ""
    number = plain_number(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a number{', ' if range_text else ''}{range_text}, got {shown(value)}")
    is_within = (
        (above is None or number > above)
        and (minimum is None or number >= minimum)
        and (below is None or number < below)
        and (maximum is None or number <= maximum)
    )
    if not (math.isfinite(number) and is_within):
        raise ValueError(f"{name} must be {range_text or 'finite'}, got {number}")
    return number


def check_flag(name: str, value: object) -> bool:
    """Return `value` if it is True or False.

    Raises:
        TypeError: `value` is something else.

    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return value


def check_text(name: str, value: object) -> str:
    """Return `value` if it is a string that holds more than white space.

    Raises:
        TypeError: `value` is not a string.
        ValueError: `value` is empty.

    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {shown(value)}")
    if not value.strip():
        raise ValueError(f"{name} must contain text, got {value!r}")
    return value


def check_optional_text(name: str, value: object) -> str | None:
    """Return `value` if it is None, or a string that holds more than white space; see `check_text`."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string or None, got {shown(value)}")
    if not value.strip():
        raise ValueError(f"{name} must contain text, or be None, got {value!r}")
    return value


def check_path(name: str, value: object) -> str:
    """Return `value` as a string if it is the path of a file or folder.

    Raises:
        TypeError: `value` is neither a string nor a path.
        ValueError: `value` is empty.

    """
    path = os.fspath(cast("os.PathLike[str]", value)) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str):
        raise TypeError(f"{name} must be a path (a string or pathlib.Path), got {shown(value)}")
    if not path:
        raise ValueError(f"{name} must be a path, got ''")
    return path


def check_choice(name: str, value: object, accepted: Iterable[str], where: str = "") -> str:
    """Return `value` if it is one of the accepted strings. The error suggests a similar one.

    Args:
        name: name of the argument, for the error.
        value: the argument.
        accepted: the accepted strings.
        where: text after them in the error, such as `" for task 'text'"`.

    Raises:
        TypeError: `value` is not a string.
        ValueError: `value` is another string.

    """
    accepted = list(accepted)
    text = f"{name} must be one of {', '.join(accepted)}{where}, got {shown(value)}"
    if not isinstance(value, str):
        raise TypeError(text)
    if value not in accepted:
        raise ValueError(text + did_you_mean(value, accepted))
    return value


def did_you_mean(name: str, accepted: Iterable[str], key: Callable[[str], str] = str) -> str:
    """Return `. Did you mean 'x'?` with the most similar accepted name, or an empty text if none is similar.

    Args:
        name: a name that is not accepted.
        accepted: accepted names.
        key: returns the form of a name in which names are compared, such as `str.lower`.

    """
    names = {key(each): each for each in accepted}
    close = difflib.get_close_matches(key(name), names, n=1)
    return f". Did you mean {names[close[0]]!r}?" if close else ""


def check_list(name: str, value: object, items: str, example: str) -> list[Any]:
    """Return the items of `value` as a list. A string, of which the items would be letters, is not a list.

    Args:
        name: name of the argument, for the error.
        value: the argument.
        items: what the list holds, for the error.
        example: an accepted value, for the error.

    Raises:
        TypeError: `value` is a string, a mapping, or cannot be iterated.

    Example:
        >>> check_list("policies", "h2o", "names of policies", "['h2o', 'snapkv']")
        Traceback (most recent call last):
        TypeError: policies must be a list of names of policies, such as ['h2o', 'snapkv'], got 'h2o'

    """
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of {items}, such as {example}, got {shown(value)}")
    return list(cast("Iterable[Any]", value))


def check_names(name: str, value: object, items: str, example: str) -> list[str]:
    """Return the items of `value` as a list of strings; see `check_list`.

    Raises:
        TypeError: `value` is not a list, or an item is not a string.

    """
    names = check_list(name, value, items, example)
    for index, item in enumerate(names):
        if not isinstance(item, str):
            raise TypeError(f"{name} must be a list of {items}, such as {example}, got {shown(item)} as item {index}")
    return names


def check_instance(name: str, value: object, kind: type[T], example: str, *, optional: bool = False) -> T:
    """Return `value` if it is an instance of a class.

    Args:
        name: name of the argument, for the error.
        value: the argument.
        kind: the class.
        example: how an instance is made, for the error.
        optional: whether the caller also accepts None, for the error.

    Raises:
        TypeError: `value` is something else.

    """
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        none = ", or None" if optional else ""
        raise TypeError(f"{name} must be {article} {kind.__name__}, such as {example}{none}, got {shown(value)}")
    return value


def check_instances(name: str, value: object, kind: type[T], example: str) -> list[T]:
    """Return the items of `value` as a list if they are instances of a class; see `check_list` and `check_instance`.

    Raises:
        TypeError: `value` is not a list, or an item is something else.

    """
    items = check_list(name, value, f"{kind.__name__}s", f"[{example}]")
    return [check_instance(f"{name}[{index}]", item, kind, example) for index, item in enumerate(items)]


def check_callable(name: str, value: object) -> None:
    """Check that `value` can be called.

    Raises:
        TypeError: `value` cannot be called.

    """
    if not callable(value):
        raise TypeError(f"{name} must be a function, got {shown(value)}")


def shown(value: object) -> str:
    """Return a value as text for errors: its representation if it is short, or else its beginning or its type."""
    if value is None or isinstance(value, (bool, int, float, Path)):
        return repr(value)
    if isinstance(value, (str, bytes, list, tuple, dict, set, frozenset)):
        text = repr(cast("object", value))
        return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}… ({type(value).__name__})"
    text = repr(value)
    is_short = len(text) <= _MAX_SHOWN and "\n" not in text
    return text if is_short else f"a value of type {type(value).__name__}"


def _int_range(minimum: int | None, maximum: int | None, unit: str) -> str:
    if minimum is not None and maximum is not None:
        text = f"from {minimum} to {maximum}"
    elif minimum is not None:
        text = f"at least {minimum}"
    else:
        text = "" if maximum is None else f"at most {maximum}"
    return f"{text} {unit}" if unit else text
