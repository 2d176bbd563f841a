"""Which layers of a transformers model have a KV cache that can be compressed, and their attention modules."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer

# A layer with full attention and the state of linear attention. Early versions of transformers do not have it.
HYBRID_LAYER: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None)


def stock_layers(model: PreTrainedModel) -> list[Any]:
    """Return new empty layers of the model's own cache."""
    return list(DynamicCache(config=model.config).layers)


def full_attention_layers(model: PreTrainedModel) -> list[int]:
    """Return the indices of the layers with full attention. These are the layers that a cache compresses."""
    return [index for index, layer in enumerate(stock_layers(model)) if type(layer) in (DynamicLayer, HYBRID_LAYER)]


def attention_modules(decoder: nn.Module) -> dict[int, nn.Module]:
    """Return the attention module of each layer, by layer index. Several layers may share one module."""
    attention = [module for module in decoder.modules() if _is_attention(module)]
    modules = {index: module for module in attention if isinstance(index := getattr(module, "layer_idx", None), int)}
    # A module that several layers share has the index of none of them, or of the first.
    layers: Any = getattr(decoder, "layers", ())
    for index, layer in enumerate(layers):
        shared = [module for module in layer.modules() if _is_attention(module)]
        if shared and index not in modules:
            modules[index] = shared[-1]
    return modules


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__
