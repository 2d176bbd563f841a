"""Log weights of `capkv`, `capkv-spread` and `capkv-profile` in two passes over the keys.

The weight of a key is a sum of terms: attention from the newest queries (the observation window), expected attention,
salience, and optionally attention from queries sampled over the whole text. The first pass computes sums over all keys
of a head: sums of exponentials, and the sum of the unit keys. The second pass uses them to compute the terms of each
key. Only one block of the attention matrix exists at any time.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from suffice.gpu import block_size, launch
from suffice.kv.kernels.grid import contiguous_rows, split_tokens
from suffice.kv.kernels.key_scores import key_scores_kernel
from suffice.kv.kernels.key_sums import key_sums_kernel
from suffice.kv.kernels.log_weights import log_weights_kernel
from suffice.kv.kernels.moments import query_moments

_BLOCK = 64
"""Number of keys that a program processes at a time."""

_MAX_QUERIES_FOUR_WARPS = 64
"""Maximum number of queries of a KV head for which four warps have enough registers."""


@dataclass(frozen=True, slots=True)
class MixtureInputs:
    """Tensors of one attention call, and the parts of them that each term uses.

    Args:
        queries: the newest m queries after rotary embedding, [batch, heads, m, dim], in the dtype of the keys.
        keys: keys after rotary embedding, [batch, kv_heads, tokens, dim].
        scaling: factor of the query-key product.
        window_size: number of newest queries in the observation window, at most m.
        num_recent: number of newest queries whose mean and variance define expected attention, at most m.
        num_skipped: number of the oldest of the `num_recent` queries that are skipped, int32 [batch].
        starts: index of the first entry that exists, int32 [batch, kv_heads]. All later entries exist.
        ends: end of the entries that each query of the window, and then each sampled query, may read, int32
            [batch, kv_heads, window_size + sampled].
        sampled_indices: indices of the sampled queries among the m queries, long [batch, sampled]; None for no sample.
        expected_starts: index of the first entry over which expected attention is normalized, int32 [batch, kv_heads],
            if each query head has its own Gaussian. None if the heads of a group share one Gaussian, which is
            normalized from `starts`.

    """

    queries: Tensor
    keys: Tensor
    scaling: float
    window_size: int
    num_recent: int
    num_skipped: Tensor
    starts: Tensor
    ends: Tensor
    sampled_indices: Tensor | None = None
    expected_starts: Tensor | None = None


@dataclass(frozen=True, slots=True)
class MixtureTerms:
    """Parameters and factors of the four terms.

    Args:
        kernel_size: width of the average pooling of window attention along the tokens, odd.
        beta: β of the salience exp(−β cos(k, mean of the unit keys)).
        window_factor: factor of window attention, above 0, like the other factors.
        expected_factor: factor of expected attention.
        salience_factor: factor of the salience.
        sampled_factor: factor of sampled attention.

    """

    kernel_size: int
    beta: float
    window_factor: float
    expected_factor: float
    salience_factor: float
    sampled_factor: float = 1.0


def mixture_log_weights(inputs: MixtureInputs, terms: MixtureTerms) -> Tensor:
    """Return log Σ_j (c_j t_j / T_j) of the terms t_j of each key, with their sums T_j over the head and factors c_j.

    Returns:
        float32 [batch, kv_heads, tokens], −inf where no entry exists.

    """
    keys = contiguous_rows(inputs.keys)
    batch, kv_heads, tokens, dim = keys.shape
    heads, group = batch * kv_heads, inputs.queries.shape[1] // kv_heads
    queries = contiguous_rows(inputs.queries)
    gaussians = _gaussians(inputs, queries)
    num_gaussians = gaussians.shape[2]
    window_queries = queries[:, :, queries.shape[2] - inputs.window_size :].contiguous()
    num_sampled = 0
    sampled_queries = window_queries  # not read if there is no sample
    if inputs.sampled_indices is not None:
        num_sampled = inputs.sampled_indices.shape[1]
        sampled_queries = queries.gather(
            2, inputs.sampled_indices[:, None, :, None].expand(-1, queries.shape[1], -1, dim)
        )
    options: dict[str, int] = {
        "DIM": dim,
        "GROUP": group,
        "WINDOW": inputs.window_size,
        "SAMPLED": num_sampled,
        "GAUSSIANS": num_gaussians,
        "BLOCK_D": block_size(dim),
        "BLOCK_W": block_size(group * inputs.window_size),
        "BLOCK_S": block_size(group * num_sampled) if num_sampled else 0,
        "COLUMNS": block_size(num_gaussians + 1, minimum=8),  # one per Gaussian, one for the squared norm
        "BLOCK_N": _BLOCK // 2 if keys.dtype == torch.float32 else _BLOCK,
        "num_warps": 4 if group * max(inputs.window_size, num_sampled) <= _MAX_QUERIES_FOUR_WARPS else 8,
        "num_stages": 3,
    }
    splits, split_size = split_tokens(tokens, heads, options["BLOCK_N"], 2, keys.device)
    width = options["BLOCK_D"] + 2 * (options["BLOCK_W"] + options["BLOCK_S"] + options["COLUMNS"])
    sums = torch.empty(heads, splits, width, dtype=torch.float32, device=keys.device)
    features = torch.empty(num_gaussians + 1, heads, tokens, dtype=torch.float32, device=keys.device)
    totals = torch.empty(heads, splits, 5, dtype=torch.float32, device=keys.device)
    num_terms = 3 + (num_sampled > 0)
    scores = torch.empty(num_terms, batch, kv_heads, tokens, dtype=torch.float32, device=keys.device)
    expected_starts = inputs.starts if inputs.expected_starts is None else inputs.expected_starts
    sizes = (tokens, split_size, kv_heads, inputs.scaling)
    strides = (*keys.stride()[:3], *inputs.starts.stride(), *inputs.ends.stride())
    launch(
        key_sums_kernel,
        (heads, splits),
        keys,
        window_queries,
        sampled_queries,
        gaussians,
        inputs.starts,
        inputs.ends,
        sums,
        features,
        expected_starts,
        *sizes,
        *strides,
        *expected_starts.stride(),
        **options,
    )
    block_splits = triton.next_power_of_2(splits)
    launch(
        key_scores_kernel,
        (heads, splits),
        keys,
        window_queries,
        sampled_queries,
        features,
        inputs.starts,
        inputs.ends,
        sums,
        scores,
        totals,
        *sizes,
        *strides,
        terms.beta,
        KERNEL_SIZE=terms.kernel_size,
        BLOCK_SPLITS=block_splits,
        **options,
    )
    log_weights = torch.empty(batch, kv_heads, tokens, dtype=torch.float32, device=keys.device)
    launch(
        log_weights_kernel,
        (heads, triton.cdiv(tokens, 1024)),
        scores,
        totals,
        inputs.starts,
        log_weights,
        tokens,
        kv_heads,
        splits,
        *inputs.starts.stride(),
        terms.beta,
        terms.window_factor,
        terms.expected_factor,
        terms.salience_factor,
        terms.sampled_factor,
        SAMPLED=num_sampled > 0,
        KERNEL_SIZE=terms.kernel_size,
        BLOCK_SPLITS=block_splits,
        BLOCK_N=1024,
        num_warps=4,
    )
    return log_weights


def _gaussians(inputs: MixtureInputs, queries: Tensor) -> Tensor:
    """Return the mean and half the variance of scaling · q of each Gaussian, [2, heads, gaussians, dim].

    For a query ~ N(μ, Σ) with diagonal Σ, log E exp(scaling · qᵀk) = scaling · μᵀk + scaling²/2 · kᵀΣk.
    """
    kv_heads = inputs.keys.shape[1]
    moments = query_moments(queries, inputs.num_recent, inputs.num_skipped).unflatten(2, (kv_heads, -1))
    if inputs.expected_starts is None:
        moments = moments.mean(3, keepdim=True)
    mean, square = moments
    half_variance = (square - mean * mean).clamp_min(0) * (0.5 * inputs.scaling * inputs.scaling)
    return torch.stack((mean * inputs.scaling, half_variance)).flatten(1, 2)
