"""The backend that uses Triton kernels where they exist, and plain torch elsewhere."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from suffice.gpu import KernelFallbackError, can_use_kernels
from suffice.kv.attention.quantized_attention import ExactEntries, QuantizedHeads
from suffice.kv.attention.ragged_attention import RaggedEntries
from suffice.kv.backend.torch_backend import TORCH_BACKEND, TorchBackend, TorchFactor, linear_weights
from suffice.kv.kernels import supports
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.directions import Directions, Value
from suffice.kv.policy.sampled_attention import sampled_query_indices
from suffice.kv.policy.weights import ExpectedAttention, KeySalience, Product, SampledAttention, Sum, WindowAttention
from suffice.kv.policy.weights.base import Weights
from suffice.kv.storage.error_feedback import ErrorFeedback
from suffice.kv.storage.vector_format import QuantizedVectors, VectorFormat

_MAX_ROWS = 128  # largest number of window or sampled queries × num_key_value_groups that one program can hold
_MIN_RIDGE = 1e-3
_MAX_QUANTIZED_DIM = 256


def choose_backend(*tensors: Tensor) -> TorchBackend:
    """Return the Triton backend if kernels can run on these tensors, the torch backend otherwise."""
    return TRITON_BACKEND if can_use_kernels(*tensors) else TORCH_BACKEND


class TritonBackend(TorchBackend):
    """Log weights, factorization and decoding by Triton kernels.

    An operation that has no kernel, or whose kernel does not fit the device, is computed in plain torch. A check
    detects inputs for which float32 is not precise enough: the deferred checks of the statistics then raise
    `KernelFallbackError`, and the caller computes the layer again with the torch backend.
    """

    name = "triton"

    def log_weights(self, weights: Weights, stats: AttentionStats) -> Tensor:
        """Return log w, [batch, num_key_value_heads, entries]; −inf where there is no entry."""
        if isinstance(weights, Product):
            return torch.stack([self.log_weights(factor, stats) for factor in weights.factors]).sum(0)
        with contextlib.suppress(KernelFallbackError):
            log_weights = fused_log_weights(weights, stats)
            if log_weights is not None:
                return log_weights
        return super().log_weights(weights, stats)

    def factorize(
        self, log_weights: Tensor, directions: Directions, stats: AttentionStats, ridge: float, relative: bool
    ) -> TorchFactor:
        """Return the factorized matrix A = σ²I + Σ w u uᵀ; see `TorchFactor` for the arguments."""
        if relative and isinstance(directions, Value) and ridge >= _MIN_RIDGE and supports(stats.values):
            # If checks are not deferred, the error is raised here.
            with contextlib.suppress(KernelFallbackError):
                return TritonFactor(log_weights, directions, stats, ridge)
        return super().factorize(log_weights, directions, stats, ridge, relative)

    def ragged_attention(
        self,
        query: Tensor,
        entries: RaggedEntries,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Return the attention of new tokens over heads of unequal length; see `TorchBackend.ragged_attention`."""
        if query.shape[2] == 1 and supports(query, *entries.buffers):
            # A single new token may read all valid entries, so that its mask is not needed.
            with contextlib.suppress(KernelFallbackError):
                return _decode(query, entries, scaling, softcap, sink_logits)
        return super().ragged_attention(query, entries, mask, scaling, softcap, sink_logits)

    def quantized_attention(
        self,
        query: Tensor,
        quantized: QuantizedHeads,
        exact: ExactEntries,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Return the attention over quantized and exact entries; see `TorchBackend.quantized_attention`."""
        if query.shape[2] == 1 and supports(query, exact.keys, exact.values, max_dim=_MAX_QUANTIZED_DIM):
            # A single new token may read all entries, so that its mask is not needed.
            from suffice.kv.kernels.quantized_decoding import decode_quantized

            with contextlib.suppress(KernelFallbackError):
                output = decode_quantized(
                    query[:, :, 0], quantized, exact, scaling=scaling, softcap=softcap, sink_logits=sink_logits
                )
                return output[:, None]
        return super().quantized_attention(query, quantized, exact, mask, scaling, softcap, sink_logits)

    def quantize(
        self, vectors: Tensor, format_: VectorFormat, feedback: ErrorFeedback | None = None
    ) -> tuple[QuantizedVectors, Tensor]:
        """Return quantized vectors and their squared errors; see `VectorFormat.quantize`."""
        fits = len(vectors) > 0 and format_.padded_dim <= _MAX_QUANTIZED_DIM
        if fits and feedback is not None:
            feedback = _KernelFeedback(feedback.factors, feedback.counts)
        elif fits:
            from suffice.kv.kernels.packing import quantize_rotated

            vectors = vectors.float()
            with contextlib.suppress(KernelFallbackError):
                codes, scales, errors = quantize_rotated(
                    vectors @ format_.rotation(vectors),
                    bits=format_.bits,
                    group_size=format_.group_size,
                    num_scales=format_.num_scales,
                )
                return QuantizedVectors(codes, scales), errors
        return super().quantize(vectors, format_, feedback)


class _KernelFeedback(ErrorFeedback):
    """Feedback that rounds with a kernel."""

    def round(self, vectors: Tensor, scales: Tensor, largest: int) -> tuple[Tensor, Tensor]:
        """Round rotated vectors; see `ErrorFeedback.round`."""
        from suffice.kv.kernels.error_feedback import round_with_feedback

        with contextlib.suppress(KernelFallbackError):
            return round_with_feedback(vectors, scales, self.factors, self.counts, largest)
        return super().round(vectors, scales, largest)


TRITON_BACKEND = TritonBackend()


def _decode(
    query: Tensor, entries: RaggedEntries, scaling: float, softcap: float | None, sink_logits: Tensor | None
) -> Tensor:
    """Compute the attention of one new token with a single kernel for all heads, which splits their keys."""
    from suffice.kv.kernels.decode_plan import DecodePlan
    from suffice.kv.kernels.decoding import decode

    tail = entries.tail_positions.shape[1]
    if entries.decode_plan is None:
        packed = [(start, count - tail) for start, count in entries.spans]
        entries.decode_plan = DecodePlan.from_heads(packed, tail, query.device, entries.logit_bias)
    keys, values = entries.buffers
    output = decode(
        query[:, :, 0],
        keys,
        values,
        entries.tail_positions,
        entries.decode_plan,
        scaling=scaling,
        softcap=softcap,
        sink_logits=sink_logits,
    )
    return output[:, None]


def _fall_back_to_torch(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorate a method of `TritonFactor`: if its kernel does not fit the device, compute the result in plain torch."""

    @functools.wraps(method)
    def attempt(self: TritonFactor, *arguments: Any) -> Tensor:
        try:
            return method(self, *arguments)
        except KernelFallbackError:
            return getattr(self.torch_factor(), method.__name__)(*arguments)

    return attempt


class TritonFactor(TorchFactor):
    """A = σ²I + Σ w v vᵀ of the entries of each head, factorized by kernels, with σ² relative to the trace.

    Args:
        log_weights: log w, [batch, num_key_value_heads, entries].
        directions: the values v.
        stats: statistics of the attention call.
        ridge: λ with σ² = λ tr(Σ w v vᵀ)/d.

    Raises:
        KernelFallbackError: the kernels do not fit the device, or float32 with a single scale is not precise enough.
            If checks are deferred, the second error is raised by `stats.raise_if_failed`.

    """

    def __init__(self, log_weights: Tensor, directions: Directions, stats: AttentionStats, ridge: float) -> None:
        from suffice.kv.kernels.leverage import factorize

        self._log_weights, self._directions, self._stats, self._ridge = log_weights, directions, stats, ridge
        self._kernel_factor = factorize(stats.values, log_weights, ridge)
        self._stats.require(~self._kernel_factor.failed.any(), KernelFallbackError())
        self._inner_products: Tensor | None = None

    def torch_factor(self) -> TorchFactor:
        """Return the same factor in plain torch."""
        return TorchFactor(self._log_weights, self._directions, self._stats, self._ridge, relative=True)

    @_fall_back_to_torch
    def inner_products(self) -> Tensor:
        """Return vᵀA⁻¹v, [batch, num_key_value_heads, entries]."""
        from suffice.kv.kernels.leverage import quadratic_forms

        if self._inner_products is None:
            self._inner_products = quadratic_forms(self._stats.values, self._log_weights, self._kernel_factor)
        return self._inner_products

    def leverage_scores(self) -> Tensor:
        """Return w vᵀA⁻¹v, [batch, num_key_value_heads, entries]."""
        return self.inner_products() * linear_weights(self._log_weights)

    @_fall_back_to_torch
    def log_scores(self, power: float) -> Tensor:
        """Return log w (vᵀA⁻¹v)^power, [batch, num_key_value_heads, entries]."""
        if self._inner_products is not None:  # the values need not be read again
            return self._log_weights + power * self._inner_products.log()
        from suffice.kv.kernels.leverage import quadratic_forms

        return quadratic_forms(self._stats.values, self._log_weights, self._kernel_factor, power)

    @_fall_back_to_torch
    def capacity_share(self, kept: Tensor) -> Tensor:
        """Return the share of the capacity that the kept entries carry; see `TorchFactor.capacity_share`."""
        from suffice.kv.kernels.leverage import factorize_subset

        subset = factorize_subset(self._stats.values, self._log_weights, kept, self._kernel_factor)
        self._stats.require(~subset.failed.any(), KernelFallbackError())
        return subset.capacity / self._kernel_factor.capacity


def fused_log_weights(weights: Weights, stats: AttentionStats) -> Tensor | None:
    """Compute with kernels the log weights of window attention + expected attention + salience (+ sampled attention).

    Returns:
        [batch, num_key_value_heads, entries], −inf where there is no entry. None for other weights, if the model
        returned its attention weights or has a soft cap or attention sinks, and for tensors that the kernels do not
        support.

    """
    if not isinstance(weights, Sum) or stats.attention is not None or not supports(stats.queries, stats.keys):
        return None
    if stats.softcap is not None or stats.sink_logits is not None or stats.logit_bias is not None:
        return None
    factors = {type(term): factor for factor, term in weights.terms}
    terms = {type(term): term for term in weights.parts}
    kinds = (WindowAttention, ExpectedAttention, KeySalience, SampledAttention)
    window, expected, salience, sampled = (terms.get(kind) for kind in kinds)
    if (
        len(weights.terms) != len(terms)
        or len(terms) != 3 + (sampled is not None)
        or not isinstance(window, WindowAttention)
        or not isinstance(expected, ExpectedAttention)
        or not isinstance(salience, KeySalience)
        or not (sampled is None or isinstance(sampled, SampledAttention))
        or (window.prefix_only or window.floor != 0)
        or not expected.diagonal
        or expected.half_life is not None
    ):
        return None
    count = stats.num_queries
    width = min(window.window_size, count)
    if max(width, sampled.count if sampled else 0) * stats.num_key_value_groups > _MAX_ROWS:
        return None
    from suffice.kv.kernels.mixture import MixtureInputs, MixtureTerms, mixture_log_weights

    recent = min(expected.recent or count, count)
    starts, ends = stats.readable_ranges(width)
    indices = None
    if sampled is not None:
        indices = sampled_query_indices(stats, sampled.count)
        ends = torch.cat((ends, _sampled_ends(stats, indices, sampled.min_distance, starts)), dim=-1)
    shared_gaussian = expected.pooled or stats.num_key_value_groups == 1
    inputs = MixtureInputs(
        queries=stats.queries,
        keys=stats.keys,
        scaling=stats.scaling,
        window_size=width,
        num_recent=recent,
        num_skipped=_num_skipped_queries(stats, recent, expected.skip),
        starts=starts,
        ends=ends,
        sampled_indices=indices,
        expected_starts=None if shared_gaussian else _first_normalized_entry(stats, expected.skip, starts),
    )
    mixture = MixtureTerms(
        kernel_size=window.kernel_size,
        beta=salience.beta,
        window_factor=factors[WindowAttention],
        expected_factor=factors[ExpectedAttention],
        salience_factor=factors[KeySalience],
        sampled_factor=factors.get(SampledAttention, 1.0),
    )
    return mixture_log_weights(inputs, mixture)


def _num_skipped_queries(stats: AttentionStats, recent: int, skip: int) -> Tensor:
    """Return how many of the newest `recent` queries are padding or first tokens of the text, int32 [batch]."""
    if stats.is_complete:
        skipped = max(0, skip - (stats.num_entries - recent))
        # A row that has only first tokens uses them.
        skipped = skipped if skipped < recent else 0
        return torch.full((1,), skipped, dtype=torch.int32, device=stats.device).expand(stats.batch_size)
    positions = stats.query_positions[:, -recent:]
    used = (positions >= skip).sum(-1)
    used = torch.where(used > 0, used, (positions >= 0).sum(-1))
    return (recent - used).int()


def _sampled_ends(stats: AttentionStats, indices: Tensor, min_distance: int, starts: Tensor) -> Tensor:
    """Return the index after the last entry that each sampled query reads, [batch, num_key_value_heads, sampled]."""
    if stats.is_complete:
        ends = indices + (stats.num_entries - stats.num_queries - min_distance + 1)
        return ends.clamp_min(0).int()[:, None].expand(-1, stats.num_key_value_heads, -1)
    latest = stats.query_positions.gather(1, indices)[:, None, :, None] - min_distance
    positions = stats.positions[:, :, None]
    before = ((positions <= latest) & (positions >= 0)).sum(-1, dtype=torch.int32)
    return starts[..., None] + before


def _first_normalized_entry(stats: AttentionStats, skip: int, starts: Tensor) -> Tensor:
    """Return the index of the first entry after the first `skip` tokens of the text, [batch, num_key_value_heads].

    If there are no entries after them, it is the index of the first valid entry.
    """
    positions = stats.positions
    first_tokens = ((positions < skip) & (positions >= 0)).sum(-1, dtype=torch.int32)
    return starts + torch.where(stats.counts > skip, first_tokens, 0)
