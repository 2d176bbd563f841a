"""The compressed cache of the cross-attention of encoder-decoder models.

The entries of the cross-attention are those of the encoder's output. They are stored in the first forward pass, and all
tokens that are generated read them. What a token of the decoder reads depends on where it stands in its output, so the
queries of the first tokens, often only the start token, do not tell what later tokens read. Entries are therefore
scored by their keys and values only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from suffice.kv.attention.call import AttentionCall, run_attention
from suffice.kv.attention.hook import AttentionHook, attach_observer
from suffice.kv.attention.masks import MaskFormat, additive_mask, mask_format
from suffice.kv.backend.triton_backend import choose_backend
from suffice.kv.budget.allocation import Equal
from suffice.kv.budget.protection import Protection
from suffice.kv.cache.eviction import plan_eviction
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.cache.layer_report import report_layer
from suffice.kv.cache.report import CacheReport
from suffice.kv.cache.settings import CacheSettings, StorageConfig
from suffice.kv.cache.state import LayerState, RowState
from suffice.kv.cache.stock_layer import copy_stock_layer
from suffice.kv.hf.layers import cross_attention_modules, find_decoder
from suffice.kv.hf.tensor_parallel import Sharding
from suffice.kv.hf.wrappers import unwrap_model
from suffice.kv.policy.directions import Value
from suffice.kv.policy.estimators import Leverage
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.registry import get_policy
from suffice.kv.policy.weights import Uniform
from suffice.kv.storage.base import Entries, Storage
from suffice.kv.storage.quantization import Bits, parse_bits
from suffice.kv.storage.quantized import QuantizedStorage
from suffice.kv.storage.uniform import UniformStorage

# The capacity of the values, if all entries are equally likely to be read.
DEFAULT_CROSS_ATTENTION_POLICY = Policy(
    name="capkv-values",
    weights=Uniform(),
    directions=Value(),
    estimator=Leverage(power=0.5, ridge=0.1),
    paper="2604.25975",
)


class CrossAttentionLayer(CompressedLayer):
    """The entries of the encoder's output in one layer of the decoder.

    Args:
        arguments: see `CompressedLayer`.

    """

    def __init__(self, **arguments: Any) -> None:
        self._complete: Entries | None = None  # all entries, before the eviction
        super().__init__(**arguments)

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Keys [batch, num_key_value_heads, entries, head_dim]; this layer computes the attention call that gets them.

        None before the first forward pass.
        """
        held = self._complete or _readable_storage(self.storage)
        return None if held is None else attach_observer(held.keys, self)

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        """Ignore the assignments of the base class."""

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Values [batch, num_key_value_heads, entries, value_dim]; None before the first forward pass."""
        held = self._complete or _readable_storage(self.storage)
        return None if held is None else held.values

    @values.setter
    def values(self, values: Tensor | None) -> None:
        """Ignore the assignments of the base class."""

    def reset(self) -> None:
        """Remove all entries."""
        super().reset()
        self._complete = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the entries of the encoder's output, and return them for the attention call that follows."""
        if self.is_initialized:
            raise ValueError(
                f"layer {self.index} of a CrossAttentionCache must get the encoder's output once, got it twice. Call "
                "reset(), or make a new cache for another input"
            )
        batch, _, num_entries, _ = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        positions = torch.arange(num_entries, device=self.device).expand(batch, 1, -1)
        self._complete = Entries(key_states, value_states, positions)
        self.state = LayerState(rows=(RowState(),) * batch, num_seen=num_entries, num_appended=num_entries)
        self.is_initialized = True
        return attach_observer(key_states, self), value_states

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Compute an attention call over the entries; after the first one, evict."""
        if not self.owns(call):
            raise ValueError(
                f"past_key_values must be made for the model that is called, got a CrossAttentionCache whose layer "
                f"{self.index} was made for a different attention module"
            )
        if self._complete is None:
            return self._attend_to_kept(call)
        output, attention = run_attention(call)
        with torch.no_grad():
            self._mask_padding(call)
            plan = plan_eviction(
                self.settings,
                self.state.rows,
                num_input_tokens=self.state.num_seen,
                num_appended=self.state.num_appended,
                num_new=self.state.num_seen,
                is_first=True,
            )
            assert plan is not None
            self._evict(plan, call, None)
            self._complete = None
        return output, attention

    def _mask_padding(self, call: AttentionCall) -> None:
        """Mark the padding of the encoder's input, which may be on the right."""
        assert self._complete is not None
        # The layer then does not take the queries for those of the last entries.
        self.state = replace(self.state, has_holes=True)
        padding = call.padding
        if padding is not None:
            rows = zip(self.state.rows, padding.num_padded, strict=True)
            self.state = replace(self.state, rows=tuple(row.mask_tokens(count) for row, count in rows))
            positions = self._complete.positions.masked_fill(~padding.valid[:, None], -1)
            self._complete = replace(self._complete, positions=positions)

    def _entries(self, call: AttentionCall) -> Entries:
        """Return all entries; padding comes first."""
        assert self._complete is not None
        return self._complete.right_aligned() if any(self.state.num_padding) else self._complete

    def _queries(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Return the queries, and positions after all entries: every query may read all entries."""
        batch, _, num_queries, _ = call.query.shape
        return call.query, torch.full((batch, num_queries), self.state.num_seen, device=self.device)

    def query_moments(self, call: AttentionCall) -> Tensor | None:
        """Return None: the first queries do not tell what those of later tokens are like."""

    def _attend_to_kept(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Compute an attention call, whose mask is over all entries, over the kept entries."""
        storage = self.storage
        if isinstance(storage, QuantizedStorage):
            every_entry = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=call.query.device)
            return storage.attend(replace(call, mask=every_entry), choose_backend(call.query, call.key, call.value))
        assert isinstance(storage, UniformStorage)
        mask = None
        if not storage.is_full or call.mask is not None:
            mask = storage.valid
            if mask_format(call.implementation) is not MaskFormat.PADDING:
                mask = mask[:, None, None].expand(-1, 1, call.query.shape[2], -1)
                mask = mask if call.implementation == "sdpa" else additive_mask(mask, call.query.dtype)
        return run_attention(replace(call, key=storage.keys, value=storage.values, mask=mask))


def _readable_storage(storage: Storage | None) -> Storage | None:
    """Return the storage whose keys and values the attention call gets, without dequantizing any."""
    return storage.exact if isinstance(storage, QuantizedStorage) else storage


class CrossAttentionCache(Cache):
    """A cache of the cross-attention of an encoder-decoder model that keeps a part of the encoder's output.

    In the first forward pass, the decoder reads the whole output of the encoder. Then each layer keeps the entries that
    a policy selects. All heads keep the same number of entries. Entries are scored by their keys and values only,
    because the first forward pass often has one token, whose query does not tell what later tokens read.

    Args:
        model: the transformers model, or a wrapper of it; see `CompressedCache`.
        policy: a name or a `Policy` whose weights need no queries and no positions, such as `keydiff` or
            `key-leverage`. None selects entries by the log-determinant capacity of the values.
        budget: number of entries to keep in each row and head (an int), or the fraction of the encoder's output
            without padding (a float in (0, 1]).
        bits: number of bits of each stored number, or a pair (bits of keys, bits of values); see `CompressedCache`.
            The first 4 entries of the encoder's output stay in the model's dtype. All others are quantized after the
            first forward pass: the encoder's output does not grow, so no entries are the newest ones.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a value that is not accepted, or the model is not supported.

    Example:
        >>> from transformers import EncoderDecoderCache
        >>> cross_attention = CrossAttentionCache(model, budget=0.5)                          # doctest: +SKIP
        >>> cache = EncoderDecoderCache(CompressedCache(model), cross_attention)              # doctest: +SKIP
        >>> model.generate(**inputs, past_key_values=cache)                                   # doctest: +SKIP

    """

    def __init__(
        self,
        model: nn.Module,
        policy: str | Policy | None = None,
        budget: float = 0.5,
        *,
        bits: Bits | None = None,
    ) -> None:
        self.policy = DEFAULT_CROSS_ATTENTION_POLICY if policy is None else get_policy(policy)
        protection = Protection(sinks=0, window=0)
        self.budget = protection.check(budget)
        _check_policy(self.policy)
        quantization = parse_bits(bits)
        if quantization is not None:
            quantization = replace(quantization, window=0)
        model = unwrap_model(model)
        modules = cross_attention_modules(model)
        settings = CacheSettings(
            policy=self.policy,
            budget=self.budget,
            protection=protection,
            evict_always=False,
            interval=1,
            rerotate=False,
            measure_capacity=False,  # it depends on queries
            num_layers=len(modules),
            storage=StorageConfig(quantization=quantization),
            sharding=Sharding.from_model(model),
        )
        self._hook = AttentionHook(find_decoder(model))
        layers: list[Any] = [DynamicLayer() for _ in range(max(modules) + 1)]
        for order, (index, module) in enumerate(sorted(modules.items())):
            layers[index] = CrossAttentionLayer(
                settings=settings, module=module, rotary=None, index=index, order=order, global_budget=None
            )
        super().__init__(layers=layers)

    def copy(self) -> CrossAttentionCache:
        """Return an independent cache with the same entries; it shares the stored tensors."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other.layers = [
            layer.copy(None) if isinstance(layer, CrossAttentionLayer) else copy_stock_layer(layer)
            for layer in self.layers
        ]
        return other

    def __copy__(self) -> CrossAttentionCache:
        """Return `copy()`. A shallow copy would share its layers with this cache."""
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> CrossAttentionCache:
        """Return `copy()`, because stored tensors are never overwritten."""
        return self.copy()

    @property
    def compressed_layers(self) -> list[CrossAttentionLayer]:
        """The layers that evict."""
        return [layer for layer in self.layers if isinstance(layer, CrossAttentionLayer)]

    def kept_positions(self, layer: int) -> Tensor:
        """Return which entries of the encoder's output a layer of the decoder keeps.

        Args:
            layer: index of the layer in the decoder.

        Returns:
            Index of each kept entry in the encoder's output, including padding, int32
            [batch, num_key_value_heads, width]; −1 in empty slots.

        Raises:
            ValueError: the layer has no cross-attention, or has kept no entries yet.

        """
        known = {own.index: own.storage for own in self.compressed_layers}
        storage = known.get(layer)
        if storage is None:
            accepted = [index for index, own in known.items() if own is not None]
            raise ValueError(f"layer must be a layer with kept entries ({accepted or 'none yet'}), got {layer}")
        return storage.positions

    def report(self) -> CacheReport:
        """Return a report of the entries and bytes that are kept, in total and by layer and head."""
        return CacheReport.from_layers(self.policy.name, [report_layer(layer) for layer in self.compressed_layers])

    def __repr__(self) -> str:
        return f"CrossAttentionCache(policy={self.policy.name!r}, budget={self.budget}, {self.report()})"


def _check_policy(policy: Policy) -> None:
    """Raise an error if a policy does not work for the cross-attention.

    Raises:
        ValueError: its weights need queries, or heads or layers may keep different numbers of entries.

    """
    if policy.weights.num_queries_needed != 0 or policy.weights.needs_rotary:
        raise ValueError(
            "policy must score the entries of the cross-attention by their keys and values only, because the queries "
            f"of the first tokens do not tell what later tokens read, got {policy.name!r} with the weights "
            f"{policy.weights}. Use None, 'key-leverage' or 'keydiff'"
        )
    if not isinstance(policy.allocation, Equal):
        raise ValueError(f"policy must have the allocation 'equal' for cross-attention, got {policy.allocation}")
