"""Facts about a transformers model: its context window, its attention modules, its layers with full attention."""

from __future__ import annotations

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


def context_window(model: PreTrainedModel) -> int | None:
    """Return the number of tokens in a model's context window; None if its configuration does not state it."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def attention_modules(decoder: nn.Module) -> dict[int, nn.Module]:
    """Return the attention module of each layer, by layer index."""
    return {
        index: module
        for module in decoder.modules()
        if isinstance(index := getattr(module, "layer_idx", None), int) and "Attention" in type(module).__name__
    }


def full_attention_layers(model: PreTrainedModel) -> list[int]:
    """Return the indices of the layers with full attention. These are the layers that a cache compresses."""
    stock = DynamicCache(config=model.config).layers
    return [index for index, layer in enumerate(stock) if type(layer) is DynamicLayer]
