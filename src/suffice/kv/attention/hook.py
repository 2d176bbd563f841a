"""The attention function that gives cache layers access to the queries. It is registered and selected on a model.

If the keys come from a cache layer, the function passes the call to that layer. Otherwise, it calls the model's own
implementation.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from suffice.kv.attention.call import AttentionCall, attach_padding, run_attention
from suffice.kv.attention.forward_pass import observe_passes, stop_observing
from suffice.kv.attention.implementation import PREFIX, restore_implementation, select_hook, selected_implementation
from suffice.kv.attention.masks import mask_format

# Caches may be made and deleted in several threads. The lock is reentrant, because the garbage collector may finalize a
# deleted cache at any time, also in a thread that holds the lock.
_lock = threading.RLock()
_num_hooks: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


class AttentionObserver(Protocol):
    """Computes the attention calls whose keys were marked with `attach_observer`; usually a cache layer."""

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Compute a call.

        Returns:
            The output [batch, new, heads, value_dim], and the attention weights if they were computed.

        """
        ...


def attach_observer(keys: Tensor, observer: AttentionObserver) -> Tensor:
    """Return a view of the keys that refers to the observer, so that the attention function finds it."""
    view = keys.view_as(keys)
    # The reference is weak, because a reference cycle would keep the keys in memory until a garbage collection.
    view._suffice_observer = weakref.ref(observer)  # pyright: ignore[reportAttributeAccessIssue]
    return view


class _ExpectedCalls(threading.local):
    """The observer of the next attention call of a module, in each thread: several threads may run one model."""

    def __init__(self) -> None:
        self.observers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[AttentionObserver]]
        self.observers = weakref.WeakKeyDictionary()


_expected = _ExpectedCalls()


def expect_call(module: nn.Module, observer: AttentionObserver) -> None:
    """Have an observer compute the next attention call of a module, regardless of its keys."""
    _expected.observers[module] = weakref.ref(observer)


def forget_call(module: nn.Module) -> None:
    """Undo `expect_call`."""
    _expected.observers.pop(module, None)


def _find_observer(keys: Tensor, module: nn.Module) -> AttentionObserver | None:
    reference = getattr(keys, "_suffice_observer", None) or _expected.observers.pop(module, None)
    return None if reference is None else reference()


def _attention_function(implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        scaling = options.get("scaling")
        call = AttentionCall(module, query, key, value, attention_mask, scaling, options, implementation)
        observer = _find_observer(key, module)
        return run_attention(call) if observer is None else observer.attend(call)

    # `torch.compile` would divide the code of a cache into dozens of graphs, and compile many of them again.
    not_compiled: Any = torch.compiler.disable(attention)
    return not_compiled


def _mask_function(implementation: str) -> Callable[..., Any]:
    def make_mask_with_padding(*arguments: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
        mask = ALL_MASK_ATTENTION_FUNCTIONS[implementation](*arguments, attention_mask=attention_mask, **options)
        if mask is not None:
            # The padding cannot be read from the mask itself if all queries of a row are padding, or if a window hides
            # the first tokens from the last one.
            first, valid = int(options["kv_offset"]), attention_mask
            if valid is not None:
                valid = valid[:, first : first + int(options["kv_length"])].bool()
            attach_padding(mask, valid)
        return mask

    return make_mask_with_padding


class AttentionHook:
    """Selects the attention function of this module on a model while this object exists.

    Args:
        decoder: the transformer whose attention modules use the cache.

    Raises:
        ValueError: the attention implementation of the model is not supported.

    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        with _lock:
            self._select(decoder)
            self._decoder = weakref.ref(decoder)
            self._finalizer = weakref.finalize(self, _remove_hook, self._decoder)

    @staticmethod
    def _select(decoder: PreTrainedModel) -> None:
        selected = selected_implementation(decoder)
        original = selected.removeprefix(PREFIX)
        if mask_format(original) is None:
            raise ValueError(
                "attn_implementation of the model must be 'sdpa', 'eager', 'flex_attention', FlashAttention or an "
                f"implementation with the mask function of one of these, got {selected!r}. Call "
                "model.set_attn_implementation('sdpa') first"
            )
        hooked = PREFIX + original
        if hooked not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(hooked, _attention_function(original))
            AttentionMaskInterface.register(hooked, _mask_function(original))
        if selected != hooked:
            select_hook(decoder, original)
        observe_passes(decoder)
        _num_hooks[decoder] = _num_hooks.get(decoder, 0) + 1

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionHook:
        """Return this object. Copies of a cache share it, so that the function stays selected until all are deleted."""
        return self

    def belongs_to(self, decoder: nn.Module) -> bool:
        """Return whether this object was made for a decoder."""
        return self._decoder() is decoder

    @property
    def is_active(self) -> bool:
        """Whether the model still uses the attention function of this module."""
        decoder = self._decoder()
        return decoder is not None and selected_implementation(decoder).startswith(PREFIX)


def _remove_hook(reference: weakref.ref[PreTrainedModel]) -> None:
    decoder = reference()
    if decoder is None:
        return
    with _lock:
        _num_hooks[decoder] -= 1
        if _num_hooks[decoder] == 0:
            del _num_hooks[decoder]
            stop_observing(decoder)
            restore_implementation(decoder)
