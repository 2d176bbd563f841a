"""The capacity objective, and estimators, which approximate what each entry contributes to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.arguments import check_flag, check_number
from suffice.kv.backend.torch_backend import TORCH_BACKEND, TorchBackend, TorchFactor, linear_weights
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.directions import Constant, Directions
from suffice.kv.policy.weights.base import Weights


class Objective:
    """The capacity C(S) = ½ log det(I + σ⁻² Σ_{i∈S} wᵢ uᵢ uᵢᵀ) over the entries of one attention call (2604.25975).

    Estimators approximate what each entry contributes to it. Results are memoized for each attention call, so that
    several policies compute them only once.

    Args:
        weights: how likely each entry is to be read, w.
        directions: how an entry changes the output of the attention, u.
        stats: statistics of the attention call.
        backend: computes the log weights and the factorization.

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
        """Return the factorized A = σ²I + Σ w u uᵀ of all entries.

        Args:
            ridge: λ with σ² = λ tr(Σ w u uᵀ)/d, or σ² itself if not `relative`.
            relative: see `ridge`.

        """
        key = ("factor", self.weights, self.directions, ridge, relative, self.backend.name)
        return self.stats.memoize(
            key, lambda: self.backend.factorize(self.log_weights(), self.directions, self.stats, ridge, relative)
        )


class Estimator(ABC):
    """Base class of all estimators. A subclass defines `score`, as a frozen dataclass."""

    @abstractmethod
    def score(self, objective: Objective) -> Tensor:
        """Return scores [batch, num_key_value_heads, entries]; within a head, higher scores are kept first."""

    def contributions(self, objective: Objective) -> Tensor:
        """Return what each entry contributes to the capacity, ≥ 0 and comparable between heads.

        The default is the softmax of the scores, which are assumed to be logarithms.

        Returns:
            [batch, num_key_value_heads, entries].

        """
        # If all entries of a head have weight 0, they contribute equally.
        scores = self.score(objective).clamp_min(torch.finfo(torch.float32).min / 2)
        return objective.stats.mask_invalid(scores).softmax(-1)


@dataclass(frozen=True)
class Trace(Estimator):
    """w‖u‖², the first-order term tr Σ w u uᵀ of the log-determinant. Scores are logarithms.

    Args:
        norm: order of the norm of u; some published policies use 1.
        power: exponent of the norm; some published policies use 1, which is the first-order term for weights w².

    """

    norm: float = 2.0
    power: float = 2.0

    def __post_init__(self) -> None:
        check_number("power", self.power)

    def score(self, objective: Objective) -> Tensor:
        """Return log w + power · log ‖u‖."""
        log_weights = objective.log_weights()
        if isinstance(objective.directions, Constant):
            return log_weights
        return log_weights + self.power * objective.directions.norms(objective.stats, self.norm).log()

    def __str__(self) -> str:
        return "trace"


@dataclass(frozen=True)
class Leverage(Estimator):
    """w (uᵀA⁻¹u)^power with A = σ²I + Σ w u uᵀ; at power 1 the leverage score (2604.25975, Algorithm 1).

    Deleting one entry with leverage score s costs exactly −½ log(1 − s) of the capacity, so at power 1 the scores rank
    entries by that cost. A power of ½ lies between ranking by weights alone and by leverage.

    Args:
        power: exponent of uᵀA⁻¹u.
        ridge: λ with σ² = λ tr(Σ w u uᵀ)/d, or σ² itself if not `relative`.
        relative: False together with ridge 1 is the paper's A = I + Σ w u uᵀ. The weights are then scaled so that the
            largest is 1, because the ranking depends on their scale.

    """

    power: float = 1.0
    ridge: float = 0.1
    relative: bool = True

    def __post_init__(self) -> None:
        check_number("power", self.power)
        check_number("ridge", self.ridge, above=0)
        check_flag("relative", self.relative)

    def score(self, objective: Objective) -> Tensor:
        """Return log w + power · log uᵀA⁻¹u."""
        return objective.factor(self.ridge, self.relative).log_scores(self.power)

    def contributions(self, objective: Objective) -> Tensor:
        """Return the leverage scores, which sum to the effective dimension of a head."""
        return objective.factor(self.ridge, self.relative).leverage_scores()

    def __str__(self) -> str:
        return "leverage" if self.power == 1 else f"leverage^{self.power:g}"


@dataclass(frozen=True)
class OneDirection(Estimator):
    """log w − cos(u, ū), where ū is the mean of the unit vectors u/‖u‖: one direction approximates the Gram matrix."""

    def score(self, objective: Objective) -> Tensor:
        """Return log w − cos(u, ū)."""
        stats = objective.stats
        return objective.log_weights() - stats.cosine_to_mean(objective.directions.vectors(stats))

    def __str__(self) -> str:
        return "one Gram direction"


def score_entries(estimator: Estimator, objective: Objective) -> Tensor:
    """Return `estimator.score(objective)`, computed once for an attention call."""
    key = ("score", objective.weights, objective.directions, estimator, objective.backend.name)
    return objective.stats.memoize(key, lambda: estimator.score(objective))
