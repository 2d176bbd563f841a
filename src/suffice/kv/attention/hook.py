"""The attention function through which a cache sees queries: registered by name, selected per model.

It computes what the model's own implementation computes. For keys that come from a `CompressedCache` it hands the call
to the cache's layer first, which adds what the cache holds; for all others it only passes the call on.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from suffice.kv.attention.padding import Padding

PREFIX = "suffice_"
SUPPORTED = ("sdpa", "eager")

_attached: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Call:
    """One attention call over the keys of a cache layer.

    Args:
        module: the attention module.
        query: [batch, heads, new, dim], after rotary embedding.
        key: [batch, kv_heads, new, dim], of the new tokens, after rotary embedding.
        value: [batch, kv_heads, new, value_dim], of the new tokens.
        mask: the model's mask over the new tokens [batch, 1, new, new]: True or 0 for what may be read, False or a
            large negative number for what may not; None if each may read all before it.
        scaling: factor on the query-key product; None for 1/√dim.
        options: further arguments of the attention function.
        base: name of the model's own attention implementation.
        memo: statistics of the call that several layers share, each of which reads all of it; None for none.

    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float | None
    options: dict[str, Any] = field(default_factory=dict)
    base: str = "sdpa"
    memo: dict[Any, Any] | None = None

    @property
    def padding(self) -> Padding | None:
        """Which new tokens are padding; None if none are."""
        if self.mask is None:
            return None
        if not hasattr(self.mask, "_suffice_padding"):
            last = self.mask[:, 0, -1, -self.key.shape[2] :].expand(len(self.key), -1)
            # Kept with the mask, which all layers get.
            self.mask._suffice_padding = Padding.of(last if last.dtype == torch.bool else last == 0)  # pyright: ignore[reportAttributeAccessIssue]
        return self.mask._suffice_padding  # pyright: ignore[reportAttributeAccessIssue]


class Observer(Protocol):
    """What a cache layer does with an attention call over its keys."""

    def before(self, call: Call) -> Call | None:
        """Check the call and return it over all that it shall read; None if the layer computes it itself."""
        ...

    def attend(self, call: Call) -> Tensor:
        """Compute the call, [batch, new, heads, value_dim]."""
        ...

    def after(self, call: Call, attention: Tensor | None) -> None:
        """Take what the call showed, and the attention weights if they were computed."""
        ...


def mark(keys: Tensor, observer: Observer) -> Tensor:
    """Return a view of the keys that leads the attention function to the layer they come from."""
    view = keys.view_as(keys)
    # A weak reference: the layer owns the keys, and a cycle would keep them until a garbage collection.
    view._suffice_layer = weakref.ref(observer)  # pyright: ignore[reportAttributeAccessIssue]
    return view


def _observer(keys: Tensor) -> Observer | None:
    reference = getattr(keys, "_suffice_layer", None)
    return None if reference is None else reference()


def _attention_function(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        layer = _observer(key)
        call = Call(module, query, key, value, attention_mask, options.get("scaling"), options, base)
        return compute(call) if layer is None else observed(call, layer)

    return attend


def observed(call: Call, layer: Observer) -> tuple[Tensor, Tensor | None]:
    """Compute an attention call over all that a cache layer holds, and show it to the layer."""
    whole = layer.before(call)
    output, attention = (layer.attend(call), None) if whole is None else compute(whole)
    layer.after(call, attention)
    return output, attention


def compute(call: Call) -> tuple[Tensor, Tensor | None]:
    """Compute an attention call with the model's own implementation."""
    implementation = _implementation(call.base, call.module)
    return implementation(call.module, call.query, call.key, call.value, call.mask, **call.options)


def _mask_function(base: str) -> Callable[..., Any]:
    function = ALL_MASK_ATTENTION_FUNCTIONS[base]

    def make(*arguments: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
        mask = function(*arguments, attention_mask=attention_mask, **options)
        if mask is not None and attention_mask is not None:
            # Which tokens are padding can't be told from a mask whose queries are all padding themselves.
            first = int(options["kv_offset"])
            valid = attention_mask[:, first : first + int(options["kv_length"])].bool()
            mask._suffice_padding = Padding.of(valid)
        return mask

    return make


def _implementation(base: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if base != "eager":
        return ALL_ATTENTION_FUNCTIONS[base]
    # Eager attention is not registered by name: each model's own file defines it.
    return sys.modules[type(module).__module__].eager_attention_forward


class Attachment:
    """Selects our attention function on a model for as long as this object, or a copy of it, lives.

    Args:
        decoder: the transformer whose attention modules use the cache.

    Raises:
        ValueError: the model's attention implementation is not one that is supported.

    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        name = _selected(decoder)
        base = name.removeprefix(PREFIX)
        if base not in SUPPORTED:
            raise ValueError(
                f"the model's attn_implementation is {name!r}; accepted: {', '.join(SUPPORTED)}. "
                "Call model.set_attn_implementation('sdpa') first"
            )
        own = PREFIX + base
        if own not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(own, _attention_function(base))
            AttentionMaskInterface.register(own, _mask_function(base))
        if name != own:
            decoder.set_attn_implementation(own)
        _attached[decoder] = _attached.get(decoder, 0) + 1
        self._decoder = weakref.ref(decoder)
        self._finalizer = weakref.finalize(self, _detach, self._decoder)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """Return this same object: a copied cache keeps the function selected too."""
        return self

    @property
    def active(self) -> bool:
        """Whether the model still uses our attention function."""
        decoder = self._decoder()
        return decoder is not None and _selected(decoder).startswith(PREFIX)


def _selected(decoder: PreTrainedModel) -> str:
    return str(decoder.config._attn_implementation)  # pyright: ignore[reportPrivateUsage]


def _detach(reference: weakref.ref[PreTrainedModel]) -> None:
    decoder = reference()
    if decoder is None:
        return
    _attached[decoder] -= 1
    name = _selected(decoder)
    if _attached[decoder] == 0:
        del _attached[decoder]
        if name.startswith(PREFIX):
            decoder.set_attn_implementation(name.removeprefix(PREFIX))
