"""Check limits on the bytes of caches before a prompt is read."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from suffice.kv.cache.cache import CompressedCache
from suffice.kv.hf.wrappers import unwrap_model


def check_limits(model: nn.Module, caches: Iterable[CompressedCache], num_tokens: int) -> None:
    """Check that the limits on the bytes of empty caches are large enough for a prompt, with a pass over one token.

    Args:
        model: the model of the caches.
        caches: empty caches; those without a limit are not checked.
        num_tokens: number of tokens of the prompt.

    Raises:
        TooLittleMemoryError: a limit is too small for the entries that are always kept.

    """
    limited = [cache for cache in caches if cache.settings.memory is not None]
    if not limited:
        return
    # The sizes of the tensors of a layer are known after an attention call.
    probe = CompressedCache(model, "full", memory=sys.maxsize, evict="prefill")
    network: Any = unwrap_model(model)
    with torch.no_grad():
        network(torch.zeros(1, 1, dtype=torch.long, device=network.device), past_key_values=probe, use_cache=True)
    shapes = {layer.index: layer.memory.shape for layer in probe.compressed_layers}
    for cache in limited:
        for layer in cache.compressed_layers:
            memory = replace(layer.memory, shape=shapes[layer.index])
            memory.plan_after(0, layer.state.append_tokens(num_tokens, None, 1), layer.max_readable)
