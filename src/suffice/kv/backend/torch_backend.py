"""The backend that computes everything in plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from suffice.information import CholeskyFactor, factorize, gram_matrix, psd_cholesky
from suffice.information.capacity import MIN_FLOAT32_RIDGE
from suffice.kv.attention.quantized_attention import ExactEntries, QuantizedHeads, attend_quantized
from suffice.kv.attention.ragged_attention import RaggedEntries, attend_by_head
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.directions import Directions
from suffice.kv.policy.weights.base import Weights
from suffice.kv.storage.error_feedback import ErrorFeedback
from suffice.kv.storage.vector_format import QuantizedVectors, VectorFormat


class TorchFactor:
    """The factorized matrix A = σ²I + Σ w u uᵀ of the entries of each head, and quantities that are computed from it.

    Args:
        log_weights: log w, [batch, num_key_value_heads, entries].
        directions: u.
        stats: statistics of the attention call.
        ridge: λ, see `suffice.kv.policy.estimators.Leverage`.
        relative: whether σ² = λ tr(Σ w u uᵀ)/d instead of λ.

    """

    def __init__(
        self, log_weights: Tensor, directions: Directions, stats: AttentionStats, ridge: float, relative: bool
    ) -> None:
        self._log_weights, self._ridge = log_weights, ridge
        self._weights = linear_weights(log_weights)
        self._vectors = directions.vectors(stats)
        self._factor: CholeskyFactor = factorize(self._vectors, self._weights, ridge=ridge, relative=relative)
        self._inner_products: Tensor | None = None

    def inner_products(self) -> Tensor:
        """Return uᵀA⁻¹u, [batch, num_key_value_heads, entries]."""
        if self._inner_products is None:
            self._inner_products = self._factor.leverage(self._vectors)
        return self._inner_products

    def leverage_scores(self) -> Tensor:
        """Return w uᵀA⁻¹u, [batch, num_key_value_heads, entries]; their sum is the effective dimension of the head."""
        return self.inner_products() * self._weights

    def log_scores(self, power: float) -> Tensor:
        """Return log w (uᵀA⁻¹u)^power, [batch, num_key_value_heads, entries]."""
        return self._log_weights + power * self.inner_products().log()

    def capacity_share(self, kept: Tensor) -> Tensor:
        """Return the share C(kept) / C(all) of the capacity that the kept entries carry.

        Args:
            kept: indices of the kept entries, long [batch, num_key_value_heads, width], −1 in empty slots.

        Returns:
            [batch, num_key_value_heads].

        """
        factor = self._factor
        index = kept.clamp_min(0)
        weights = self._weights.gather(2, index).masked_fill(kept < 0, 0)
        if self._ridge < MIN_FLOAT32_RIDGE:
            weights = weights.double()
        vectors = self._vectors.gather(2, index[..., None].expand(-1, -1, -1, self._vectors.shape[-1]))
        # The factor and its noise variance are in scaled units.
        vectors = vectors / factor.vector_scale[..., None, None]
        ratio = gram_matrix(vectors, weights / factor.weight_scale[..., None]) / factor.noise[..., None, None]
        identity = torch.eye(ratio.shape[-1], dtype=ratio.dtype, device=ratio.device)
        kept_capacity = psd_cholesky(identity + ratio).diagonal(dim1=-2, dim2=-1).log().sum(-1).to(factor.dtype)
        # If the capacity of a head is 0, none is lost.
        return torch.where(factor.capacity > 0, kept_capacity / factor.capacity, torch.ones_like(kept_capacity))


class TorchBackend:
    """Log weights, factorization and ragged attention in plain torch."""

    name = "torch"

    def log_weights(self, weights: Weights, stats: AttentionStats) -> Tensor:
        """Return log w, [batch, num_key_value_heads, entries]; −inf where there is no entry."""
        return stats.mask_invalid(weights.log_weights(stats))

    def factorize(
        self, log_weights: Tensor, directions: Directions, stats: AttentionStats, ridge: float, relative: bool
    ) -> TorchFactor:
        """Return the factorized matrix A = σ²I + Σ w u uᵀ; see `TorchFactor` for the arguments."""
        return TorchFactor(log_weights, directions, stats, ridge, relative)

    def ragged_attention(
        self,
        query: Tensor,
        entries: RaggedEntries,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Return the attention of new tokens over heads of unequal length; see `attend_by_head` for the arguments."""
        return attend_by_head(query, entries, mask, scaling, softcap, sink_logits)

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
        """Return the attention over quantized and exact entries; see `attend_quantized` for the arguments."""
        return attend_quantized(query, quantized, exact, mask, scaling, softcap, sink_logits)

    def quantize(
        self, vectors: Tensor, format_: VectorFormat, feedback: ErrorFeedback | None = None
    ) -> tuple[QuantizedVectors, Tensor]:
        """Return quantized vectors and their squared errors; see `VectorFormat.quantize`."""
        return format_.quantize(vectors, feedback)


TORCH_BACKEND = TorchBackend()


def linear_weights(log_weights: Tensor) -> Tensor:
    """Return the weights, scaled so that the largest weight of each head is 1; 0 where the log weight is −inf."""
    largest = log_weights.amax(-1, keepdim=True)
    # A row may have no entries yet, if all its tokens are padding.
    return (log_weights - largest.masked_fill(largest == -torch.inf, 0)).exp()
