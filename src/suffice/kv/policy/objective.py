"""The capacity objective of one attention call: weights × directions, factorised by a backend."""

from __future__ import annotations

from torch import Tensor

from suffice.kv.backend.torch_backend import TORCH_BACKEND, TorchBackend, TorchFactor, linear_weights
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.directions import Directions
from suffice.kv.policy.weights.base import Weights


class Objective:
    """The capacity C(S) = ½ log det(I + σ⁻² Σ_{i∈S} wᵢ uᵢ uᵢᵀ) over the entries of one attention call (2604.25975).

    Estimators approximate from it what each entry contributes. Everything is computed at most once for an attention
    call, whichever policies ask for it.

    Args:
        weights: how likely each entry is to be read, w.
        directions: how it moves the output, u.
        stats: of the attention call.
        backend: computes the numbers.

    """

    def __init__(
        self,
        weights: Weights,
        directions: Directions,
        stats: AttentionStats,
        backend: TorchBackend = TORCH_BACKEND,
    ) -> None:
        self.weights, self.directions, self.stats, self.backend = weights, directions, stats, backend

    def log_weights(self) -> Tensor:
        """Return log w, [batch, num_key_value_heads, entries]; −inf where there is no entry."""
        key = ("log weights", self.weights, self.backend.name)
        return self.stats.memoize(key, lambda: self.backend.log_weights(self.weights, self.stats))

    def linear_weights(self) -> Tensor:
        """Return w, scaled so that the largest weight of each head is 1; 0 where there is no entry."""
        return linear_weights(self.log_weights())

    def factor(self, ridge: float, relative: bool) -> TorchFactor:
        """Return the factorised A = σ²I + Σ w u uᵀ of all entries.

        Args:
            ridge: λ with σ² = λ tr(Σ w u uᵀ)/d, or σ² itself if not `relative`.
            relative: see `ridge`.

        """
        key = ("factor", self.weights, self.directions, ridge, relative, self.backend.name)
        return self.stats.memoize(
            key, lambda: self.backend.factorize(self.log_weights(), self.directions, self.stats, ridge, relative)
        )
