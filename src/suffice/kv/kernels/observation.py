"""Log weights of `capkv` and of the default policy in two passes over the keys.

They are sums of window attention, attention of queries spread over the text, expected attention and salience. What the
first pass finds for a head (sums of exponentials, the mean of the unit keys) the second needs before it can look at a
single key again, so K is read twice and no third time. Of the queries' attention no more exists than a block of tokens.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from suffice.gpu import block_size, launch
from suffice.kv.kernels.first_pass import first_pass
from suffice.kv.kernels.grid import rows_of, split_tokens
from suffice.kv.kernels.moments import query_moments
from suffice.kv.kernels.second_pass import second_pass
from suffice.kv.kernels.terms import sum_of_terms

_BLOCK = 64  # keys
_MOST_ROWS = 64  # queries of all heads of a group that four warps hold beside the rest


@dataclass(frozen=True, slots=True)
class Observation:
    """What the log weights are made from.

    Args:
        queries: [batch, heads, m, dim], the newest, after rotary embedding, of the dtype of the keys.
        keys: [batch, kv_heads, tokens, dim], after rotary embedding.
        scaling: factor on the query-key product.
        window: queries of the observation window; at most m.
        recent: queries of which expected attention takes mean and variance; at most m.
        first: int32 [batch], how many of those `recent` it leaves out.
        starts: int32 [batch, kv_heads], first entry that exists; all after it do.
        ends: int32 [batch, kv_heads, window + sampled], one past the last entry that each query of the window, and
            then each sampled one, may read.
        sampled: long [batch, sampled], which of the m queries are those of the sample; None for no such term.
        inner: int32 [batch, kv_heads], first entry that the expected attention of a query head is normalised over:
            each has a Gaussian of its own. None: one Gaussian for all heads of a group.

    """

    queries: Tensor
    keys: Tensor
    scaling: float
    window: int
    recent: int
    first: Tensor
    starts: Tensor
    ends: Tensor
    sampled: Tensor | None = None
    inner: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """How the terms are put together.

    Args:
        pool: odd width of the pooling of the window's attention along the tokens.
        beta: w = exp(−β cos(k, mean of the unit keys)) of the salience.
        window: factor of the window's attention, positive; so the other three.
        expected: of the expected attention.
        salience: of the salience.
        sampled: of the sample's attention.

    """

    pool: int
    beta: float
    window: float
    expected: float
    salience: float
    sampled: float = 1.0


def observed_log_weights(seen: Observation, terms: Terms) -> Tensor:  # [batch, kv_heads, tokens]
    """Log Σ c_j w_j / Σw_j over w = window, expected and sampled attention and salience.

    Returns:
        float32 [batch, kv_heads, tokens], −inf where no entry exists.

    """
    keys = rows_of(seen.keys)
    batch, kv_heads, tokens, dim = keys.shape
    heads, group = batch * kv_heads, seen.queries.shape[1] // kv_heads
    queries = rows_of(seen.queries)
    gaussians = _gaussians(seen, queries)
    newest = queries[:, :, queries.shape[2] - seen.window :].contiguous()
    sampled, count = newest, 0  # a kernel for no sample does not look at it
    if seen.sampled is not None:
        count = seen.sampled.shape[1]
        sampled = queries.gather(2, seen.sampled[:, None, :, None].expand(-1, queries.shape[1], -1, dim))
    whole: dict[str, int] = {
        "DIM": dim,
        "GROUP": group,
        "WINDOW": seen.window,
        "SAMPLED": count,
        "GAUSSIANS": gaussians.shape[2],
        "BLOCK_D": block_size(dim),
        "BLOCK_W": block_size(group * seen.window),
        "BLOCK_S": block_size(group * count) if count else 0,
        # A column of each Gaussian, and one of the length.
        "COLUMNS": block_size(gaussians.shape[2] + 1, minimum=8),
        "BLOCK_N": _BLOCK // 2 if keys.dtype == torch.float32 else _BLOCK,
        "num_warps": 4 if group * max(seen.window, count) <= _MOST_ROWS else 8,  # so that registers suffice
        "num_stages": 3,
    }
    splits, chunk = split_tokens(tokens, heads, whole["BLOCK_N"], 2, keys.device)
    width = whole["BLOCK_D"] + 2 * (whole["BLOCK_W"] + whole["BLOCK_S"] + whole["COLUMNS"])
    sums = torch.empty(heads, splits, width, dtype=torch.float32, device=keys.device)
    totals = torch.empty(heads, splits, 5, dtype=torch.float32, device=keys.device)
    # Window attention, expected attention, cosine, sampled attention.
    scores = torch.empty(3 + (count > 0), batch, kv_heads, tokens, dtype=torch.float32, device=keys.device)
    inner = seen.starts if seen.inner is None else seen.inner
    # What the first pass finds of each key for itself.
    found = torch.empty(gaussians.shape[2] + 1, heads, tokens, dtype=torch.float32, device=keys.device)
    where = (seen.starts, seen.ends, sums)
    sizes = (tokens, chunk, kv_heads, seen.scaling, *keys.stride()[:3], *seen.starts.stride(), *seen.ends.stride())
    launch(
        first_pass,
        (heads, splits),
        keys,
        newest,
        sampled,
        gaussians,
        *where,
        found,
        inner,
        *sizes,
        *inner.stride(),
        **whole,
    )
    parts = triton.next_power_of_2(splits)
    launch(
        second_pass,
        (heads, splits),
        keys,
        newest,
        sampled,
        found,
        *where,
        scores,
        totals,
        *sizes,
        terms.beta,
        POOL=terms.pool,
        BLOCK_P=parts,
        **whole,
    )
    log = torch.empty(batch, kv_heads, tokens, dtype=torch.float32, device=keys.device)
    factors = (terms.window, terms.expected, terms.salience, terms.sampled)
    launch(
        sum_of_terms,
        (heads, triton.cdiv(tokens, 1024)),
        scores,
        totals,
        seen.starts,
        log,
        tokens,
        kv_heads,
        splits,
        *seen.starts.stride(),
        terms.beta,
        *factors,
        SAMPLED=count > 0,
        POOL=terms.pool,
        BLOCK_P=parts,
        BLOCK_N=1024,
        num_warps=4,
    )
    return log


def _gaussians(seen: Observation, queries: Tensor) -> Tensor:
    """Return mean and half variance of each Gaussian, in the units of attention logits: [2, heads, gaussians, dim]."""
    kv_heads = seen.keys.shape[1]
    moments = query_moments(queries, seen.recent, seen.first).unflatten(2, (kv_heads, -1))
    if seen.inner is None:
        moments = moments.mean(3, keepdim=True)
    mean, square = moments
    spread = (square - mean * mean).clamp_min(0) * (0.5 * seen.scaling * seen.scaling)
    return torch.stack((mean * seen.scaling, spread)).flatten(1, 2)
