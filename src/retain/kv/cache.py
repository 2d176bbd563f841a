"""The cache: pass it as `past_key_values` to an unmodified `generate`, and it keeps what the policy keeps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from retain.kv.accounting import CacheReport
from retain.kv.allocation import Protection
from retain.kv.attention import Attachment
from retain.kv.layer import RetainLayer
from retain.kv.named import DEFAULT_POLICY, get_policy
from retain.kv.policy import Policy
from retain.kv.rotary import rotaries_of


class RetainCache(Cache):
    """A KV cache that keeps a budget of each prompt, chosen by a policy.

    The first forward pass over the cache is the prefill: each layer evicts right after its own attention has
    been computed over the whole prompt, so at most one layer is ever held in full. Tokens that come later
    (a question asked of a compressed document, the answer) are appended and kept. Kept entries keep their
    positions. Layers with a sliding window stay as they are.

    Args:
        model: the transformers model that the cache is for. While a cache of it lives, its attention calls
            go through a function of ours that computes the same.
        policy: a name (`retain kv policies` lists them) or a `Policy`.
        budget: tokens to keep of each row and head (a whole number), or a fraction of the prompt (0 to 1.0).
        sinks: first tokens that are always kept; None means 4, fewer if the budget is below 8.
        window: last tokens that are always kept; None means what the policy's authors keep, else 15 % of
            the budget, between 4 and 32.
        measure_capacity: measure the share of the capacity that the kept entries carry, under the default
            policy's objective so that policies compare. Costs about as much as scoring.

    Raises:
        TypeError, ValueError: see each argument's accepted values in the message.

    Example:
        >>> cache = RetainCache(model, policy="capkv", budget=0.25)       # doctest: +SKIP
        >>> model.generate(**inputs, past_key_values=cache)               # doctest: +SKIP
        >>> print(cache.report())                                         # doctest: +SKIP

    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: str | Policy = DEFAULT_POLICY,
        budget: float = 0.25,
        *,
        sinks: int | None = None,
        window: int | None = None,
        measure_capacity: bool = True,
    ) -> None:
        self.policy = get_policy(policy)
        self.budget = budget
        protection = Protection(sinks, window)
        protection.check(budget)
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model is a {type(model).__name__}; accepted: a transformers PreTrainedModel")
        decoder = model.get_decoder()
        modules = _attention_modules(decoder)
        layers: list[Any] = list(DynamicCache(config=model.config).layers)
        full = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not full:
            raise ValueError(f"{type(model).__name__} has no layer with full attention: there is nothing to evict")
        rotaries = rotaries_of(decoder, modules)
        self._attachment = Attachment(decoder)
        for order, index in enumerate(full):
            if index not in modules:
                raise ValueError(f"{type(model).__name__}: no attention module for layer {index} was found")
            layers[index] = RetainLayer(
                self.policy,
                budget,
                protection,
                module=modules[index],
                rotary=rotaries[index],
                index=index,
                layer=order,
                layers=len(full),
                measure_capacity=measure_capacity,
            )
        super().__init__(layers=layers)
        self._updated: RetainLayer | None = None  # the layer whose attention comes next

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values and return all that its attention shall see."""
        if (self._updated is not None and self._updated.waiting) or not self._attachment.active:
            raise ValueError(
                "past_key_values is a RetainCache of another model, or the model's attention implementation was "
                "changed after the cache was made: its attention did not reach the cache. Make a new RetainCache "
                "with the model that you call"
            )
        layer = self.layers[layer_idx]
        self._updated = layer if isinstance(layer, RetainLayer) else None
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def retained(self) -> list[RetainLayer]:
        """The layers that evict: those with full attention."""
        return [layer for layer in self.layers if isinstance(layer, RetainLayer)]

    def kept_positions(self, layer: int) -> Tensor:
        """Return which tokens a layer holds: index in the row's text, int32 [batch, kv_heads, width], −1 for none.

        Raises:
            ValueError: the layer does not evict, or nothing was seen yet.

        """
        found = self.layers[layer] if 0 <= layer < len(self.layers) else None
        if not isinstance(found, RetainLayer) or found.storage is None:
            evicting = [own.index for own in self.retained if own.storage is not None]
            raise ValueError(f"layer is {layer}; layers that hold kept entries: {evicting or 'none yet'}")
        return found.storage.positions

    def report(self) -> CacheReport:
        """Return what was seen and kept: tokens, bytes and capacity by layer and head."""
        seen = [layer for layer in self.retained if layer.storage is not None]
        heads = tuple(head for layer in seen for head in layer.head_reports())
        shares = [share for head in heads if (share := head.capacity_retained) is not None]
        other = sum(
            part.nbytes
            for layer in self.layers
            for part in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if not isinstance(layer, RetainLayer) and part is not None
        )
        storages = [layer.storage for layer in seen if layer.storage is not None]
        return CacheReport(
            policy=self.policy.name,
            heads=heads,
            batch=storages[0].keys.shape[0] if storages else 0,
            bytes_full=other + sum(layer.bytes_full for layer in seen),
            bytes_kept=other + sum(storage.nbytes for storage in storages),
            bytes_index=sum(storage.positions.nbytes for storage in storages),
            capacity_retained=sum(shares) / len(shares) if shares else None,
        )

    def __repr__(self) -> str:
        return f"RetainCache(policy={self.policy.name!r}, budget={self.budget}, {self.report()})"


def _attention_modules(decoder: nn.Module) -> dict[int, nn.Module]:
    return {
        index: module
        for module in decoder.modules()
        if isinstance(index := getattr(module, "layer_idx", None), int) and "Attention" in type(module).__name__
    }
