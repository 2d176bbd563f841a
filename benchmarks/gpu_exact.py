"""Log weights of two policies step by step, in the precision of what they are given: the truth for the kernels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def exact_log_weights(queries: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """Log weights of the policy `capkv`, of rows with at least 516 tokens, [batch, kv_heads, tokens]."""
    heads, tokens, dim = keys.shape[1:]
    queries = queries.unflatten(1, (heads, -1))
    window = F.avg_pool1d(_window(queries, keys, valid, 16), 5, stride=1, padding=2)
    recent = queries[..., -min(512, tokens) :, :].flatten(2, 3)
    spread = recent.var(2, correction=0)
    expected = keys @ recent.mean(2)[..., None] / dim**0.5 + keys.square() @ spread[..., None] / (2 * dim)
    return _sum((window.log(), expected.squeeze(-1), -4 * _cosine(keys, valid)), (1, 1, 2), valid)


def exact_spread_log_weights(queries: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """Log weights of the policies `capkv-spread` and `capkv-profile`, as above."""
    heads, tokens, dim = keys.shape[1:]
    queries = queries.unflatten(1, (heads, -1))
    recent = queries[..., -min(512, tokens) :, :]
    logits = keys @ recent.mean(3).mT / dim**0.5 + keys.square() @ recent.var(3, correction=0).mT / (2 * dim)
    first = tokens - valid.sum(-1)
    inner = valid & (torch.arange(tokens, device=keys.device) >= first[:, None] + 4)
    normal = logits.masked_fill(~inner[:, None, :, None], float("-inf")).logsumexp(2, keepdim=True)
    expected = (logits - normal).logsumexp(-1)
    sampled = torch.zeros_like(expected)
    for row in range(len(keys)):
        own = tokens - int(first[row])
        for number in range(1, 17):
            place = int(first[row]) + (number * own + 15) // 16 - 1
            begin, end = int(first[row]), place - 31
            if end > begin:
                weights = (queries[row, :, :, place] @ keys[row, :, begin:end].mT / dim**0.5).softmax(-1)
                sampled[row, :, begin:end] += weights.mean(1)
    terms = (_window(queries, keys, valid, 8).log(), expected, -4 * _cosine(keys, valid), sampled.log())
    return _sum(terms, (3, 1, 1, 1), valid)


def _window(queries: Tensor, keys: Tensor, valid: Tensor, width: int) -> Tensor:
    number = torch.arange(keys.shape[2], device=keys.device)
    hidden = (number > number[-width:, None]) | ~valid[:, None, None, None]
    logits = queries[..., -width:, :] @ keys[:, :, None].mT / keys.shape[3] ** 0.5
    return logits.masked_fill(hidden, float("-inf")).softmax(-1).mean((2, 3))


def _cosine(keys: Tensor, valid: Tensor) -> Tensor:
    unit = F.normalize(keys, dim=-1) * valid[:, None, :, None]
    return (unit @ F.normalize(unit.sum(2), dim=-1)[..., None]).squeeze(-1)


def _sum(terms: tuple[Tensor, ...], factors: tuple[float, ...], valid: Tensor) -> Tensor:
    logs = [x.masked_fill(~valid[:, None], float("-inf")) for x in terms]
    shares = [x - x.logsumexp(-1, keepdim=True) + math.log(c) for x, c in zip(logs, factors, strict=True)]
    return torch.stack(shares).logsumexp(0)
