"""Left padding: what an attention mask says about it, and which masks are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Padding:
    """Which new tokens are padding; read from the device once for all layers.

    Args:
        valid: bool [batch, new], False on padding.
        num_padded: number of padding tokens of each row.
        has_holes: for each row, whether padding follows another token.
        ends_padded: for each row, whether its last token is padding.

    """

    valid: Tensor
    num_padded: tuple[int, ...]
    has_holes: tuple[bool, ...]
    ends_padded: tuple[bool, ...]

    @classmethod
    def from_mask(cls, valid: Tensor) -> Padding | None:
        """Read a mask, bool [batch, new]; None if no token is padding."""
        holes = (valid[:, :-1] & ~valid[:, 1:]).any(-1)
        rows = torch.stack(((~valid).sum(-1), holes.long(), (~valid[:, -1]).long())).tolist()
        if not any(rows[0]):
            return None
        return cls(valid, tuple(rows[0]), tuple(map(bool, rows[1])), tuple(map(bool, rows[2])))


def check_left_padding(padding: Padding | None, earlier: Sequence[int], num_seen: int) -> None:
    """Raise unless all padding is left padding.

    Args:
        padding: of the new tokens; None if there is none.
        earlier: number of padding tokens that each row has had so far; empty before the first call.
        num_seen: number of columns of the model's input so far.

    Raises:
        ValueError: a row has padding behind its first token.

    """
    if padding is None:
        return
    if any(hole and end for hole, end in zip(padding.has_holes, padding.ends_padded, strict=True)):
        raise ValueError(
            "attention_mask must pad on the left, got a row whose last token is masked. "
            "Set tokenizer.padding_side = 'left'"
        )
    if any(padding.has_holes):
        raise ValueError("attention_mask must pad on the left, got masked tokens inside a prompt")
    if num_seen and any(before < num_seen and new for before, new in zip(earlier, padding.num_padded, strict=True)):
        raise ValueError("attention_mask must pad on the left, got masked tokens behind the first token of a row")
