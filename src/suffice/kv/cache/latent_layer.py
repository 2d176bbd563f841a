"""A compressed layer of multi-head latent attention (DeepSeek V2), which caches one latent vector for all heads.

The model caches for each token a latent c and a rotated key r that all heads share. Its method `expand_kv` maps them to
the keys and values of the heads, which is linear: k_h = c A_h + r B_h. The attention of all heads is therefore that of
one KV head with the keys [c, r], whose query of head h is [q A_hᵀ, q B_hᵀ], and whose values are c. Policies score the
entries in this form. All heads keep the same entries, because they share them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from suffice.kv.attention.call import AttentionCall, run_attention
from suffice.kv.attention.hook import expect_call, forget_call
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.cache.memory import LayerShape
from suffice.kv.hf.offload import materialized_weight
from suffice.kv.storage.base import Entries
from suffice.kv.storage.quantized import QuantizedStorage
from suffice.kv.storage.uniform import AlignedStorage


class LatentLayer(CompressedLayer):
    """A layer whose cache holds latents as keys, and the rotated keys that all heads share as values.

    Args:
        arguments: see `CompressedLayer`.

    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._latents: tuple[Tensor, Tensor] | None = None  # of the new tokens

    def observe_call(self, keys: Tensor, observer: Any) -> Tensor:
        """Have an observer compute the next attention call of the module.

        The observer is not attached to the keys, because the model computes other keys from the latents.
        """
        expect_call(self._attention_module, observer)
        return keys

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new latents for the attention call, in which `attend` stores them."""
        self._latents = key_states, value_states
        return super().update(key_states, value_states, *args, **kwargs)

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Compute an attention call over all entries and evict."""
        self.pre_attention(call)
        if self.storage is None:
            output, attention = run_attention(call)
        else:
            assert isinstance(self.storage, (AlignedStorage, QuantizedStorage))
            entries = self.storage.entries
            keys, values = self._expand(entries.keys, entries.values)
            output, attention = self.storage.attend_to(call, keys, values)
        self.post_attention(call, attention)
        return output, attention

    def pre_attention(self, call: AttentionCall) -> None:
        """Check an attention call, plan the eviction after it, and store its new latents."""
        super().pre_attention(self._with_latents(call))

    def post_attention(self, call: AttentionCall, attention: Tensor | None) -> None:
        """Evict entries after the attention of a call has been computed, if an eviction is planned."""
        super().post_attention(self._with_latents(call), attention)

    def end_pass(self) -> None:
        """Free the data of one forward pass."""
        forget_call(self._attention_module)
        self._latents = None

    def shape(self, call: AttentionCall) -> LayerShape:
        """Return the sizes of the tensors of the layer. Queries are scored in the form of `scored_tensors`."""
        shape = super().shape(call)
        return replace(shape, scored_query_dim=call.query.shape[1] * (shape.key_dim + shape.value_dim))

    def query_moments(self, call: AttentionCall) -> None:
        """Return None: queries multiply keys that are computed from the stored latents."""

    def scored_tensors(self, queries: Tensor, entries: Entries) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of the one KV head that has the attention of all heads."""
        latents, rotated = entries.keys, entries.values
        return (
            absorb_queries(self._attention_module, queries, latents, rotated),
            torch.cat((latents, rotated), -1),
            latents,
        )

    def output_weight(self) -> Callable[[], Tensor | None] | None:
        """Return a function that computes the weight of the map from the latents of all heads to the output.

        The weight is [hidden, heads * latent_dim].
        """
        module: Any = self._attention_module
        # Only the last dimension, the dtype and the device are read. Scores from gradients are computed after the pass,
        # when the latents have been freed.
        like = None if self._latents is None else [x[:0].clone() for x in self._latents]

        def absorbed_weight() -> Tensor | None:
            weight = materialized_weight(module.o_proj, "weight")
            if weight is None or like is None:
                return weight
            _, values = _expanded_bases(module, *like)  # [heads, latent_dim, value_dim]
            heads = weight.unflatten(1, (values.shape[0], -1))
            return torch.einsum("ohv,hlv->ohl", heads, values.to(weight.dtype)).flatten(1)

        return absorbed_weight if hasattr(module, "o_proj") else None

    @property
    def _attention_module(self) -> nn.Module:
        module = self.module
        assert module is not None
        return module

    def _expand(self, latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        module: Any = self._attention_module
        return module.expand_kv(latents, rotated)

    def _with_latents(self, call: AttentionCall) -> AttentionCall:
        assert self._latents is not None
        latents, rotated = self._latents
        mask = None if call.mask is None else call.mask[..., -latents.shape[2] :]
        return replace(call, key=latents, value=rotated, mask=mask)


def absorb_queries(module: nn.Module, queries: Tensor, latents: Tensor, rotated: Tensor) -> Tensor:
    """Return the queries of the one KV head with the keys [latent, rotated key].

    Args:
        module: the attention module.
        queries: [batch, heads, queries, head_dim].
        latents: latents of any tokens, [batch, 1, tokens, latent_dim].
        rotated: rotated keys of any tokens, [batch, 1, tokens, rotary_dim].

    Returns:
        [batch, heads, queries, latent_dim + rotary_dim].

    """
    keys, _ = _expanded_bases(module, latents, rotated)
    return torch.einsum("bhqd,hld->bhql", queries, keys.to(queries.dtype))


def _expanded_bases(module: Any, latents: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrices of the linear map `expand_kv`: [A; B], and the map from latents to values.

    Returns:
        [heads, latent_dim + rotary_dim, head_dim] and [heads, latent_dim, value_dim].

    """
    latent_dim, rotary_dim = latents.shape[-1], rotated.shape[-1]
    basis = torch.eye(latent_dim + rotary_dim, dtype=latents.dtype, device=latents.device)[None, None]
    with torch.no_grad():
        keys, values = module.expand_kv(basis[..., :latent_dim].contiguous(), basis[..., latent_dim:].contiguous())
    return keys[0], values[0, :, :latent_dim]
