"""Restore everything that scoring may change: modules, scoring functions, and the objects that they refer to."""

from __future__ import annotations

import functools
import random
import threading
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from suffice.link.auditing.norm_layers import norm_layers
from suffice.link.auditing.references import (
    call_method,
    cells,
    is_installed,
    is_of_standard_library,
    is_weak,
    used_globals,
)
from suffice.link.auditing.saved_values import (
    Saved,
    SavedArray,
    SavedAttributes,
    SavedCell,
    SavedContainer,
    SavedGenerator,
    SavedGlobals,
    SavedSlots,
    SavedTensor,
    Watched,
    WatchedArray,
    WatchedTensor,
    is_state,
)

MAX_COPIED_BYTES = 64 * 2**20
"""Larger tensors and arrays, such as the features of a graph, are not copied but must not change."""

_MAX_TOTAL_BYTES = 2**30  # of all copies; what comes later is not copied
_MAX_ENTRIES = 100_000  # of a container whose entries are restored too, not only which ones it has
_THREAD_TYPES = (type(threading.Lock()), type(threading.RLock()), threading.Thread, threading.Event)


class State(Protocol):
    """Restores the state of the modules, or also that of the scoring functions, which may cache encodings."""

    def __call__(self, *, with_scores: bool = False) -> None:
        """Restore the state."""
        ...


@contextmanager
def preserve_state(module: nn.Module | None, scores: Iterable[object] = ()) -> Generator[State]:
    """Disable gradients, and on exit restore modules, scoring functions and all random generators.

    Restored are the mode, the parameters, the buffers and the attributes of every submodule; the variables, the
    attributes and the global variables of scoring functions; and all that these refer to: tensors, arrays, containers,
    random generators and objects with attributes. Objects that are shared with other threads, and the global variables
    of installed packages, are left alone.

    Args:
        module: module whose state is restored; None if there is none.
        scores: scoring functions whose state is restored.

    Yields:
        a function that restores the state at once.

    Raises:
        ValueError: a tensor or array that is too large to be copied has changed in place, or a module has parameters
            that the first call initializes.

    """
    scores = list(scores)
    modules = _Snapshot([] if module is None else [module])
    functions = _Snapshot(scores, known=modules)
    modes = [(part, part.training) for part in [*modules.modules, *functions.modules]]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []

    def restore(*, with_scores: bool = False, with_generators: bool = False) -> None:
        modules.restore(with_generators)
        if with_scores:
            functions.restore(with_generators)

    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield restore
        if changed := [*modules.changed_for_good(), *functions.changed_for_good()]:
            raise ValueError(
                f"score must not change tensors or arrays of more than {MAX_COPIED_BYTES >> 20} MiB, because the audit "
                f"cannot restore them, got a change of {', '.join(changed)}. Score with a copy of the model, or "
                f"without updates of its memory."
            )
    finally:
        restore(with_scores=True, with_generators=True)
        for part, training in modes:
            part.training = training
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


class _Snapshot:
    """Copies of the state of objects and of all that they refer to.

    Args:
        roots: modules, functions or objects.
        known: snapshot whose objects are not copied again.

    """

    def __init__(self, roots: Iterable[object], known: _Snapshot | None = None) -> None:
        self.modules: list[nn.Module] = []
        self._saved: list[Saved] = []
        self._watched: list[Watched] = []
        self._seen: dict[int, object] = dict(known._seen) if known is not None else {}  # alive, so that ids stay valid
        self._copied_bytes = known._copied_bytes if known is not None else 0
        self._norm_tensors: set[int] = set()
        self._to_visit: deque[tuple[str, object]] = deque()
        for root in roots:
            if isinstance(root, FunctionType) and is_installed(root):
                self._save_function("score", root)
            self._to_visit.append(("" if isinstance(root, nn.Module) else "score", root))
        while self._to_visit:
            self._visit(*self._to_visit.popleft())

    def restore(self, with_generators: bool) -> None:
        """Restore everything that has changed, or all but random generators, so that noise stays random."""
        with torch.no_grad():
            for saved in self._saved:
                if with_generators or not isinstance(saved, SavedGenerator):
                    saved.restore()

    def changed_for_good(self) -> list[str]:
        """Return the names of tensors and arrays that have changed, but were too large to be copied."""
        return [watched.name for watched in self._watched if watched.has_changed()]

    def _visit(self, name: str, value: object) -> None:
        # A weak proxy comes first: it has the class of what it stands for, which may be gone.
        if value is None or is_weak(value) or isinstance(value, (str, bytes, int, float, complex, type, ModuleType)):
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._save_tensor(name, value)
        elif isinstance(value, np.ndarray):
            self._save_array(name, cast(Any, value))
        elif isinstance(value, (dict, list, deque, set)):
            self._saved.append(SavedContainer(cast(Any, value)))
            self._visit_entries(name, value)
        elif isinstance(value, (tuple, frozenset)):
            self._visit_entries(name, value)
        elif isinstance(value, FunctionType):
            if not is_installed(value):
                self._save_function(name, value)
        elif isinstance(value, MethodType):
            self._to_visit += [(name, value.__self__), (name, value.__func__)]
        elif isinstance(value, functools.partial):
            self._to_visit += [(name, inner) for inner in (value.func, *value.args, *value.keywords.values())]
        elif isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)):
            self._saved.append(SavedGenerator(value))
        elif isinstance(value, nn.Module):
            self._save_module(name, value)
        elif not is_of_standard_library(type(value)):
            self._save_object(name, value)

    def _visit_entries(self, name: str, value: object) -> None:
        entries: Iterable[tuple[str, object]]
        if isinstance(value, dict):
            entries = [(f"{name}[{key!r}]", inner) for key, inner in cast(dict[Any, Any], value).items()]
        else:
            entries = [(name, inner) for inner in cast(Iterable[Any], value)]
        if len(entries) <= _MAX_ENTRIES:
            self._to_visit += entries

    def _save_function(self, name: str, function: FunctionType) -> None:
        self._to_visit += [(name, inner) for inner in (*(function.__defaults__ or ()), function.__kwdefaults__)]
        self._saved.append(SavedContainer(function.__dict__))
        self._to_visit += [(f"{name}.{key}", inner) for key, inner in function.__dict__.items()]
        for key, cell in cells(function).items():
            self._saved.append(SavedCell(cell))
            self._to_visit.append((key, cell.cell_contents))
        used = used_globals(function)
        self._saved.append(SavedGlobals(function.__globals__, used))
        self._to_visit += used.items()

    def _save_module(self, name: str, module: nn.Module) -> None:
        self.modules.append(module)
        self._norm_tensors |= {
            id(buffer) for layer in norm_layers(module).values() for buffer in layer.buffers(recurse=True)
        }
        prefix = f"{name}." if name else ""
        if isinstance(module, torch.jit.ScriptModule):  # its tensors cannot be replaced by others
            inner: list[tuple[str, object]] = [*module.named_buffers(), *module.named_parameters()]
            self._to_visit += [(prefix + key, value) for key, value in inner]
            self.modules += [part for part in module.modules() if part is not module]
            return
        attributes = {key: value for key, value in vars(module).items() if is_state(key)}
        self._saved.append(SavedAttributes(vars(module), attributes))
        for group in ("_buffers", "_modules", "_parameters"):
            entries: dict[str, object] = attributes.pop(group)
            self._saved.append(SavedContainer(entries))
            self._seen[id(entries)] = entries
            self._to_visit += [(prefix + key, value) for key, value in entries.items()]
        self._to_visit += [(prefix + key, value) for key, value in attributes.items()]
        self._to_visit.append((name, type(module).forward))

    def _save_object(self, name: str, value: object) -> None:
        attributes: dict[str, Any] = getattr(value, "__dict__", {})
        slots = {key: getattr(value, key) for key in _slots(value) if hasattr(value, key)}
        inner = {**attributes, **slots}
        if any(isinstance(content, _THREAD_TYPES) for content in inner.values()):
            return
        if hasattr(value, "__dict__"):
            self._saved.append(SavedAttributes(attributes, attributes))
        if slots:
            self._saved.append(SavedSlots(value, slots))
        self._to_visit += [(f"{name}.{key}", content) for key, content in inner.items()]
        if (called := call_method(value)) is not None:
            self._to_visit.append((name, called))

    def _save_tensor(self, name: str, tensor: Tensor) -> None:
        if isinstance(tensor, (UninitializedBuffer, UninitializedParameter)):
            raise ValueError(
                f"module must be initialized, but the first call would initialize {name}: score a batch before the "
                f"audit"
            )
        if tensor.layout != torch.strided or tensor.is_meta:
            values = "_values" if tensor.layout == torch.sparse_coo else "values"
            self._to_visit += [] if tensor.is_meta else [(name, getattr(tensor, values)())]
            return
        if id(tensor) in self._norm_tensors or self._has_room(tensor.numel() * tensor.element_size()):
            self._saved.append(SavedTensor(tensor))
        else:
            self._watched.append(WatchedTensor(name, tensor))

    def _save_array(self, name: str, array: np.ndarray[Any, Any]) -> None:
        if self._has_room(array.nbytes):
            self._saved.append(SavedArray(array))
        elif array.flags.writeable and not array.dtype.hasobject:
            self._watched.append(WatchedArray(name, array))

    def _has_room(self, num_bytes: int) -> bool:
        """Return whether a copy of so many bytes is allowed, and count it."""
        if num_bytes > MAX_COPIED_BYTES or self._copied_bytes + num_bytes > _MAX_TOTAL_BYTES:
            return False
        self._copied_bytes += num_bytes
        return True


def _slots(value: object) -> list[str]:
    """Return the names of the attributes that the classes of an object, written in Python, declare as slots."""
    declared = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for slots in declared for name in ([slots] if isinstance(slots, str) else slots)]
    return [name for name in names if name not in ("__dict__", "__weakref__") and not name.startswith("__")]
