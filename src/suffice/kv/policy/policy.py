"""A policy: weights × directions × estimator say what a token is worth, a selection which tokens stay."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from suffice.gpu import KernelFallbackError, async_tensor, disable_kernels
from suffice.kv.budget.allocation import Allocation, Equal, Request
from suffice.kv.budget.protection import Protection
from suffice.kv.policy.attention_stats import Signals
from suffice.kv.policy.directions import Directions, Value
from suffice.kv.policy.estimators import Estimator, Leverage
from suffice.kv.policy.selection import Budget, ByCapacity, Selection, Top
from suffice.kv.policy.weights import Weights


@dataclass(frozen=True)
class Policy:
    """What to keep of a KV cache: `Policy(weights=…, directions=…, estimator=…)`.

    Args:
        weights: how likely a token is to be read.
        directions: how it moves the output.
        estimator: how its share of the capacity is approximated.
        selection: how tokens are chosen from scores.
        allocation: how the budget is split over layers and heads.
        window: recent tokens that the policy's authors always keep; None leaves it to the cache.
        keep_all: never evict.
        name: name in tables.
        paper: where it comes from.

    Example:
        >>> from suffice.kv import Policy
        >>> from suffice.kv.policy.weights import KeySalience, WindowAttention
        >>> Policy(weights=WindowAttention(window=16) + 2 * KeySalience()).describe()["weights"]
        'attention of last 16 queries + 2 exp(−4 cos(k, k̄))'

    """

    weights: Weights
    directions: Directions = field(default_factory=Value)
    estimator: Estimator = field(default_factory=Leverage)
    selection: Selection = field(default_factory=Top)
    allocation: Allocation = field(default_factory=Equal)
    window: int | None = None
    keep_all: bool = False
    name: str = "custom"
    paper: str = ""

    def __post_init__(self) -> None:
        parts = {
            "weights": (self.weights, Weights),
            "directions": (self.directions, Directions),
            "estimator": (self.estimator, Estimator),
            "selection": (self.selection, Selection),
            "allocation": (self.allocation, Allocation),
        }
        for part, (value, kind) in parts.items():
            if not isinstance(value, kind):
                raise TypeError(f"{part} is {value!r}; accepted: an instance of {kind.__module__}.{kind.__name__}")
        if isinstance(self.selection, ByCapacity) and not isinstance(self.estimator, Leverage):
            raise ValueError(f"selection {self.selection} needs the estimator Leverage, got {self.estimator}")

    def with_(self, **changes: Any) -> Policy:
        """Return a copy with some parts replaced, named `custom` unless `name` is given."""
        return replace(self, **{"name": "custom", **changes})

    def score(self, signals: Signals) -> Tensor:
        """Return what each token is worth, [batch, kv_heads, tokens]: only the order within a head counts."""
        parts = (self.weights, self.directions, self.estimator)

        def compute() -> Tensor:
            return self.estimator.score(self.weights, self.directions, signals)

        try:
            return signals.memo(("score", *parts), compute)
        except KernelFallbackError:
            with disable_kernels():
                return signals.memo(("score", *parts), compute)

    def budget(self, signals: Signals, allowed: list[int], protection: Protection) -> Budget:
        """Return this layer's budget.

        Args:
            signals: of the layer.
            allowed: entries that each row may keep in a head, in the mean over heads and layers.
            protection: what is always kept.

        """
        request = self.request(signals, allowed, protection)
        tokens = torch.minimum(self.allocation.tokens(request), request.room)
        # A layer that keeps fewer than the mean also protects fewer; heads of one layer are protected alike.
        sized = allowed if self.allocation.ragged else tokens.amax(-1).tolist()
        sizes = [self.sizes(kept, count, protection) for kept, count in zip(sized, request.seen, strict=True)]
        sinks, window = (_per_row(size, signals.device) for size in zip(*sizes, strict=True))
        newest = torch.arange(signals.tokens, device=signals.device) >= signals.tokens - window
        return Budget(tokens, (newest | (signals.positions < sinks)) & (signals.positions >= 0))

    def request(self, signals: Signals, allowed: list[int], protection: Protection) -> Request:
        """Return what the allocation is asked for this layer; arguments as of `budget`."""
        seen = signals.seen_tokens
        return Request(
            budget=tuple(allowed),
            seen=tuple(seen),
            least=tuple(sum(self.sizes(a, s, protection)) for a, s in zip(allowed, seen, strict=True)),
            room=signals.room,
            layer=signals.layer,
            layers=signals.layers,
            shares=lambda: signals.masked(self.estimator.shares(self.weights, self.directions, signals)),
            sharding=signals.sharding,
            most=signals.most,
        )

    def sizes(self, tokens: int, seen: int, protection: Protection) -> tuple[int, int]:
        """Return sinks and window of a row that keeps so many tokens; where all may stay, nothing needs protection.

        Raises:
            ValueError: what a user asked to protect does not fit.

        """
        return (0, 0) if tokens >= seen else protection.sizes(tokens, self.window)

    def select(self, signals: Signals, budget: Budget) -> Tensor:
        """Return the kept tokens, ascending: long [batch, kv_heads, budget.width], −1 for none."""
        return self.selection.choose(self, signals, budget)

    @property
    def observed(self) -> int | None:
        """How many of the newest queries its weights look at; None for all since the last eviction."""
        return self.weights.observed

    def describe(self) -> dict[str, str]:
        """Return the policy's parts in words."""
        return {
            "name": self.name,
            "weights": str(self.weights),
            "directions": str(self.directions),
            "estimator": "keep all" if self.keep_all else str(self.estimator),
            "selection": str(self.selection),
            "allocation": str(self.allocation),
            "paper": self.paper,
        }


def _per_row(numbers: tuple[int, ...], device: torch.device) -> Tensor | int:
    """Return one number of each row as [batch, 1, 1], or as it is if it is the same for all."""
    return numbers[0] if len(set(numbers)) == 1 else async_tensor(numbers, device)[:, None, None]
