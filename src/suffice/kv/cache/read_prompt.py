"""Read a prompt into a cache, at once or in chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def read_prompt(
    model: PreTrainedModel, ids: Tensor, cache: Any, *, mask: Tensor | None = None, chunk_size: int | None = None
) -> Tensor:
    """Feed the tokens of a prompt to a model, which stores their keys and values in a cache.

    Args:
        model: the language model.
        ids: tokens of the prompt, long [batch, tokens].
        cache: the cache to fill; it may already hold earlier tokens.
        mask: mask of the tokens that the cache holds and of the prompt, [batch, all tokens]; None without padding.
        chunk_size: number of tokens of a forward pass; None reads all at once.

    Returns:
        The logits of the last token, [batch, vocabulary]; empty for a prompt without tokens.

    """
    network: Any = model
    logits = torch.empty(0)
    num_read = 0 if mask is None else mask.shape[1] - ids.shape[1]
    for chunk in ids.split(chunk_size or ids.shape[1], dim=1) if ids.shape[1] else ():
        num_read += chunk.shape[1]
        options = {} if mask is None else {"attention_mask": mask[:, :num_read]}
        logits = network(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1, **options).logits[:, -1]
    return logits
