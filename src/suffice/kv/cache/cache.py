"""The compressed cache: pass it to `generate` as `past_key_values`, and it keeps the entries that a policy selects."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from suffice.kv.attention.hook import AttentionHook
from suffice.kv.budget.allocation import Allocation
from suffice.kv.cache.arguments import CacheArguments
from suffice.kv.cache.forward_pass import ForwardPass
from suffice.kv.cache.global_budget import GlobalBudget
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.cache.layer_kinds import make_layers
from suffice.kv.cache.layer_report import report_layer
from suffice.kv.cache.positions import check_continues, check_position_ids, check_window, num_new_tokens
from suffice.kv.cache.report import CacheReport
from suffice.kv.cache.state import EarlierMask
from suffice.kv.cache.stock_layer import copy_stock_layer
from suffice.kv.hf.layers import find_decoder
from suffice.kv.hf.model_info import context_window
from suffice.kv.hf.rotary import RotaryEmbedding
from suffice.kv.hf.wrappers import unwrap_model
from suffice.kv.policy.names import DEFAULT_POLICY
from suffice.kv.policy.policy import Policy

_WRONG_MODEL = (
    "past_key_values must be a CompressedCache of the model that is called, with the attention implementation that the "
    "model had when the cache was made; got one that the model's attention calls do not reach. Make a new "
    "CompressedCache with this model"
)


class CompressedCache(Cache):
    """A KV cache that evicts entries: a policy selects which entries are kept within a budget.

    The first forward pass over the cache is the prefill. Each layer evicts right after its own attention over the whole
    prompt, so at most one layer holds all entries at a time. Later tokens, such as a question about a compressed
    document and its answer, are appended and all kept. With `evict="always"`, evictions continue, so that the budget
    also limits prompts that are read in chunks, and generated tokens. Layers with a sliding window are
    compressed only if the model has no layers with full attention.

    Args:
        model: the transformers model, or a `PeftModel`, a compiled or a data-parallel model that contains it. While a
            cache for this model exists, its attention calls go through an attention function of Suffice, which
            computes the same results.
        policy: a name (`suffice kv policies` lists them) or a `Policy`.
        budget: number of entries to keep in each row and head, averaged over heads and layers (an int), or the fraction
            of the tokens seen (a float in (0, 1]). None means a quarter of the tokens, or as many entries as `memory`
            allows.
        memory: limit on the bytes of the compressed layers, instead of `budget`: a fraction of what a cache without
            compression would hold in the model's dtype (a float in (0, 1]), or a number of bytes for all rows (an int,
            or a text such as "2GiB"). The number of entries and `bits` follow from it. Everything that is stored
            counts: quantized and other entries, scales, positions, free slots for new tokens, and the queries that the
            policy remembers. The limit also holds for later tokens, unless `evict="prefill"` is given. A forward pass
            raises a ValueError if the limit is too small for the entries that are always kept.
        sinks: number of first tokens that are always kept; None means 4, or fewer if the budget is below 8.
        window: number of last tokens that are always kept; None means the window that was published with the
            policy, or, if there is none, 15 % of the budget, at least 4 and at most 32.
        allocation: how the budget is split over heads and layers (a name or an `Allocation`); None means as the policy
            says.
        evict: `"prefill"` evicts once, after the first forward pass. `"always"` evicts after every forward pass over
            several tokens (a chunk of a prompt), and after every `interval` generated tokens. None means `"always"`
            with `memory`, and otherwise `"prefill"`.
        interval: with `evict="always"`, number of generated tokens between evictions. A head then holds at most
            budget + interval entries during generation, on average. None means 512, the paper's value, or a number that
            follows from `memory`.
        rerotate: rotate the kept keys to the positions right before the next token, so that a text that is read in
            chunks may be longer than the model's context window. This requires a rotary embedding. No head then keeps
            more entries than half of that window, and `interval` is limited to the same number. If False, kept keys are
            not changed.
        measure_capacity: measure the share of the capacity that the kept entries carry, under `capkv-profile`'s
            objective, so that policies can be compared. This costs about as much as scoring. It is ignored with
            `evict="always"`, and with an allocation that shares one budget between layers.
        bits: number of bits in which each number of keys and values is stored: 2, 3, 4, 5 or 8, or a pair (bits of
            keys, bits of values). With 4 bits, an entry takes 27 % of its bytes in 16 bits, and the output changes
            little. None stores entries in the model's dtype or, with `memory`, with bits that follow from it. The first
            4 tokens, the newest 32 entries of each head and up to 32 new tokens always stay in the model's dtype; with
            little `memory`, fewer of them.
        repair: after an eviction, give the kept entries new values, and numbers that are added to their logits, so that
            they reproduce the attention over all entries (Attention Matching, 2602.16284). Both are fitted to 64
            queries of the prompt and its last 16, of which a quarter is held out: a head keeps its repair only if
            the error of its held-out outputs falls. The numbers take 4 bytes for each entry. Repair brought the cache
            closer to the full cache in 33 of 36 measured cells (docs/results/kv-repair.md). On one CPU thread,
            it takes about a fifth of the time of a prefill of 1,000 tokens with SmolLM2-135M, and a smaller share of
            longer prompts. It is therefore off by default.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a value that is not accepted, or the model is not supported.

    Example:
        >>> cache = CompressedCache(model, budget=0.25)                   # doctest: +SKIP
        >>> model.generate(**inputs, past_key_values=cache)               # doctest: +SKIP
        >>> print(cache.report())                                         # doctest: +SKIP

    """

    def __init__(
        self,
        model: nn.Module,
        policy: str | Policy = DEFAULT_POLICY,
        budget: float | None = None,
        *,
        memory: float | str | None = None,
        sinks: int | None = None,
        window: int | None = None,
        allocation: str | Allocation | None = None,
        evict: str | None = None,
        interval: int | None = None,
        rerotate: bool = False,
        measure_capacity: bool = True,
        bits: int | tuple[int, int] | None = None,
        repair: bool = False,
    ) -> None:
        arguments = CacheArguments(
            policy=policy,
            budget=budget,
            memory=memory,
            sinks=sinks,
            window=window,
            allocation=allocation,
            evict=evict,
            interval=interval,
            rerotate=rerotate,
            measure_capacity=measure_capacity,
            bits=bits,
            repair=repair,
        ).check()
        model = unwrap_model(model)
        self.settings = arguments.settings(model)
        self.policy, self.budget = self.settings.policy, self.settings.budget
        self._hook = AttentionHook(find_decoder(model))
        super().__init__(layers=make_layers(model, self.settings))
        self._window = context_window(model) if rerotate else None
        self._rotates = any(isinstance(layer.rotary, RotaryEmbedding) for layer in self.compressed_layers)
        self._is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self._updated: CompressedLayer | None = None  # the layer whose attention call follows
        self._pass = ForwardPass()

    def begin_pass(self, decoder: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Prepare for a forward pass of the model; see `suffice.kv.attention.forward_pass.PassObserver`.

        Raises:
            ValueError: the cache belongs to another model, an earlier forward pass failed, the input does not continue
                the tokens that the cache holds, the mask of earlier tokens has changed in a way that is not supported,
                the memory is too small, or, if keys are rotated, their positions are not consecutive or exceed the
                context window.

        """
        if not self._hook.belongs_to(decoder):
            raise ValueError(_WRONG_MODEL)
        has_cross_attention = self._is_encoder_decoder or inputs.get("encoder_hidden_states") is not None
        if has_cross_attention and inputs.get("past_key_values") is self:
            raise ValueError(
                "past_key_values must be EncoderDecoderCache(CompressedCache(model, ...), CrossAttentionCache(model)) "
                "for a decoder with cross-attention, got a CompressedCache, which holds the self-attention only. With "
                "DynamicCache() as the second cache, the cross-attention is not compressed"
            )
        first = self.compressed_layers[0].state
        check_continues(inputs, first)
        if self._rotates:
            # PaliGemma counts positions from 1. Only rotated keys move to positions that are counted from 0.
            firsts = (0,) if self.settings.rerotate else (0, 1)
            check_position_ids(inputs, first, self._rotation_needed_by, firsts=firsts)
        if self._window is not None:
            storages = [layer.storage for layer in self.compressed_layers]
            num_held = max(0 if storage is None else storage.max_length for storage in storages)
            check_window(inputs, num_held, self._window)
        self._pass.check_earlier(self.layers)
        if self.settings.memory is not None:
            for layer in self.compressed_layers:
                layer.check_memory(num_new_tokens(inputs))
        self._mask_earlier(inputs.get("attention_mask"))  # these tokens stay masked if the pass fails
        self._pass.begin(self.layers)

    @property
    def _rotation_needed_by(self) -> str:
        if self.settings.rerotate:
            return "rerotate=True"
        return f"policy {self.policy.name!r}" if self.policy.needs_rotary else "repair=True"

    def _mask_earlier(self, mask: Any) -> None:
        """Mask earlier tokens that a new turn masks. Passes over one token skip this to avoid a synchronization."""
        state = self.compressed_layers[0].state
        if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != len(state.rows):
            return
        if mask.shape[1] - state.num_seen < 2:
            return
        earlier = EarlierMask.from_mask(mask[:, : state.num_seen].bool())
        for layer in self.compressed_layers:
            layer.state = layer.state.mask_earlier(earlier)

    def end_pass(self, *, failed: bool) -> None:
        """Finish a forward pass of the model. If it failed, remove the tokens that it has stored."""
        self._pass.end(self.layers, failed=failed)
        for layer in self.compressed_layers:
            layer.end_pass()
        # In early versions of transformers, Gemma 3n stores the keys that several layers read in this attribute.
        self.__dict__.pop("shared_layers", None)

    def will_store(self) -> None:
        """Record that the current forward pass begins to change layers."""
        self._pass.has_stored = True

    @torch.compiler.disable  # see `_attention_function` in `hook.py`
    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new keys and values to a layer and return what its attention reads."""
        is_reached = self._pass.is_open and self._hook.is_active
        if (self._updated is not None and self._updated.awaits_attention) or not is_reached:
            # The keys were not stored, so the cache can still be used with the right model.
            for layer in self.compressed_layers:
                layer.awaits_attention = False
            raise ValueError(_WRONG_MODEL)
        self.will_store()
        layer = self.layers[layer_idx]
        self._updated = layer if isinstance(layer, CompressedLayer) else None
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """Update the state of a convolution; see `transformers.Cache`."""
        self.will_store()
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """Update the state of a layer with linear attention; see `transformers.Cache`."""
        self.will_store()
        return super().update_recurrent_state(*args, **kwargs)

    def copy(self) -> CompressedCache:
        """Return an independent cache with the same entries; it shares the stored tensors, so it costs almost nothing.

        Use copies to ask several questions about one compressed document.

        Raises:
            ValueError: a forward pass failed, and what it has stored cannot be removed.

        """
        self._pass.settle(self.layers)
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        is_global = self.policy.allocation.is_global
        global_budget = GlobalBudget(self.settings.num_layers) if is_global else None
        other.layers = [
            layer.copy(global_budget) if isinstance(layer, CompressedLayer) else copy_stock_layer(layer)
            for layer in self.layers
        ]
        other._updated = None
        other._pass = ForwardPass()
        return other

    def reset(self) -> None:
        """Remove all tokens."""
        super().reset()
        self._pass = ForwardPass()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens from all layers; see `CompressedLayer.crop`.

        Raises:
            ValueError: a layer no longer has the entries of all tokens to remove. No layer is changed.

        """
        self._pass.settle(self.layers)
        for layer in self.compressed_layers:
            layer.check_crop(tokens_to_remove)
        # Other layers first: those that cannot restore what they held raise an error.
        layers: list[Any] = [layer for layer in self.layers if not isinstance(layer, CompressedLayer)]
        for layer in (*layers, *self.compressed_layers):
            layer.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Reorder the rows of the batch, as beam search does."""
        self._pass.settle(self.layers)
        super().reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._change_rows("batch_repeat_interleave", repeats, self._rows().repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        rows = self._rows()
        self._change_rows("batch_select_indices", indices, rows[indices.cpu()] if len(rows) else rows)

    def _rows(self) -> Tensor:
        return torch.arange(len(self.compressed_layers[0].state.rows))

    def _change_rows(self, method: str, argument: Any, rows: Tensor) -> None:
        """Call a method of all layers; those with linear attention only, which lack it, get the index of each row."""
        self._pass.settle(self.layers)
        layers: list[Any] = self.layers
        for layer in layers:
            if hasattr(layer, method):
                getattr(layer, method)(argument)
            else:
                layer.reorder_cache(rows)

    def save(self, model: nn.Module, path: str | Path) -> Path:
        """Write the cache to a safetensors file, from which another process can continue.

        Args:
            model: the model of the cache; the file records its fingerprint.
            path: the file to write, which is replaced atomically; its folder is created if it is missing. Each process
                of a tensor-parallel model must call `save`. It writes its own file, with the number of the process in
                the name.

        Returns:
            The path of the file.

        Raises:
            ValueError: the cache belongs to another model, or has seen no tokens; or a forward pass
                failed, and what it has stored cannot be removed.
            OSError: the file cannot be written.

        """
        from suffice.kv.cache.serialization import save_cache

        self._pass.settle(self.layers)
        return save_cache(self.layers, self.settings, unwrap_model(model), path)

    @staticmethod
    def load(path: str | Path, model: nn.Module, policy: Policy | None = None) -> CompressedCache:
        """Read a cache that `save` has written.

        Args:
            path: the file to read.
            model: the model that the cache was made with.
            policy: the policy of the cache; required if it is not one of the named policies.

        Raises:
            OSError: the file does not exist.
            ValueError: the file is not a saved cache, or was written in another format, for another model or for
                another dtype; or `policy` is missing or is not the policy of the cache.

        """
        from suffice.kv.cache.serialization import read_cache

        model = unwrap_model(model)
        saved = read_cache(path, model, policy)
        cache = CompressedCache(model, saved.policy, saved.budget, **saved.options)
        saved.restore(cache.layers, model.device)
        return cache

    def __copy__(self) -> CompressedCache:
        """Return `copy()`. A shallow copy would share its layers with this cache."""
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        """Return `copy()`, because stored tensors are never overwritten while a copy exists."""
        return self.copy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise: a cache is attached to its model, so it cannot be pickled.

        Raises:
            TypeError: always.

        """
        raise TypeError(
            "a CompressedCache cannot be pickled, because it is attached to its model. Write it with "
            "cache.save(model, path), and read it with CompressedCache.load(path, model)"
        )

    @property
    def needs_replay(self) -> bool:
        """Whether the policy scores the entries of a prompt in a second pass, so that `prefill` must fill the cache."""
        return self.policy.needs_replay

    @property
    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers that evict: those with full attention or, if there are none, those with a sliding window."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    def kept_positions(self, layer: int) -> Tensor:
        """Return the positions of the tokens that a layer keeps.

        With eager attention, `output_attentions=True` returns weights over kept entries, [batch, heads, new, width] for
        each layer. After a pass without an eviction, query head h reads the entries of KV head
        h // num_key_value_groups, whose positions are `kept_positions(layer)[:, h // num_key_value_groups]`. The
        weights of empty slots are 0. A pass that evicts returns weights over the entries before the eviction; for the
        first pass, these are the tokens of the prompt.

        Args:
            layer: index of the layer in the model.

        Returns:
            Index of each kept token within the text of its row, int32 [batch, num_key_value_heads, width]; −1 in
            empty slots.

        Raises:
            ValueError: the layer is not compressed, or has seen no tokens yet.

        """
        cache_layer = self.layers[layer] if 0 <= layer < len(self.layers) else None
        if not isinstance(cache_layer, CompressedLayer) or cache_layer.storage is None:
            accepted = [known.index for known in self.compressed_layers if known.storage is not None]
            raise ValueError(f"layer must be a layer with kept entries ({accepted or 'none yet'}), got {layer}")
        return cache_layer.storage.positions

    def report(self) -> CacheReport:
        """Return a report of the tokens, bytes and capacity that are kept, in total and by layer and head."""
        bytes_uncompressed = sum(
            part.nbytes
            for layer in self.layers
            for part in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if not isinstance(layer, CompressedLayer) and part is not None
        )
        layers = [report_layer(layer) for layer in self.compressed_layers]
        return CacheReport.from_layers(self.policy.name, layers, bytes_uncompressed)

    def __repr__(self) -> str:
        memory = self.settings.memory
        limit = f"budget={self.budget}" if memory is None else f"memory={memory.limit}"
        return f"CompressedCache(policy={self.policy.name!r}, {limit}, {self.report()})"
