"""Checks of the positions of a forward pass, before any layer runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from suffice.kv.cache.state import LayerState


def num_new_tokens(inputs: Mapping[str, Any]) -> int:
    """Return how many tokens a forward pass of a decoder reads.

    Args:
        inputs: keyword arguments of the decoder.

    """
    for name, dim in (("input_ids", 1), ("inputs_embeds", 1), ("position_ids", -1)):
        if (x := inputs.get(name)) is not None:
            return x.shape[dim]
    return 0


def check_position_ids(inputs: Mapping[str, Any], state: LayerState, needed_by: str) -> None:
    """Check that the positions of a row's tokens are consecutive numbers, on all axes.

    Models with several axes of positions give other positions to the tokens of an image, and therefore also to all
    later tokens. The positions may count padding or not, because only differences of positions matter.

    Args:
        inputs: keyword arguments of the decoder.
        state: state of a layer before the forward pass.
        needed_by: the argument of the cache that needs consecutive positions, for the error message.

    Raises:
        ValueError: the positions of a row are not consecutive.

    """
    given, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if given is None:
        return  # the decoder counts the tokens
    start, new = state.num_seen, given.shape[-1]
    with_padding = torch.arange(start, start + new, device=given.device)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == start + new:
        is_token = mask[:, start:].bool()
        without_padding = mask.long().cumsum(-1)[:, start:] - 1
    else:
        is_token = torch.ones(1, 1, dtype=torch.bool, device=given.device)
        without_padding = with_padding - torch.tensor(state.num_padding or [0], device=given.device)[:, None]
    fits = [(given == expected) | ~is_token for expected in (without_padding, with_padding)]
    if not any(bool(fit.all()) for fit in fits):
        raise ValueError(
            f"position_ids must be consecutive numbers in each row, because {needed_by} rotates keys or queries, got "
            "other numbers. Models with several position axes give such positions to images"
        )


def check_window(inputs: Mapping[str, Any], num_held: int, window: int) -> None:
    """Check that entries and new tokens fit into the context window of a model.

    Args:
        inputs: keyword arguments of the decoder.
        num_held: number of entries of the head with the most entries.
        window: number of tokens in the context window.

    Raises:
        ValueError: they do not fit.

    """
    new = num_new_tokens(inputs)
    if num_held + new > window:
        raise ValueError(
            f"the input must have at most {max(0, window - num_held)} tokens with rerotate=True, because the context "
            f"window has {window} and a head holds {num_held} entries, got {new}. Read the text in chunks of at most "
            f"{window // 2} tokens with evict='always'"
        )
