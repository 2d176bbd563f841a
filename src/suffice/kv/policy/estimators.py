"""Estimators: how faithfully a token's share of the log-determinant is approximated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from suffice.gpu import kernels_enabled
from suffice.information import CholeskyFactor, factorize
from suffice.kv.policy.attention_stats import Signals
from suffice.kv.policy.directions import Constant, Directions, Value
from suffice.kv.policy.fused import FusedFactor, fused_log_weights
from suffice.kv.policy.weights import Weights


def log_weights(weights: Weights, signals: Signals) -> Tensor:  # [batch, kv_heads, tokens]
    """Return log weights, −inf on padding; computed once for each call."""
    return signals.memo(("log", weights), lambda: _log_weights(weights, signals))


def _log_weights(weights: Weights, signals: Signals) -> Tensor:
    fused = fused_log_weights(weights, signals)
    return signals.masked(weights.log(signals)) if fused is None else fused


def linear_weights(weights: Weights, signals: Signals) -> Tensor:  # [batch, kv_heads, tokens]
    """Return the weights themselves, shifted so that a head's largest is 1; 0 on padding."""
    log = log_weights(weights, signals)
    largest = log.amax(-1, keepdim=True)
    # A row may have no entry yet, its part of the chunk being padding.
    return (log - largest.masked_fill(largest == float("-inf"), 0)).exp()


def capacity_factor(
    weights: Weights, directions: Directions, ridge: float, relative: bool, signals: Signals
) -> CholeskyFactor:
    """Return the factorised objective A = σ²I + Σ w u uᵀ of the whole cache; computed once for each call."""
    name = ("factor", weights, directions, ridge, relative)
    return signals.memo(
        name,
        lambda: factorize(
            directions.vectors(signals), linear_weights(weights, signals), ridge=ridge, relative=relative
        ),
    )


def fused_factor(
    weights: Weights, directions: Directions, ridge: float, relative: bool, signals: Signals
) -> FusedFactor | None:
    """Return the same factorised by kernels; None where they can't be used. Computed once for each call."""
    if not relative or not isinstance(directions, Value):
        return None
    return signals.memo(
        ("fused", weights, ridge, kernels_enabled()),
        lambda: FusedFactor.of(log_weights(weights, signals), ridge, signals),
    )


def inner_products(weights: Weights, directions: Directions, ridge: float, relative: bool, signals: Signals) -> Tensor:
    """Return uᵀA⁻¹u with A of the whole cache, [batch, kv_heads, tokens]; computed once for each call."""

    def compute() -> Tensor:
        fused = fused_factor(weights, directions, ridge, relative, signals)
        if fused is not None:
            return fused.inner_products()
        return capacity_factor(weights, directions, ridge, relative, signals).leverage(directions.vectors(signals))

    return signals.memo(("inner", weights, directions, ridge, relative), compute)


class Estimator(ABC):
    """Base of all estimators; a new one defines `score`."""

    @abstractmethod
    def score(self, weights: Weights, directions: Directions, signals: Signals) -> Tensor:
        """Return scores [batch, kv_heads, tokens]: within a head, the higher the more worth keeping."""

    def shares(self, weights: Weights, directions: Directions, signals: Signals) -> Tensor:
        """Return what each token contributes, comparable between heads, ≥ 0, [batch, kv_heads, tokens].

        Here: its part of the head's sum of scores, taken as logs.
        """
        # A head whose every token has weight 0 shares equally.
        scores = self.score(weights, directions, signals).clamp_min(torch.finfo(torch.float32).min / 2)
        return signals.masked(scores).softmax(-1)


@dataclass(frozen=True)
class Trace(Estimator):
    """w‖u‖²: the first-order term tr Σ w u uᵀ of the log-determinant. Scores are logs.

    Args:
        norm: which norm of u; published heuristics also use 1.
        power: of the norm; published heuristics use 1, which is the first-order term for weights w².

    """

    norm: float = 2.0
    power: float = 2.0

    def score(self, weights: Weights, directions: Directions, signals: Signals) -> Tensor:
        """Return log w + power · log ‖u‖."""
        log = log_weights(weights, signals)
        if isinstance(directions, Constant):
            return log
        return log + self.power * directions.norms(signals, self.norm).log()

    def __str__(self) -> str:
        return "trace"


@dataclass(frozen=True)
class Leverage(Estimator):
    """w (uᵀA⁻¹u)^power with A = σ²I + Σ w u uᵀ: at power 1 the leverage score (2604.25975, Algorithm 1).

    −½ log(1 − s) is the exact loss of capacity if the token alone is deleted, so at power 1 the order is that
    of the exact deletion cost. Power ½ sits between weights alone and leverage.

    Args:
        power: exponent of uᵀA⁻¹u.
        ridge: λ with σ² = λ tr(Σ w u uᵀ)/d, or σ² itself if not `relative`.
        relative: False with ridge 1 is the paper's A = I + Σ w u uᵀ; weights are then shifted by their
            maximum, since the order depends on their scale.

    """

    power: float = 1.0
    ridge: float = 0.1
    relative: bool = True

    def score(self, weights: Weights, directions: Directions, signals: Signals) -> Tensor:
        """Return log w + power · log uᵀA⁻¹u."""
        fused = fused_factor(weights, directions, self.ridge, self.relative, signals)
        if fused is not None:
            return fused.scores(self.power)
        inner = inner_products(weights, directions, self.ridge, self.relative, signals)
        return log_weights(weights, signals) + self.power * inner.log()

    def shares(self, weights: Weights, directions: Directions, signals: Signals) -> Tensor:
        """Return the leverage scores themselves, which sum to a head's effective dimension."""
        inner = inner_products(weights, directions, self.ridge, self.relative, signals)
        return inner * linear_weights(weights, signals)

    def __str__(self) -> str:
        return "leverage" if self.power == 1 else f"leverage^{self.power:g}"


@dataclass(frozen=True)
class OneDirection(Estimator):
    """−cos(u, ū), ū the mean of the unit directions: the Gram matrix is approximated by one direction."""

    def score(self, weights: Weights, directions: Directions, signals: Signals) -> Tensor:
        """Return log w − cos(u, ū)."""
        return log_weights(weights, signals) - signals.cosine_to_mean(directions.vectors(signals))

    def __str__(self) -> str:
        return "one Gram direction"
