"""Left padding: what a mask says of it, what is refused, and the mask over all entries of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from suffice.kv.storage.uniform import UniformStorage

if TYPE_CHECKING:
    from suffice.kv.attention.hook import Call


@dataclass(frozen=True, slots=True)
class Padding:
    """Which new tokens are padding, and what of it decides: read once for all layers, since a GPU waits to be read.

    Args:
        valid: bool [batch, new], False on padding.
        tokens: how many of each row's are padding.
        holes: rows that have padding behind another token.
        ends: rows whose last token is padding.

    """

    valid: Tensor
    tokens: tuple[int, ...]
    holes: tuple[bool, ...]
    ends: tuple[bool, ...]

    @classmethod
    def of(cls, valid: Tensor) -> Padding | None:
        """Read a mask; None if nothing is padding."""
        holes = (valid[:, :-1] & ~valid[:, 1:]).any(-1)
        found = torch.stack(((~valid).sum(-1), holes.long(), (~valid[:, -1]).long())).tolist()
        if not any(found[0]):
            return None
        return cls(valid, tuple(found[0]), tuple(map(bool, found[1])), tuple(map(bool, found[2])))


def check_padding(padding: Padding | None, earlier: Sequence[int], seen: int) -> None:
    """Refuse what is not left padding.

    Args:
        padding: of the new tokens; None if none are.
        earlier: tokens of padding that each row has had so far; empty before the first call.
        seen: columns of the model's input so far.

    Raises:
        ValueError: a row is padded elsewhere than before its first token.

    """
    if padding is None:
        return
    if any(hole and end for hole, end in zip(padding.holes, padding.ends, strict=True)):
        raise ValueError(
            "attention_mask pads on the right (the last token of a row is masked); accepted: left padding. "
            "Set tokenizer.padding_side = 'left'"
        )
    if any(padding.holes):
        raise ValueError("attention_mask masks tokens inside a prompt; accepted: left padding only")
    if seen and any(before < seen and new for before, new in zip(earlier, padding.tokens, strict=True)):
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
