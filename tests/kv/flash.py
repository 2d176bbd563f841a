"""A stand-in for the FlashAttention package: the same functions, layouts and arguments, in plain torch on the CPU.

The attention function and the masks are those of transformers. Only the two functions that they call are replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

HUB_KERNELS = ("kernels-community/flash-attn2", "kernels-community/vllm-flash-attn3")


class FlashPackage:
    """Counts the calls of its functions, and how many queries and keys each of them got."""

    def __init__(self) -> None:
        self.loaded: list[str] = []  # names of the implementations that transformers has asked for
        self.shapes: list[tuple[int, int]] = []

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        """Compute attention of q [batch, queries, heads, dim] over k and v [batch, keys, kv_heads, dim].

        The causal mask is aligned at the last query and the last key, and the window counts keys.
        """
        assert dropout_p == 0
        queries, keys = q.shape[1], k.shape[1]
        self.shapes.append((queries, keys))
        groups = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
        logits = q.transpose(1, 2) @ k.mT * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        if softcap:
            logits = softcap * (logits / softcap).tanh()
        distance = torch.arange(queries)[:, None] + (keys - queries) - torch.arange(keys)
        masked = (distance < 0) & causal
        if window_size[0] >= 0:
            masked = masked | (distance > window_size[0])
        logits = logits.masked_fill(masked, float("-inf"))
        if s_aux is not None:
            logits = torch.cat((logits, s_aux.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)), dim=-1)
        return (logits.softmax(-1)[..., :keys] @ v).transpose(1, 2).contiguous()

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        """Compute attention of several texts that follow each other in q [total, heads, dim], k and v."""
        outputs: list[Tensor] = []
        ends = zip(cu_seqlens_q[1:].tolist(), cu_seqlens_k[1:].tolist(), strict=True)
        first_q = first_k = 0
        for end_q, end_k in ends:
            assert end_q - first_q <= int(max_seqlen_q)
            assert end_k - first_k <= int(max_seqlen_k)
            own = q[None, first_q:end_q], k[None, first_k:end_k], v[None, first_k:end_k]
            outputs.append(self.flash_attn_func(*own, dropout_p, softmax_scale, causal, window_size, softcap, s_aux)[0])
            first_q, first_k = end_q, end_k
        return torch.cat(outputs)


@contextmanager
def flash_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlashPackage]:
    """Context manager in which transformers finds the stand-in under every name of FlashAttention."""
    package, utils = FlashPackage(), modeling_flash_attention_utils
    has_paged_function = hasattr(utils, "_flash_with_kvcache_fn")

    def load(implementation: str, *arguments: Any, **options: Any) -> tuple[Any, ...]:
        assert implementation in ("flash_attention_2", "flash_attention_3", *HUB_KERNELS), implementation
        package.loaded.append(implementation)
        paged = (None,) if has_paged_function else ()
        functions = (package.flash_attn_func, package.flash_attn_varlen_func, *paged)
        return (*functions, utils._pad_input, utils._unpad_input)

    for name in HUB_KERNELS:  # transformers registers kernels of the Hub when it loads them
        AttentionInterface.register(name, ALL_ATTENTION_FUNCTIONS["flash_attention_2"])
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    monkeypatch.setattr(utils, "_lazy_imports", load)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    yield package


def with_flash(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    """Select FlashAttention without the checks of transformers, which look for a GPU and an installed package."""
    model.config._attn_implementation_internal = implementation
    return model
