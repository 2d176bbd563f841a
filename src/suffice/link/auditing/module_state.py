"""Run a module in training or eval mode without dropout, and find the modules behind a scoring function."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd as TorchDropout  # pyright: ignore[reportPrivateUsage]
from torch.overrides import TorchFunctionMode

from suffice.arguments import shown
from suffice.link.auditing.norm_layers import norm_layers
from suffice.link.auditing.references import is_weak, references

_DROPOUT_FUNCTIONS = frozenset(
    ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
)
_MAX_DEPTH = 4  # of references that are followed from a scoring function to its modules


class WithoutDropout(TorchFunctionMode):
    """Makes the dropout functions of torch return their input, also where a model ignores its mode."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, unless it is dropout."""
        if getattr(func, "__name__", "").removesuffix("_") in _DROPOUT_FUNCTIONS:
            return args[0] if args else (kwargs or {})["input"]
        if not kwargs:  # most calls, which also read attributes of tensors
            return func(*args)
        return func(*args, **({**kwargs, "dropout_p": 0.0} if "dropout_p" in kwargs else kwargs))


@contextmanager
def norm_mode(module: nn.Module | None, *, training: bool, frozen: set[str]) -> Generator[None]:
    """Put the norm layers into training or eval mode, and everything else (such as dropout) into eval mode.

    The mode of every submodule is restored on exit.

    Args:
        module: module whose modes are changed; None to change nothing.
        training: whether norm layers use batch statistics (as in training) or stored ones.
        frozen: names of norm layers that stay in eval mode.

    """
    if module is None:
        yield
        return
    modes = _training_modes(module)
    for part in module.modules():
        part.training = False
    for name, layer in norm_layers(module).items():
        for inner_name, part in layer.named_modules():
            path = f"{name}.{inner_name}" if inner_name else name
            part.training = training and path not in frozen
    try:
        yield
    finally:
        _restore_modes(modes)


@contextmanager
def training_mode(module: nn.Module, *, frozen: set[str]) -> Generator[None]:
    """Put a module into training mode as a training does, but with dropout in eval mode.

    The mode of every submodule is restored on exit.

    Args:
        module: module whose modes are changed by its own method `train`.
        frozen: names of norm layers that stay in eval mode.

    """
    modes = _training_modes(module)
    try:
        module.train()
        for name, part in module.named_modules():
            if name in frozen or _is_random(part):
                part.training = False
        yield
    finally:
        _restore_modes(modes)


@dataclass(frozen=True)
class Modes:
    """How the module behind a scoring function is run in training and in eval mode.

    Args:
        module: module behind the scoring function; None if there is none.
        frozen: names of the layers that stay in eval mode.
        whole_tree: whether training mode is that of all submodules except dropout, or of the norm layers alone.

    """

    module: nn.Module | None
    frozen: set[str]
    whole_tree: bool = False

    def evaluation(self) -> AbstractContextManager[None]:
        """Put the module into eval mode."""
        return norm_mode(self.module, training=False, frozen=self.frozen)

    def training(self) -> AbstractContextManager[None]:
        """Put the module into training mode, without dropout."""
        if self.module is not None and self.whole_tree:
            return training_mode(self.module, frozen=self.frozen)
        return norm_mode(self.module, training=True, frozen=self.frozen)


def layers_kept_in_eval_mode(module: nn.Module) -> set[str]:
    """Return the names of the submodules that stay in eval mode when `module.train()` is called."""
    modes = _training_modes(module)
    try:
        module.train()
        return {name for name, part in module.named_modules() if not part.training}
    finally:
        _restore_modes(modes)


def find_modules(scores: Iterable[object], call: Callable[[], object] | None = None) -> nn.Module | None:
    """Return the modules behind scoring functions as one module, or None if there are none.

    These are the modules that the functions refer to (in their closures, their global variables and the attributes of
    their objects) and those that are called while they score.

    Args:
        scores: scoring functions.
        call: function that scores a few pairs; None to follow references only.

    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    for score in scores:
        found.update((id(module), module) for module in _referenced_modules(score, seen, _MAX_DEPTH))

    modes: list[tuple[nn.Module, bool]] = []

    def record(module: nn.Module, _inputs: object) -> None:
        found.setdefault(id(module), module)
        modes.append((module, module.training))
        module.training = False  # so that running statistics do not change

    if call is not None:
        handle = nn.modules.module.register_module_forward_pre_hook(record)
        try:
            call()
        finally:
            handle.remove()
            _restore_modes(modes[::-1])
    inner = {id(part) for module in found.values() for part in module.modules() if part is not module}
    return join_modules([module for key, module in found.items() if key not in inner])


def join_modules(modules: Sequence[nn.Module]) -> nn.Module | None:
    """Return a module that contains all modules: the module itself if it is the only one, None if there is none."""
    if not modules:
        return None
    if len(modules) == 1 and next(modules[0].children(), None) is not None:
        return modules[0]
    return nn.ModuleList(modules)


def check_module(module: object) -> nn.Module | Sequence[nn.Module] | None:
    """Return the argument `module` of an audit if it is a module, a list of modules, or None.

    Raises:
        TypeError: it is something else.

    """
    if module is None or isinstance(module, nn.Module):
        return module
    if not isinstance(module, Iterable) or isinstance(module, (str, bytes, Mapping)):
        raise TypeError(f"module must be a module, a list of modules or None, got {shown(module)}")
    modules = list(cast(Iterable[Any], module))
    for index, part in enumerate(modules):
        if not isinstance(part, nn.Module):
            raise TypeError(f"module must be a module, a list of modules or None, got {shown(part)} as item {index}")
    return modules


def runs_in_its_mode(module: nn.Module, call: Callable[[], object]) -> bool:
    """Return whether a module keeps its mode while a function runs, which may call `module.eval()`, for example."""
    modes = {id(part): part.training for part in module.modules()}
    changed: list[bool] = []

    def record(part: nn.Module, _inputs: object) -> None:
        changed.append(modes.get(id(part), part.training) != part.training)

    handle = nn.modules.module.register_module_forward_pre_hook(record)
    try:
        call()
    finally:
        handle.remove()
    changed += [modes[id(part)] != part.training for part in module.modules()]
    return not any(changed)


def _referenced_modules(value: object, seen: set[int], depth: int) -> Iterator[nn.Module]:
    if is_weak(value):
        return
    if isinstance(value, nn.Module):
        yield value
        return
    if depth == 0 or id(value) in seen or isinstance(value, (Tensor, ModuleType, type, str, bytes)):
        return
    seen.add(id(value))
    for inner in references(value):
        yield from _referenced_modules(inner, seen, depth - 1)


def _is_random(part: nn.Module) -> bool:
    """Return whether a module only drops values, or drops values in addition to what it does in eval mode."""
    if isinstance(part, (TorchDropout, nn.RNNBase, nn.RReLU)):
        return True
    kind = getattr(part, "original_name", type(part).__name__)  # the class of a scripted module
    has_content = next(part.children(), None) is not None or next(part.parameters(), None) is not None
    return "drop" in kind.lower() and not has_content


def _training_modes(module: nn.Module) -> list[tuple[nn.Module, bool]]:
    return [(part, part.training) for part in module.modules()]


def _restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for part, training in modes:
        part.training = training
