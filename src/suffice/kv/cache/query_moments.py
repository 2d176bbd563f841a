"""Second moments of the queries of a layer, with which keys are scaled and rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.information.linalg import matmul

MIN_QUERIES = 32
"""Smallest number of queries of a forward pass, or of remembered ones, from which later queries are estimated."""
# Number of last queries, and their additional weight in the second moment of the queries. With more weight, questions
# at the end of a prompt are answered more accurately, but questions after the prompt less accurately.
_NUM_LAST_QUERIES, _LAST_WEIGHT = 32, 0.1
# Of a long text, parts of 64 tokens at equal distances are enough. Parts, because the queries of single tokens at equal
# distances could have the same rotary angles.
_MAX_TOKENS, _PART = 1024, 64


def second_moments(queries: Tensor, is_token: Tensor, num_heads: int) -> Tensor:
    """Return the second moment E[q qᵀ] of the queries of each KV head, float32 [batch, num_heads, head_dim, head_dim].

    The last queries, which resemble the next ones most, have additional weight. The fewer queries there are, the more
    is added to the diagonal. Of long texts, a sample is used.

    Args:
        queries: [batch, heads, queries, head_dim]; zeros where there is no token.
        is_token: bool [batch, queries].
        num_heads: number of KV heads.

    """
    last = slice(-_NUM_LAST_QUERIES, None)
    of_last = _second_moment(queries[:, :, last], is_token[:, last], num_heads)
    queries, is_token = _sample(queries, is_token)
    moments = torch.lerp(_second_moment(queries, is_token, num_heads), of_last, _LAST_WEIGHT)
    # Few queries say little about later ones.
    diagonal, num_queries = moments.diagonal(dim1=-2, dim2=-1), _num_queries(queries, is_token, num_heads)
    diagonal += diagonal.mean(-1, keepdim=True) * (diagonal.shape[-1] / num_queries.clamp_min(1))
    return moments


def _sample(queries: Tensor, is_token: Tensor) -> tuple[Tensor, Tensor]:
    """Return the queries of about `_MAX_TOKENS` slots, in parts that are spread over the text, and which are tokens."""
    every = queries.shape[2] // _MAX_TOKENS
    if every < 2:
        return queries, is_token
    num_parts = queries.shape[2] // (every * _PART)
    # Counted from the end, so that short rows of a batch, which are padded on the left, have a part.
    first = queries.shape[2] - num_parts * every * _PART
    queries, is_token = queries[:, :, first:], is_token[:, first:]
    queries = queries.unflatten(2, (num_parts, every, _PART))[:, :, :, -1].flatten(2, 3)
    return queries, is_token.unflatten(1, (num_parts, every, _PART))[:, :, -1].flatten(1, 2)


def _second_moment(queries: Tensor, is_token: Tensor, num_heads: int) -> Tensor:
    """Return the mean of q qᵀ, float32 [batch, num_heads, head_dim, head_dim]."""
    groups = queries.unflatten(1, (num_heads, -1)).unbind(1)
    products = [matmul(own.mT, own) for own in (group.flatten(1, 2).float() for group in groups)]
    num_queries = _num_queries(queries, is_token, num_heads).clamp_min(groups[0].shape[1])
    return torch.stack(products, dim=1) / num_queries[..., None]


def _num_queries(queries: Tensor, is_token: Tensor, num_heads: int) -> Tensor:
    """Return the number of queries of each KV head, long [batch, 1, 1]."""
    return is_token.sum(1)[:, None, None] * (queries.shape[1] // num_heads)
