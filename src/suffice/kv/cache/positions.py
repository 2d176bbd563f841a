"""Rotary embeddings of a cache, and checks of the positions of a forward pass before any layer runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from suffice.kv.cache.state import LayerState
from suffice.kv.hf.rotary import RotaryEmbedding
from suffice.kv.hf.rotary_probe import probe_positions
from suffice.kv.policy.policy import Policy


def num_new_tokens(inputs: Mapping[str, Any]) -> int:
    """Return how many tokens a forward pass of a decoder reads.

    Args:
        inputs: keyword arguments of the decoder.

    """
    given, positions = new_tokens(inputs), inputs.get("position_ids")
    if given is not None:
        return given.shape[1]
    return 0 if positions is None else positions.shape[-1]


def new_tokens(inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the ids of the tokens that a forward pass of a decoder reads, or their embeddings; None without either."""
    return next((x for name in ("input_ids", "inputs_embeds") if (x := inputs.get(name)) is not None), None)


def check_continues(inputs: Mapping[str, Any], state: LayerState) -> None:
    """Check that the input of a forward pass continues the tokens that a cache holds.

    `generate` gets the whole prompt and skips as many tokens as the cache has seen. If the prompt is not longer than
    that, `generate` passes no tokens, or the wrong ones.

    Args:
        inputs: keyword arguments of the decoder.
        state: state of a layer before the forward pass.

    Raises:
        ValueError: there are no new tokens, they do not follow the earlier ones, or the number of rows differs.

    """
    given = new_tokens(inputs)
    if given is None:
        return
    length = _prompt_length(inputs, given, state)
    if length is not None:
        if state.num_seen == 0:
            raise ValueError("input_ids must have at least 1 token, got none")
        raise ValueError(
            f"input_ids must be longer than the {state.num_seen} tokens that the CompressedCache already holds, and "
            f"begin with them, got {length or 'no further'} tokens. For another prompt, make a new CompressedCache, or "
            "call cache.reset(). For several questions about one document, pass a cache.copy() with each"
        )
    if state.rows and given.shape[0] != len(state.rows):
        raise ValueError(
            f"input_ids must have {len(state.rows)} rows, as many as the CompressedCache holds, got {given.shape[0]}. "
            "To continue each row several times, call cache.batch_repeat_interleave(times) first"
        )


def _prompt_length(inputs: Mapping[str, Any], given: Tensor, state: LayerState) -> int | None:
    """Return the number of tokens of a prompt that does not continue the earlier tokens; None if it does.

    It follows from the attention mask or, if there is none, from the positions. It is 0 if there are no new tokens.
    """
    num_new, mask, positions = given.shape[1], inputs.get("attention_mask"), inputs.get("position_ids")
    if num_new == 0:
        return 0
    if isinstance(mask, Tensor):
        return mask.shape[1] if mask.dim() == 2 and mask.shape[1] < state.num_seen + num_new else None
    # Positions of single tokens on a GPU are not read, to avoid a synchronization at each step.
    if state.num_seen == 0 or mask is not None or not isinstance(positions, Tensor) or positions.dim() != 2:
        return None
    if any(state.num_padding) or (num_new == 1 and positions.device.type != "cpu"):
        return None
    last = int(positions[:, -1].min())
    return last + 1 if last < state.num_seen else None


def check_position_ids(
    inputs: Mapping[str, Any], state: LayerState, needed_by: str, *, firsts: tuple[int, ...]
) -> None:
    """Check that the positions of a row's tokens are consecutive numbers, on all axes.

    Models with several axes of positions give other positions to the tokens of an image, and therefore also to all
    later tokens. The positions may count padding or not, because only differences of positions matter.

    Args:
        inputs: keyword arguments of the decoder.
        state: state of a layer before the forward pass.
        needed_by: the argument of the cache that needs consecutive positions, for the error message.
        firsts: positions that the first token of a text may have.

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
    fits = ((given == expected + first) | ~is_token for first in firsts for expected in (without_padding, with_padding))
    if not any(bool(fit.all()) for fit in fits):
        raise ValueError(
            f"position_ids must be consecutive numbers in each row, from {' or '.join(map(str, firsts))}, because "
            f"{needed_by} rotates keys or queries, got other numbers. Models with several position axes give such "
            "positions to images"
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


def find_rotary_embeddings(
    model: PreTrainedModel, layers: Sequence[int], policy: Policy, *, rerotate: bool, repair: bool
) -> dict[int, RotaryEmbedding | str | None]:
    """Return the rotary embedding of each layer, as `CompressedLayer` takes it. It is measured only if it is needed.

    Raises:
        ValueError: keys cannot be rotated as `rerotate` or the policy requires.

    """
    if not rerotate and not policy.needs_rotary:
        if repair:
            return _known_rotary_embeddings(model, layers)
        return dict.fromkeys(layers, "`needs_rotary` of weights or directions that use it must return True")
    if rerotate:
        refused = f"rerotate must be False for {type(model).__name__}, got True"
    else:
        refused = f"policy must not rotate keys or queries back for {type(model).__name__}, got {policy.name!r}"
    encoding = probe_positions(model)
    if encoding.error is not None:
        raise ValueError(f"{refused}: {encoding.error}")
    if rerotate and not encoding.is_rotary:
        raise ValueError(f"{refused}: the model has no rotary embedding, so keys cannot be moved to other positions")
    for layer in layers:
        found = encoding.rotary.get(layer, "no keys were recorded") if encoding.is_rotary else None
        if isinstance(found, str):
            raise ValueError(f"{refused}: in layer {layer}, {found}")
        if found is not None and rerotate and found.frequencies.depends_on_length:
            raise ValueError(
                "rerotate must be False for a model whose rotary embedding changes its frequencies with the length of "
                "the text, got True"
            )
        if found is not None and policy.weights.needs_rotary and not found.rotates_queries:
            raise ValueError(f"{refused}: in layer {layer}, queries are not rotated as keys are")
    return {layer: encoding.rotary.get(layer) for layer in layers}


def _known_rotary_embeddings(model: PreTrainedModel, layers: Sequence[int]) -> dict[int, RotaryEmbedding | str | None]:
    """Return the rotary embedding of each layer, or why it is not known."""
    encoding = probe_positions(model)
    if encoding.error is not None:
        return dict.fromkeys(layers, encoding.error)
    if not encoding.is_rotary:
        return dict.fromkeys(layers)
    return {layer: encoding.rotary.get(layer, "no keys were recorded") for layer in layers}


def max_rerotated_entries(window: int, budget: float) -> int:
    """Return how many rerotated entries a head may keep: half of the context window. New tokens need the rest."""
    largest = window // 2
    if isinstance(budget, int) and budget > largest:
        raise ValueError(
            f"budget must be at most {largest} tokens with rerotate=True, half of the model's context window, got "
            f"{budget!r}"
        )
    return largest
