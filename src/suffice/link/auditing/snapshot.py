"""Restore everything that scoring may change: buffers and plain attributes of modules, and of the scoring function."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from types import MethodType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from suffice.link.auditing.norm_layers import norm_layers

MAX_COPIED_BYTES = 64 * 2**20
"""Larger tensors outside norm layers, such as the features of a graph, are not copied but must not change."""

_OWN_ATTRIBUTES = frozenset(("training", "_parameters", "_buffers", "_modules"))


@contextmanager
def preserve_state(module: nn.Module | None, scores: Iterable[object] = ()) -> Generator[Callable[[], None]]:
    """Disable gradients, and on exit restore modules, scoring functions and all random generators.

    Restored are the mode, the buffers and the plain attributes (numbers, tensors, arrays, and lists, dictionaries and
    sets of them) of every submodule, and the attributes of scoring functions that are objects or methods of objects.

    Args:
        module: module whose state is restored; None if there is none.
        scores: scoring functions whose attributes are restored.

    Yields:
        a function that restores the modules at once, but not the scoring functions, which may cache encodings.

    Raises:
        ValueError: a tensor that is too large to be copied has changed in place.

    """
    snapshot = _Snapshot(module, scores)
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield snapshot.restore_modules
        snapshot.check_large_tensors()
    finally:
        snapshot.restore_modules()
        snapshot.restore_scores()
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


class _Snapshot:
    """Copies of the state of modules and scoring functions."""

    def __init__(self, module: nn.Module | None, scores: Iterable[object]) -> None:
        self._modules = list(module.named_modules()) if module is not None else []
        self._modes = [(part, part.training) for _, part in self._modules]
        norms = norm_layers(module).values() if module is not None else ()
        self._norm_tensors = {id(buffer) for layer in norms for buffer in layer.buffers()}
        self._saved: dict[int, _SavedTensor] = {}
        # The tensors of a scripted module cannot be replaced by others.
        parts = [(name, part) for name, part in self._modules if not isinstance(part, torch.jit.ScriptModule)]
        self._buffers = [(part, dict(part._buffers)) for _, part in parts]  # pyright: ignore[reportPrivateUsage]
        for name, part in self._modules:
            for key, buffer in part._buffers.items():  # pyright: ignore[reportPrivateUsage]
                self._keep(f"{name}.{key}" if name else key, buffer)
        self._module_attributes = [(part, self._keep_attributes(name, part)) for name, part in parts]
        owners = [owner for owner in map(_owner, scores) if owner is not None]
        self._score_attributes = [(owner, self._keep_attributes("score", owner)) for owner in owners]

    def restore_modules(self) -> None:
        """Restore modes, buffers and attributes of the modules, and all tensors."""
        for part, training in self._modes:
            part.training = training
        for part, buffers in self._buffers:
            own = part._buffers  # pyright: ignore[reportPrivateUsage]
            if own.keys() != buffers.keys() or any(own[key] is not buffers[key] for key in buffers):
                own.clear()
                own.update(buffers)
        _restore_attributes(self._module_attributes)
        with torch.no_grad():
            for saved in self._saved.values():
                saved.restore()

    def restore_scores(self) -> None:
        """Restore the attributes of the scoring functions."""
        _restore_attributes(self._score_attributes)

    def check_large_tensors(self) -> None:
        """Raise ValueError if a tensor without a copy has changed."""
        if changed := [saved.name for saved in self._saved.values() if saved.has_changed_for_good()]:
            raise ValueError(
                f"score must not change tensors of more than {MAX_COPIED_BYTES >> 20} MiB, because the audit cannot "
                f"restore them, got a change of {', '.join(changed)}. Score with a copy of the model, or without "
                f"updates of its memory."
            )

    def _keep_attributes(self, name: str, owner: object) -> dict[str, Any]:
        return {
            key: self._copy(f"{name}.{key}" if name else key, value)
            for key, value in vars(owner).items()
            if _is_state(key)
        }

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        if tensor is None or id(tensor) in self._saved or tensor.layout != torch.strided:
            return
        is_small = tensor.numel() * tensor.element_size() <= MAX_COPIED_BYTES or id(tensor) in self._norm_tensors
        self._saved[id(tensor)] = _SavedTensor(name, tensor, is_small)

    def _copy(self, name: str, value: Any) -> Any:
        """Return a value that `_rebuild` turns into the state it has now."""
        if isinstance(value, Tensor):
            self._keep(name, value)
            return value
        if isinstance(value, np.ndarray):
            return _Array(value) if value.nbytes <= MAX_COPIED_BYTES else value
        if isinstance(value, dict):
            items = cast(dict[Any, Any], value).items()
            return _Container(value, {key: self._copy(f"{name}[{key!r}]", inner) for key, inner in items})
        if isinstance(value, (list, deque)):
            return _Container(value, [self._copy(name, inner) for inner in cast(list[Any], value)])
        if isinstance(value, set):
            return _Container(value, set(cast(set[Any], value)))
        if type(value) is tuple:
            for inner in cast(tuple[Any, ...], value):
                self._copy(name, inner)  # a tuple cannot change, but its tensors can
        return value


class _SavedTensor:
    """A tensor, with a copy of its content unless it is too large."""

    def __init__(self, name: str, tensor: Tensor, has_copy: bool) -> None:
        self.name, self.tensor = name, tensor
        self._copy = tensor.detach().clone() if has_copy else None
        self._version = _version(tensor)

    def restore(self) -> None:
        # The version does not count changes of running statistics by BatchNorm.
        if self._copy is not None and not torch.equal(self.tensor, self._copy):
            self.tensor.copy_(self._copy)

    def has_changed_for_good(self) -> bool:
        return self._copy is None and self._version != _version(self.tensor)


class _Container:
    """The content of a dictionary, list, deque or set."""

    def __init__(self, original: Any, content: Any) -> None:
        self.original, self.content = original, content

    def rebuild(self) -> Any:
        if isinstance(self.content, dict):
            content: Any = {key: _rebuild(value) for key, value in cast(dict[Any, Any], self.content).items()}
        elif isinstance(self.content, set):
            content = cast(set[Any], self.content)
        else:
            content = [_rebuild(value) for value in self.content]
        self.original.clear()
        (self.original.extend if isinstance(self.content, list) else self.original.update)(content)
        return self.original


class _Array:
    """The content of an array."""

    def __init__(self, original: Any) -> None:
        self.original, self.content = original, original.copy()

    def rebuild(self) -> Any:
        self.original[...] = self.content
        return self.original


def _is_state(attribute: str) -> bool:
    return attribute not in _OWN_ATTRIBUTES and "_hooks" not in attribute


def _rebuild(value: Any) -> Any:
    return value.rebuild() if isinstance(value, (_Container, _Array)) else value


def _owner(score: object) -> object | None:
    """Return the object whose attributes a scoring function may change; None for plain functions and modules."""
    owner = score.__self__ if isinstance(score, MethodType) else score
    is_object = (
        hasattr(owner, "__dict__") and not isinstance(owner, (nn.Module, type)) and not hasattr(owner, "__code__")
    )
    return owner if is_object else None


def _version(tensor: Tensor) -> int | None:
    """Return how often a tensor was changed in place; None if torch does not count it."""
    return None if tensor.is_inference() else tensor._version


def _restore_attributes(saved: Iterable[tuple[object, dict[str, Any]]]) -> None:
    for owner, values in saved:
        attributes = vars(owner)
        for key in [key for key in attributes if key not in values and _is_state(key)]:
            del attributes[key]
        for key, value in values.items():
            attributes[key] = _rebuild(value)
