"""Left padding: what is refused, and the mask over all entries of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from retain.kv.attention import Call
from retain.kv.storage import UniformStorage


def check_padding(valid: Tensor | None, padding: Tensor | None, seen: int) -> None:
    """Refuse what is not left padding.

    Args:
        valid: False where new tokens are padding, bool [batch, new]; None if none are.
        padding: of each row so far, long [batch]; None before the first call.
        seen: columns of the model's input so far.

    Raises:
        ValueError: a row is padded elsewhere than before its first token.

    """
    if valid is None:
        return
    holes = valid[:, :-1] & ~valid[:, 1:]
    if bool((holes.any(-1) & ~valid[:, -1]).any()):
        raise ValueError(
            "attention_mask pads on the right (the last token of a row is masked); accepted: left padding. "
            "Set tokenizer.padding_side = 'left'"
        )
    if bool(holes.any()):
        raise ValueError("attention_mask masks tokens inside a prompt; accepted: left padding only")
    started = torch.zeros_like(valid[:, 0]) if padding is None else padding < seen
    if seen and bool((started & ~valid.all(-1)).any()):
        raise ValueError("attention_mask masks tokens after the first of a row; accepted: left padding only")


def whole_mask(call: Call, storage: UniformStorage) -> Tensor | None:
    """Extend the mask over the new tokens to all entries, [batch, 1, new, width]."""
    new, width = call.query.shape[2], storage.width
    earlier = storage.valid[:, : width - new]
    mask = call.mask
    if mask is None:
        if new == 1 and storage.full:
            return None
        mask = torch.ones(new, new, dtype=torch.bool, device=call.query.device).tril_()[None, None]
    mask = mask[..., -new:].expand(earlier.shape[0], -1, -1, -1)
    head = earlier[:, None, None].expand(-1, mask.shape[1], new, -1)
    if mask.dtype != torch.bool:
        lowest = torch.finfo(mask.dtype).min
        head = torch.zeros_like(head, dtype=mask.dtype).masked_fill_(~head, lowest)
    return torch.cat((head, mask), dim=-1)
