"""The three formats of masks in transformers, and their conversion to dense masks.

* Dense masks, [batch, 1, queries, keys]: `sdpa` and `eager`.
* Padding masks, [batch, keys]: FlashAttention, which is causal and leaves the padding out.
* Block masks, which are functions of indices: `flex_attention`.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS


class MaskFormat(enum.Enum):
    """The format of the masks of an attention implementation."""

    DENSE = "dense"
    PADDING = "padding"
    BLOCK = "block"


_EXAMPLES = {
    "sdpa": MaskFormat.DENSE,
    "eager": MaskFormat.DENSE,
    "flash_attention_2": MaskFormat.PADDING,
    "flash_attention_3": MaskFormat.PADDING,
    "flex_attention": MaskFormat.BLOCK,
}


def mask_format(implementation: str) -> MaskFormat | None:
    """Return the format of the masks of an attention implementation; None if it is not known.

    It is found from the function that makes the masks, because kernels of the Hub register one of the functions of
    transformers under their own name.
    """
    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS[implementation]
    return next((own for name, own in _EXAMPLES.items() if ALL_MASK_ATTENTION_FUNCTIONS[name] is make_mask), None)


def dense_mask(mask: Any, num_new: int) -> Tensor | None:
    """Return a mask over new tokens as a dense mask.

    Args:
        mask: a mask of any format whose last `num_new` keys are the new tokens; None if each token may read all tokens
            before it.
        num_new: number of new tokens.

    Returns:
        Bool [batch or 1, 1, num_new, num_new], True where a token may be read; None if `mask` is None.

    """
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        mask = mask[..., -num_new:]
        is_readable = mask if mask.dtype == torch.bool else mask > 0 if mask.dim() == 2 else mask == 0
        if mask.dim() == 4:
            return is_readable
        causal = torch.ones(num_new, num_new, dtype=torch.bool, device=mask.device).tril_()
        return causal & is_readable[:, None, None]
    if not hasattr(mask, "_suffice_dense"):
        from torch.nn.attention.flex_attention import create_mask

        device = mask.kv_num_blocks.device
        mask._suffice_dense = create_mask(mask.mask_mod, mask.shape[0], 1, num_new, num_new, device=device)
    return mask._suffice_dense


def readable_entries(positions: Tensor, mask: Tensor | None, num_new: int) -> Tensor:
    """Return which entries each new token may read, bool [batch, num_key_value_heads, num_new, width].

    Args:
        positions: positions of entries, of which those of the new tokens are the last ones, negative in empty slots and
            for masked tokens; [batch, num_key_value_heads, width].
        mask: bool [batch or 1, 1, num_new, num_new], which new tokens each new token may read; None if it may read all
            before it. A single new token may read all entries.
        num_new: number of new tokens.

    """
    is_entry = (positions >= 0)[:, :, None]
    if num_new == 1:
        return is_entry
    if mask is None:
        mask = torch.ones(1, 1, num_new, num_new, dtype=torch.bool, device=positions.device).tril_()
    readable = is_entry.repeat(1, 1, num_new, 1)
    readable[..., -num_new:] &= mask
    return readable


def additive_mask(readable: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bool mask as numbers to add to the logits: 0 where it is True, the lowest number elsewhere."""
    return torch.zeros_like(readable, dtype=dtype).masked_fill_(~readable, torch.finfo(dtype).min)
