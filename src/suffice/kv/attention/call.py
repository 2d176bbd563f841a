"""One attention call: its tensors, its padding, and its computation by the model's own implementation."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from suffice.kv.attention.masks import additive_mask, dense_mask


@dataclass(frozen=True, slots=True)
class Padding:
    """Which new tokens are padding. It is read from the device only once for all layers.

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

    def leaves_holes(self, has_tokens: Sequence[bool]) -> bool:
        """Return whether a masked token follows another token of its row.

        Args:
            has_tokens: for each row, whether it has earlier tokens that are not masked.

        """
        counts = zip(self.has_holes, self.num_padded, has_tokens, strict=True)
        return any(hole or (count > 0 and tokens) for hole, count, tokens in counts)

    @classmethod
    def from_mask(cls, valid: Tensor) -> Padding | None:
        """Read the padding from a mask, bool [batch, new]; return None if no token is padding."""
        holes = (valid[:, :-1] & ~valid[:, 1:]).any(-1)
        rows = torch.stack(((~valid).sum(-1), holes.long(), (~valid[:, -1]).long())).tolist()
        if not any(rows[0]):
            return None
        return cls(valid, tuple(rows[0]), tuple(map(bool, rows[1])), tuple(map(bool, rows[2])))


def check_right_padding(padding: Padding | None) -> None:
    """Raise an error if a row of a prompt is padded on the right.

    Args:
        padding: masked tokens of the prompt; None if there are none.

    Raises:
        ValueError: the last token of a row is masked, but an earlier one is not.

    """
    if padding is None:
        return
    # The first chunk of a short row of a left-padded batch may hold padding only.
    if any(hole and end for hole, end in zip(padding.has_holes, padding.ends_padded, strict=True)):
        raise ValueError(
            "attention_mask must pad on the left, got a row whose last token is masked. "
            "Set tokenizer.padding_side = 'left'"
        )


@dataclass(frozen=True)
class AttentionCall:
    """One call of a model's attention function.

    Args:
        module: the attention module.
        query: [batch, heads, new, head_dim], after the rotary embedding.
        key: [batch, num_key_value_heads, new, head_dim], of the new tokens, after the rotary embedding.
        value: [batch, num_key_value_heads, new, value_dim], of the new tokens.
        mask: the model's mask over the new tokens, in the format of its attention implementation (see
            `suffice.kv.attention.masks`). None if each token may read all tokens before it.
        scaling: factor on the query-key product; None for 1/√head_dim.
        options: other keyword arguments of the attention function.
        implementation: name of the model's own attention implementation.
        memo: memoized statistics that several caches share, see `AttentionStats`; None if they are not shared.
        replay_scores: scores of the entries from a replay, see `AttentionStats`.

    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    scaling: float | None
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    implementation: str = "sdpa"
    memo: dict[Any, Any] | None = None
    replay_scores: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def dense_mask(self) -> Tensor | None:
        """The mask as bool [batch or 1, 1, new, new]; None if each new token may read all tokens before it."""
        return dense_mask(self.mask, self.query.shape[2])

    @property
    def needs_weights(self) -> bool:
        """Whether the caller of the model wants its attention weights, which only eager attention returns."""
        if self.implementation != "eager":
            return False
        # Not all models pass `output_attentions` on to their attention function.
        recorded = output_capturing._active_collector.get()  # pyright: ignore[reportPrivateUsage]
        return bool(self.options.get("output_attentions")) or "attentions" in (recorded or ())

    @property
    def softcap(self) -> float | None:
        """Soft cap c of the logits, which become c tanh(logit / c) before they are masked; None for no soft cap."""
        return None if self.implementation == "sdpa" else self.options.get("softcap")  # torch's function ignores it

    @property
    def sink_logits(self) -> Tensor | None:
        """Logit of the attention sink of each query head, [heads]; None if the attention has no sinks.

        A sink adds one exponential to the denominator of the softmax. It has no key and no value, and its logit is
        not scaled or capped.
        """
        return None if self.implementation == "sdpa" else self.options.get("s_aux")

    @property
    def padding(self) -> Padding | None:
        """Which new tokens are padding; None if there are none."""
        if self.mask is None:
            return None
        if not hasattr(self.mask, "_suffice_padding"):
            dense = dense_mask(self.mask, self.key.shape[2])
            assert dense is not None
            attach_padding(self.mask, dense[:, 0, -1].expand(len(self.key), -1))
        return self.mask._suffice_padding

    def last_keys(self) -> AttentionCall:
        """Return the call with the keys and values of the last new tokens only, one for each query.

        Some models compute a layer for the last tokens only, with the keys of all new tokens.
        """
        new = self.query.shape[2]
        mask = self.mask
        if isinstance(mask, Tensor):
            mask = mask[..., -new:]  # its rows are already those of the last tokens
        elif mask is not None:
            # A block mask cannot be sliced, so it is converted to a dense mask over all new tokens.
            readable = dense_mask(mask, self.key.shape[2])
            assert readable is not None
            mask = additive_mask(readable[..., -new:, -new:], self.query.dtype)
        return replace(self, key=self.key[:, :, -new:], value=self.value[:, :, -new:], mask=mask)


def attach_padding(mask: Any, valid: Tensor | None) -> None:
    """Attach the padding of the new tokens to a mask. All layers get the same mask, so the padding is read only once.

    Args:
        mask: the mask that the model passes to its attention function.
        valid: bool [batch, new], False on padding; None if there is none.

    """
    mask._suffice_padding = None if valid is None else Padding.from_mask(valid)


def run_attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Compute an attention call with the model's own implementation.

    Returns:
        The output [batch, new, heads, value_dim], and the attention weights [batch, heads, new, keys] of eager
        attention; None with another implementation.

    """
    if call.implementation == "eager":
        # Eager attention is not registered by name; the file of each model defines it.
        attention = sys.modules[type(call.module).__module__].eager_attention_forward
        return attention(call.module, call.query, call.key, call.value, call.mask, **call.options)
    attention = ALL_ATTENTION_FUNCTIONS[call.implementation]
    module = call.module if call.implementation == "sdpa" else _ModuleView(call.module, call.implementation)
    return attention(module, call.query, call.key, call.value, call.mask, **call.options)[0], None


class _ModuleView:
    """A view of an attention module whose configuration contains the name of the model's own implementation.

    FlashAttention loads the package with this name. While a cache exists, the configuration itself contains the name of
    Suffice's attention function.
    """

    def __init__(self, module: nn.Module, implementation: str) -> None:
        self._module = module
        config = getattr(module, "config", None)
        self.config = None if config is None else _ConfigView(config, implementation)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _ConfigView:
    def __init__(self, config: Any, implementation: str) -> None:
        self._config, self._attn_implementation = config, implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)
