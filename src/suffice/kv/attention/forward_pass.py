"""Tell caches when a forward pass of their model begins and ends."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from transformers import PreTrainedModel

from suffice.kv.attention.implementation import restore_implementation

_observed: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@runtime_checkable
class PassObserver(Protocol):
    """A cache that is told when a forward pass over it begins and ends."""

    def begin_pass(self, decoder: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Prepare for a forward pass of a decoder with these keyword arguments."""
        ...

    def end_pass(self, *, failed: bool) -> None:
        """Finish a forward pass. `failed` means that it raised an exception."""
        ...


def observe_passes(decoder: nn.Module) -> None:
    """Tell every `PassObserver` among the arguments of a module when a forward pass of the module begins and ends."""
    if decoder not in _observed:
        _observed.add(decoder)
        begin: Any = _begin_pass
        end: Any = _end_pass
        decoder.register_forward_pre_hook(begin, with_kwargs=True)
        decoder.register_forward_hook(end, with_kwargs=True, always_call=True)


def stop_observing(decoder: nn.Module) -> None:
    """Undo `observe_passes`."""
    _observed.discard(decoder)
    for hooks in (decoder._forward_pre_hooks, decoder._forward_hooks):  # pyright: ignore[reportPrivateUsage]
        for number in [number for number, hook in hooks.items() if hook in (_begin_pass, _end_pass)]:
            del hooks[number]


@torch.compiler.disable
def _begin_pass(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if module not in _observed:
        # A copy of a model has the hooks and the attention implementation of the original, but no cache.
        stop_observing(module)
        if isinstance(module, PreTrainedModel):
            restore_implementation(module)
        return
    for observer in _find_observers(args, kwargs):
        observer.begin_pass(module, kwargs)


@torch.compiler.disable
def _end_pass(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
    for observer in _find_observers(args, kwargs):
        observer.end_pass(failed=output is None)


def _find_observers(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[PassObserver]:
    for argument in (*args, *kwargs.values()):
        cache = getattr(argument, "self_attention_cache", argument)  # of an encoder-decoder model
        if isinstance(cache, PassObserver):
            yield cache
