"""The cache: pass it as `past_key_values` to an unmodified `generate`, and it keeps what the policy keeps."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from suffice.kv.attention.hook import Attachment
from suffice.kv.budget.allocation import Allocation
from suffice.kv.budget.head_profile import HeadProfile
from suffice.kv.budget.protection import Protection
from suffice.kv.cache.global_budget import Pool
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.cache.report import CacheReport, head_reports
from suffice.kv.cache.settings import Settings
from suffice.kv.hf.model_info import attention_modules, context_window
from suffice.kv.hf.rotary import rotary_embeddings
from suffice.kv.hf.tensor_parallel import Sharding
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.registry import DEFAULT_POLICY, get_allocation, get_policy
from suffice.kv.storage.quantized import Quantization


class CompressedCache(Cache):
    """A KV cache that keeps a budget of what it has seen, chosen by a policy.

    The first forward pass over the cache is the prefill: each layer evicts right after its own attention has
    been computed over the whole prompt, so at most one layer is ever held in full. Tokens that come later
    (a question asked of a compressed document, the answer) are appended and kept, unless `evict="always"`: then
    the budget holds at all times, for prompts that come in chunks and for what is generated. Kept entries keep
    their positions. Layers with a sliding window stay as they are.

    Args:
        model: the transformers model that the cache is for. While a cache of it lives, its attention calls
            go through a function of ours that computes the same.
        policy: a name (`suffice kv policies` lists them) or a `Policy`.
        budget: entries to keep of each row, in the mean over heads and layers (a whole number), or a fraction of
            the tokens seen (0 to 1.0).
        sinks: first tokens that are always kept; None means 4, fewer if the budget is below 8.
        window: last tokens that are always kept; None means what the policy's authors keep, else 15 % of
            the budget, between 4 and 32.
        allocation: how the budget is split over heads and layers, in place of the policy's own.
        evict: `"prefill"` evicts once, after the first forward pass; `"always"` after every forward pass of
            several tokens (a chunk of a prompt) and every `interval` generated ones.
        interval: with `evict="always"`, generated tokens between evictions: the cache holds at most budget +
            interval entries while it generates (the paper evicts every 512).
        positions: `"original"` leaves kept keys where they were; `"compact"` turns them to stand right before the
            next token, so that a text longer than the model's window stays within it; no head then gets more than
            half of that window from a head profile.
        measure_capacity: measure the share of the capacity that the kept entries carry, under the default
            policy's objective so that policies compare. Costs about as much as scoring. Only for what is evicted
            layer by layer from one prefill; elsewhere the full set is never there to compare with.
        quantized: store what is kept by transformers' own quantised layers: `"quanto"`, `"hqq"`, `"fp8"` (a newer
            transformers), or a `Quantization` with its numbers. For heads of equal length.

    Raises:
        TypeError, ValueError: see each argument's accepted values in the message.
        ImportError: quantised layers need a package that is not installed.

    Example:
        >>> cache = CompressedCache(model, budget=0.25)                       # doctest: +SKIP
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
        allocation: str | Allocation | None = None,
        evict: str = "prefill",
        interval: int = 512,
        positions: str = "original",
        measure_capacity: bool = True,
        quantized: str | Quantization | None = None,
    ) -> None:
        self.policy = get_policy(policy)
        if allocation is not None:
            self.policy = replace(self.policy, allocation=get_allocation(allocation))
        self.budget = budget
        protection = Protection(sinks, window)
        protection.check(budget)
        _check_choice("evict", evict, ("prefill", "always"))
        _check_choice("positions", positions, ("original", "compact"))
        if isinstance(interval, bool) or not isinstance(interval, int):
            raise TypeError(f"interval is {interval!r}; accepted: a whole number of tokens")
        if interval < 1:
            raise ValueError(f"interval is {interval}; accepted: at least 1 token")
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model is a {type(model).__name__}; accepted: a transformers PreTrainedModel")
        decoder = model.get_decoder()
        modules = attention_modules(decoder)
        layers: list[Any] = list(DynamicCache(config=model.config).layers)
        full = [index for index, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not full:
            raise ValueError(f"{type(model).__name__} has no layer with full attention: there is nothing to evict")
        for index in full:
            if index not in modules:
                raise ValueError(f"{type(model).__name__}: no attention module for layer {index} was found")
        rotaries = rotary_embeddings(decoder, modules)
        if positions == "compact" and any(
            rotary is not None and rotary.depends_on_length for rotary in rotaries.values()
        ):
            raise ValueError(
                "positions is 'compact', but this model's rotary embedding adapts its frequencies to the length of "
                "the text; accepted: 'original'"
            )
        if isinstance(self.policy.allocation, HeadProfile):
            self.policy = replace(self.policy, allocation=self.policy.allocation.bound(model))
        shared = self.policy.allocation.model_wide
        self.settings = Settings(
            policy=self.policy,
            budget=budget,
            protection=protection,
            always=evict == "always",
            interval=interval,
            compact=positions == "compact",
            measure_capacity=measure_capacity and evict == "prefill" and not shared,
            layers=len(full),
            most=_most(model) if positions == "compact" else None,
            sharding=Sharding.from_model(model),
            quantization=_quantization(quantized, self.policy),
        )
        pool = Pool(len(full)) if shared else None
        self._attachment = Attachment(decoder)
        for order, index in enumerate(full):
            layers[index] = CompressedLayer(
                self.settings,
                module=modules[index],
                rotary=rotaries[index],
                index=index,
                layer=order,
                pool=pool,
            )
        super().__init__(layers=layers)
        self._updated: CompressedLayer | None = None  # the layer whose attention comes next

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values and return all that its attention shall see."""
        if (self._updated is not None and self._updated.waiting) or not self._attachment.active:
            # What did not reach the cache was not stored either: it can go on with the right model.
            for layer in self.compressed_layers:
                layer.waiting = False
            raise ValueError(
                "past_key_values is a CompressedCache of another model, or the model's attention implementation was "
                "changed after the cache was made: its attention did not reach the cache. Make a new CompressedCache "
                "with the model that you call"
            )
        layer = self.layers[layer_idx]
        self._updated = layer if isinstance(layer, CompressedLayer) else None
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def copy(self) -> CompressedCache:
        """Return a cache that goes on from here by itself: it shares what is stored, and this one stays as it is.

        Costs next to nothing, so that one compressed document can answer many questions.
        """
        other = copy.copy(self)
        pools: dict[int, Pool] = {}
        other.layers = []
        for layer in self.layers:
            if not isinstance(layer, CompressedLayer):
                other.layers.append(copy.deepcopy(layer))
                continue
            pool = layer.pool and pools.setdefault(id(layer.pool), Pool(layer.pool.layers))
            other.layers.append(layer.copy(pool))
        other._updated = None
        return other

    def save(self, model: PreTrainedModel, path: str | Path) -> Path:
        """Write the cache as one safetensors file, from which it can go on in another process.

        Args:
            model: the model that it is of; the file records which.
            path: where to; written atomically. Processes of a tensor-parallel model, all of which must save and
                load, add their number to it.

        Raises:
            ValueError: the cache is of another model, or has seen nothing.

        """
        from suffice.kv.cache.serialization import save_cache

        return save_cache(self, model, path)

    @staticmethod
    def load(path: str | Path, model: PreTrainedModel, policy: Policy | None = None) -> CompressedCache:
        """Read a cache that `save` wrote.

        Args:
            path: the file.
            model: the model that it was made with.
            policy: the cache's policy, if it is not one of the named ones.

        Raises:
            OSError: there is no such file.
            ValueError: the file is no saved cache, of a newer version, of another model or dtype; or the policy
                is missing or another.

        """
        from suffice.kv.cache.serialization import load_cache

        return load_cache(path, model, policy)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        """Return `copy()`: stored tensors are never written to, so that sharing them is as good."""
        return self.copy()

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers that evict: those with full attention."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    def kept_positions(self, layer: int) -> Tensor:
        """Return which tokens a layer holds: index in the row's text, int32 [batch, kv_heads, width], −1 for none.

        Raises:
            ValueError: the layer does not evict, or nothing was seen yet.

        """
        found = self.layers[layer] if 0 <= layer < len(self.layers) else None
        if not isinstance(found, CompressedLayer) or found.storage is None:
            evicting = [own.index for own in self.compressed_layers if own.storage is not None]
            raise ValueError(f"layer is {layer}; layers that hold kept entries: {evicting or 'none yet'}")
        return found.storage.positions

    def report(self) -> CacheReport:
        """Return what was seen and kept: tokens, bytes and capacity by layer and head."""
        seen = [layer for layer in self.compressed_layers if layer.storage is not None]
        heads = tuple(head for layer in seen for head in head_reports(layer))
        shares = [share for head in heads if (share := head.capacity_retained) is not None]
        other = sum(
            part.nbytes
            for layer in self.layers
            for part in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if not isinstance(layer, CompressedLayer) and part is not None
        )
        storages = [layer.storage for layer in seen if layer.storage is not None]
        return CacheReport(
            policy=self.policy.name,
            heads=heads,
            batch=storages[0].kept.shape[0] if storages else 0,
            bytes_full=other + sum(layer.bytes_full for layer in seen),
            bytes_kept=other + sum(storage.nbytes for storage in storages),
            bytes_index=sum(storage.nbytes_index for storage in storages),
            capacity_retained=sum(shares) / len(shares) if shares else None,
        )

    def __repr__(self) -> str:
        return f"CompressedCache(policy={self.policy.name!r}, budget={self.budget}, {self.report()})"


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(repr, known))}")


def _quantization(given: str | Quantization | None, policy: Policy) -> Quantization | None:
    if given is None:
        return None
    if not isinstance(given, (str, Quantization)):
        raise TypeError(f"quantized is {given!r}; accepted: a name, a Quantization, or None")
    if policy.allocation.ragged:
        raise ValueError(
            f"quantized is {given!r}, which heads of unequal length ({policy.allocation}) do not support; accepted: "
            "None, or an allocation of equal heads, 'equal' or 'pyramid' (with the policy 'capkv', which is best then)"
        )
    quantization = Quantization(given) if isinstance(given, str) else given
    quantization.check()
    return quantization


def _most(model: PreTrainedModel) -> int | None:
    """Return what a head may hold of keys that are moved together: half of the window, new tokens need the rest."""
    window = context_window(model)
    return None if window is None else window // 2
