"""Attention weights over stored entries, for callers of a model that ask for them."""

from __future__ import annotations

from torch import Tensor

from suffice.kv.attention.call import AttentionCall
from suffice.kv.attention.masks import readable_entries
from suffice.kv.attention.softmax import attention_weights
from suffice.kv.storage.base import Entries


def weights_over_entries(call: AttentionCall, entries: Entries, scaling: float) -> Tensor:
    """Return the weights of new tokens over all entries, [batch, heads, new, width]; 0 in empty slots.

    Args:
        call: the attention call of the new tokens.
        entries: all entries, of which those of the new tokens are the last ones.
        scaling: factor on the query-key product.

    """
    new, heads = call.query.shape[2], entries.keys.shape[1]
    readable = readable_entries(entries.positions, call.dense_mask, new)
    weights = attention_weights(
        call.query.unflatten(1, (heads, -1)),
        entries.keys[:, :, None],
        readable[:, :, None],
        bias=None if entries.logit_bias is None else entries.logit_bias[:, :, None, None],
        scaling=scaling,
        softcap=call.softcap,
        sink_logits=None if call.sink_logits is None else call.sink_logits.view(heads, -1, 1, 1),
    )
    return weights.flatten(1, 2).to(call.query.dtype)
