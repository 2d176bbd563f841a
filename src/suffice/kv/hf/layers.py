"""Which layers of a transformers model have a KV cache that can be compressed, and their attention modules."""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from torch import nn
from transformers import DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from suffice.kv.attention.options import check_attention_options
from suffice.kv.hf.attention_source import CacheUse, cache_use

# A layer with full attention and the state of linear attention. Early versions of transformers do not have it.
HYBRID_LAYER: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", None)
# A layer with the state of linear attention only.
LINEAR_LAYER: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", CacheLayerMixin)


def find_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return the transformer that the cache is passed to."""
    decoder: Any = model.get_decoder()
    if decoder is not model and getattr(getattr(decoder, "config", None), "is_encoder_decoder", False):
        inner: Any = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder
        decoder = inner if isinstance(inner, PreTrainedModel) else decoder
    # `get_decoder` of some models returns another module, such as the last projection.
    base: Any = model.base_model
    return decoder if isinstance(decoder, PreTrainedModel) else base


def stock_layers(model: PreTrainedModel) -> list[Any]:
    """Return new empty layers of the model's own cache.

    Raises:
        ValueError: the model has no cache of layers.

    """
    name = type(model).__name__
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        raise ValueError(
            f"model must use the DynamicCache of transformers, got {name}, which makes a cache of its own kind in "
            f"transformers {transformers.__version__}. Newer versions of transformers use DynamicCache in more models"
        )
    try:
        return list(DynamicCache(config=model.config).layers)
    except AttributeError as error:
        raise ValueError(
            f"model must have a configuration from which a DynamicCache can be made, got {name}: {error}"
        ) from None


def compressed_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return the attention modules of the layers that a cache compresses, by layer index.

    These are the layers with full attention or, in a model that has none, those with a sliding window.

    Raises:
        ValueError: the model has no such layers, or a cache cannot see the queries of one, or the attention of one has
            an unsupported option.

    """
    name = type(model).__name__
    layers = stock_layers(model)
    if not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        raise ValueError(
            f"model must have a KV cache, got {name}, whose layers keep states of a fixed size. These cannot be "
            "compressed"
        )
    modules = attention_modules(find_decoder(model))
    indices = [
        index
        for index, layer in enumerate(layers)
        if type(layer) in (DynamicLayer, HYBRID_LAYER) and not _is_cross_attention(modules.get(index))
    ]
    indices = indices or [index for index, layer in enumerate(layers) if sliding_window(layer, model) is not None]
    if not indices:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
        raise ValueError(
            f"model must have layers with full attention or a sliding window, got {name}, whose cache consists of "
            f"{kinds}"
        )
    for index in indices:
        if index not in modules:
            raise ValueError(
                f"model must have an attention module in each layer of its cache that calls transformers' attention "
                f"interface (`ALL_ATTENTION_FUNCTIONS`), got {name} without one in layer {index}. Without the call, a "
                "cache does not see the queries. Use a newer architecture"
            )
        _check_module(modules[index], name)
    return {index: modules[index] for index in indices}


def cross_attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return the modules of the decoder that read the output of an encoder, by layer index.

    Raises:
        ValueError: the model has no such modules, or a cache cannot see the queries of one, or the attention of one has
            an unsupported option.

    """
    decoder, name = find_decoder(model), type(model).__name__
    own = attention_modules(decoder)
    found: dict[int, nn.Module] = {}
    for module in decoder.modules():
        index: Any = getattr(module, "layer_idx", None)
        # The self-attention of a layer comes first and has the same index.
        if isinstance(index, int) and module is not own.get(index) and _reads_encoder(module):
            found.setdefault(index, module)
    if not found:
        raise ValueError(f"model must have a decoder with cross-attention to the output of an encoder, got {name}")
    for module in found.values():
        _check_module(module, name)
    return found


def sliding_window(layer: Any, model: PreTrainedModel) -> int | None:
    """Return how many tokens a token reads in a layer of the model's own cache; None if it has no sliding window."""
    config: Any = model.config.get_text_config(decoder=True)
    # Layers that read chunks of a fixed size have the same class, but the chunks do not slide.
    is_chunked = getattr(config, "attention_chunk_size", None) is not None
    return None if type(layer) is not DynamicSlidingWindowLayer or is_chunked else layer.sliding_window


def source_layers(model: PreTrainedModel) -> list[int]:
    """Return the indices of the compressed layers whose keys and values later layers read instead of their own."""
    layers = stock_layers(model)
    readers = [
        index
        for index in attention_modules(find_decoder(model))
        if index >= len(layers) or not isinstance(layers[index], CacheLayerMixin | LINEAR_LAYER)
    ]
    # The readers read the last compressed layer before them.
    before = [index for index in compressed_layers(model) if readers and index < min(readers)]
    return before[-1:]


def _check_module(module: nn.Module, model: str) -> None:
    """Raise an error if an attention module uses its keys and values in a way that a cache cannot see."""
    use, kind = cache_use(module), type(module).__name__
    if use is CacheUse.BYPASSED:
        raise ValueError(
            f"model must call transformers' attention interface (`ALL_ATTENTION_FUNCTIONS`), got {model}, whose {kind} "
            "computes attention itself. Without the call, a cache does not see the queries. Use a newer architecture"
        )
    if use is CacheUse.CHANGED and not caches_latents(module):
        raise ValueError(
            f"model must pass the keys and values of its cache to its attention as they are, got {model}, whose {kind} "
            "changes them in between. Use another architecture"
        )
    if use is CacheUse.READ:
        raise ValueError(
            f"model must read the keys and values of its cache in its attention only, got {model}, whose {kind} "
            "computes something else from them, for example a mask over all tokens. Use another architecture"
        )
    check_attention_options(module)


def attention_modules(decoder: nn.Module) -> dict[int, nn.Module]:
    """Return the attention module of each layer, by layer index. Several layers may share one module."""
    candidates = [module for module in decoder.modules() if _calls_attention(module)]
    candidates += [module for module in decoder.modules() if "Attention" in type(module).__name__]
    modules: dict[int, nn.Module] = {}
    for module in candidates:
        index: Any = getattr(module, "layer_idx", None)
        if isinstance(index, int):
            # In the decoder of an encoder-decoder model, the cross-attention comes later and has the same index.
            modules.setdefault(index, module)
    # A module that several layers share has no index, or only that of the first layer.
    layers: Any = getattr(decoder, "layers", ())
    for index, layer in enumerate(layers):
        shared = [module for module in layer.modules() if _calls_attention(module)]
        if shared and index not in modules:
            modules[index] = shared[0]
    return modules


def caches_latents(module: nn.Module) -> bool:
    """Return whether an attention module caches one latent per token and computes the keys of all heads from it."""
    return cache_use(module) is CacheUse.CHANGED and hasattr(module, "expand_kv")


def _calls_attention(module: nn.Module) -> bool:
    return cache_use(module) in (CacheUse.DIRECT, CacheUse.CHANGED)


def _reads_encoder(module: nn.Module) -> bool:
    """Return whether an attention module accepts the output of an encoder."""
    accepted = inspect.signature(module.forward).parameters
    return "Attention" in type(module).__name__ and not accepted.keys().isdisjoint(
        ("key_value_states", "encoder_hidden_states", "cross_attention_states")
    )


def _is_cross_attention(module: nn.Module | None) -> bool:
    """Return whether a module reads the output of an encoder. Its keys do not grow with the text."""
    return "CrossAttention" in type(module).__name__
