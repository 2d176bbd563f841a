"""Estimate the head profile of a model from its weights, without running it on a text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from suffice.kv.budget.profile import Profile
from suffice.kv.hf.fingerprint import fingerprint
from suffice.kv.hf.layers import compressed_layers
from suffice.kv.hf.model_info import context_window
from suffice.kv.hf.offload import execution_device, materialized_weight
from suffice.kv.hf.rotary import RotaryEmbedding
from suffice.kv.hf.rotary_probe import probe_positions
from suffice.kv.hf.tensor_parallel import Sharding
from suffice.kv.hf.wrappers import unwrap_model

_DEFAULT_CONTEXT_WINDOW = 8192  # for models whose configuration does not state it
_EXPONENT = 8.5
"""The profile is the share of slow pairs raised to this power. `HeadProfile` raises it to 0.7 again, so that the number
of entries of a head is about proportional to the sixth power of the share."""


def profile_from_weights(model: nn.Module) -> Profile:
    """Estimate how much of its cache each head of a model reads.

    A rotary pair is slow if it makes less than one turn within the context window. It hardly distinguishes positions,
    so a head with most of the energy of its queries and keys in slow pairs finds a matching entry at any distance.

    The energy of pair j of a query head is |q_j| |k_j|, where |q_j| and |k_j| are the norms of the rows of the query
    and key projections that produce the pair. The share of slow pairs in the total energy, maximized over a GQA group
    and raised to a fixed power, approximates what `calibrate` measures. Dimensions that are not rotated count as slow.

    Args:
        model: its attention modules must have the projections `q_proj` and `k_proj`, or `qkv_proj`.

    Raises:
        ValueError: the attention has other projections or an unknown position embedding, or the model is
            tensor-parallel.

    """
    model = unwrap_model(model)
    if Sharding.from_model(model) is not None:
        raise ValueError("model must not be tensor-parallel, got one that is split over processes. Use `calibrate`")
    config = model.config.get_text_config()
    with torch.no_grad():
        norms = {layer: _row_norms(module, config) for layer, module in compressed_layers(model).items()}
    encoding = probe_positions(model)
    if encoding.error is not None:
        raise ValueError(f"model must have a known position embedding, got {type(model).__name__}: {encoding.error}")
    max_slow_frequency = 2 * math.pi / (context_window(model) or _DEFAULT_CONTEXT_WINDOW)  # radians per token
    attention: list[tuple[float, ...]] = []
    with torch.no_grad():
        for layer, (queries, keys) in norms.items():
            partners, frequencies = _rotary_pairs(encoding.rotary.get(layer), keys.shape[-1])
            energy = _pair_norms(queries, partners) * _pair_norms(keys, partners)[:, None]
            # [num_key_value_heads, num_key_value_groups]
            share = energy[..., frequencies < max_slow_frequency].sum(-1) / energy.sum(-1)
            smallest = torch.finfo(torch.float32).eps
            attention.append(tuple(share.amax(-1).clamp_min(smallest).pow(_EXPONENT).tolist()))
    return Profile(tuple(attention), fingerprint(model), "slow rotary pairs of the weights")


def _row_norms(module: nn.Module, config: Any) -> tuple[Tensor, Tensor]:
    """Return the norms of the rows of the query and key projections, on the CPU.

    Returns:
        [num_key_value_heads, num_key_value_groups, head_dim] and [num_key_value_heads, head_dim].

    """
    num_key_value_heads, num_heads = config.num_key_value_heads, config.num_attention_heads
    queries, keys, fused = (_projection_norms(module, name) for name in ("q_proj", "k_proj", "qkv_proj"))
    if queries is None or keys is None:
        if fused is None:
            raise ValueError(
                f"attention of the model must have q_proj and k_proj, or qkv_proj, got {type(module).__name__}, which "
                "has neither. Use `calibrate`, which runs the model"
            )
        head_dim = len(fused) // (num_heads + 2 * num_key_value_heads)
        num_query_rows, num_key_rows = num_heads * head_dim, num_key_value_heads * head_dim
        queries, keys = fused[:num_query_rows], fused[num_query_rows : num_query_rows + num_key_rows]
    queries = queries.view(num_key_value_heads, num_heads // num_key_value_heads, -1)
    keys = keys.view(num_key_value_heads, -1)
    return queries * _norm_scale(module, "q_norm", queries), keys * _norm_scale(module, "k_norm", keys)


def _projection_norms(module: nn.Module, name: str) -> Tensor | None:
    """Return the norms of the rows of a projection on the CPU; None if the module has no such projection."""
    projection = getattr(module, name, None)
    weight = None if projection is None else materialized_weight(projection, "weight")
    return None if weight is None else weight.float().norm(dim=-1).cpu()


def _norm_scale(module: nn.Module, name: str, norms: Tensor) -> Tensor:
    """Return the scale of a query or key norm (Qwen 3) for each dimension of a head; ones if there is no norm."""
    norm: Any = getattr(module, name, None)
    head_dim = norms.shape[-1]
    if norm is None or (weight := materialized_weight(norm, "weight")) is None or weight.shape != (head_dim,):
        return norms.new_ones(head_dim)
    # The norm maps ones to its scale, also if the model stores the scale minus 1 (Gemma).
    return norm(torch.ones(1, head_dim, dtype=weight.dtype, device=execution_device(norm)))[0].float().abs().cpu()


def _rotary_pairs(rotary: RotaryEmbedding | str | None, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return how the rotary embedding of a layer pairs and rotates the dimensions of a head.

    Returns:
        The partner of each dimension, long [head_dim]; a dimension that is not rotated is its own partner. And the
        angle by which each dimension is rotated per position, in radians, [head_dim].

    """
    if isinstance(rotary, str):
        raise ValueError(f"model must have a known rotary embedding: {rotary}. Use `calibrate`, which runs the model")
    partners, frequencies = torch.arange(head_dim), torch.zeros(head_dim)
    if rotary is not None:
        first, second = partners[rotary.first].clone(), partners[rotary.second].clone()
        partners[first], partners[second] = second, first
        frequencies[first] = frequencies[second] = rotary.frequencies.values(torch.ones(1, 1))
    return partners, frequencies


def _pair_norms(norms: Tensor, partners: Tensor) -> Tensor:
    """Return the norm of the pair of each dimension, [..., head_dim]. It is the same for both dimensions of a pair.

    A dimension without a partner counts twice, so that it has the weight of a pair.
    """
    is_alone = partners == torch.arange(len(partners))
    squares = norms.square()
    return torch.where(is_alone, 2 * squares, squares + squares[..., partners]).sqrt()
