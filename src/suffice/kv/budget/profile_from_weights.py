"""A head profile from a model's weights alone: heads that look far have their energy in slow rotary pairs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from suffice.kv.budget.head_profile import Profile
from suffice.kv.hf.fingerprint import fingerprint
from suffice.kv.hf.model_info import attention_modules, context_window, full_attention_layers
from suffice.kv.hf.offload import execution_device, materialized_weight
from suffice.kv.hf.rotary import RotaryEmbedding, find_rotate_half, rotary_embeddings
from suffice.kv.hf.tensor_parallel import Sharding

_WINDOW = 8192  # of a model that does not say its own
# Together with the power of .7 that budgets take, they follow the sixth power of the share.
_STEEPNESS = 8.5


def profile_from_weights(model: PreTrainedModel) -> Profile:
    """Estimate how much of its cache each head of a model reads, without running it.

    A rotary pair that makes less than one turn in the model's window hardly tells positions apart: what a head matches
    there it finds wherever it stands. For each query head it takes the share of Σ |q_j| |k_j| that lies in such slow
    pairs j, where |q_j| and |k_j| are norms of the projections' rows that make the pair. The largest share of a GQA
    group, to a power, stands for what `calibrate` measures. Dimensions that are not rotated count as slow.

    Args:
        model: its attention has the projections `q_proj` and `k_proj`, or `qkv_proj`.

    Raises:
        ValueError: the attention has other projections, or the weights are split over processes.

    """
    if Sharding.from_model(model) is not None:
        raise ValueError("model is split over processes; accepted: a whole one, or `calibrate`")
    decoder = model.get_decoder()
    modules = attention_modules(decoder)
    rotaries = rotary_embeddings(decoder, modules)
    slowest = 2 * math.pi / (context_window(model) or _WINDOW)
    rows: list[tuple[float, ...]] = []
    with torch.no_grad():
        for index in full_attention_layers(model):
            queries, keys = _row_norms(modules[index], model.config.get_text_config())
            partner, frequency = _pairs(modules[index], rotaries[index], keys.shape[-1])
            energy = _pair_norms(queries, partner) * _pair_norms(keys, partner)[:, None]
            share = energy[..., frequency < slowest].sum(-1) / energy.sum(-1)  # [kv_heads, group]
            least = torch.finfo(torch.float32).eps
            rows.append(tuple(share.amax(-1).clamp_min(least).pow(_STEEPNESS).tolist()))
    return Profile(tuple(rows), fingerprint(model), "slow rotary pairs of the weights")


def _row_norms(module: nn.Module, config: Any) -> tuple[Tensor, Tensor]:
    """Return norms of the rows of the query and key projections, [kv_heads, group, dim] and [kv_heads, dim]."""
    kv_heads, heads = config.num_key_value_heads, config.num_attention_heads
    queries, keys, fused = (_norms(module, name) for name in ("q_proj", "k_proj", "qkv_proj"))
    if queries is None or keys is None:
        if fused is None:
            raise ValueError(
                f"{type(module).__name__} has neither q_proj and k_proj nor qkv_proj; accepted: a model that has, or "
                "`calibrate`, which runs the model"
            )
        dim = len(fused) // (heads + 2 * kv_heads)
        queries, keys = fused[: heads * dim], fused[heads * dim : (heads + kv_heads) * dim]
    queries, keys = queries.view(kv_heads, heads // kv_heads, -1), keys.view(kv_heads, -1)
    # A norm over a head's dimensions, as Qwen 3 has it, scales them one by one.
    return queries * _scale(module, "q_norm", queries), keys * _scale(module, "k_norm", keys)


def _norms(module: nn.Module, name: str) -> Tensor | None:
    projection = getattr(module, name, None)
    weight = None if projection is None else materialized_weight(projection, "weight")
    return None if weight is None else weight.float().norm(dim=-1).cpu()


def _scale(module: nn.Module, name: str, norms: Tensor) -> Tensor:
    norm: Any = getattr(module, name, None)
    dim = norms.shape[-1]
    if norm is None or (weight := materialized_weight(norm, "weight")) is None or weight.shape != (dim,):
        return norms.new_ones(dim)
    # What it makes of ones is its scale, whether it is stored as such or less one, as Gemma has it.
    return norm(torch.ones(1, dim, dtype=weight.dtype, device=execution_device(norm)))[0].float().abs().cpu()


def _pairs(module: nn.Module, rotary: RotaryEmbedding | None, dim: int) -> tuple[Tensor, Tensor]:
    """Return the partner of each dimension, itself if it is not rotated, and its turn from a token to the next."""
    partner, frequency = torch.arange(dim), torch.zeros(dim)
    if rotary is not None:
        cos, sin = (x[0, 0].cpu() for x in rotary(torch.ones(1, 1, dtype=torch.long, device=execution_device(module))))
        rotate = find_rotate_half(module)
        partner[: len(cos)] = rotate(torch.eye(len(cos))).abs().argmax(0)
        frequency[: len(cos)] = torch.atan2(sin, cos).abs()
    return partner, frequency


def _pair_norms(norms: Tensor, partner: Tensor) -> Tensor:
    """Return the norm of each dimension's pair; both of a pair have it, and one alone counts as two."""
    alone = partner == torch.arange(len(partner))
    square = norms.square()
    return torch.where(alone, 2 * square, square + square[..., partner]).sqrt()
