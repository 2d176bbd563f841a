"""The named policies and allocations. The conformance tests run for each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from suffice.arguments import check_flag
from suffice.kv.budget.allocation import AdaKV, Allocation, Equal, HighestReplayScores, MarginalCapacity, Pyramid
from suffice.kv.budget.head_profile import HeadProfile
from suffice.kv.policy.directions import Constant, Key, OutputValue, Value
from suffice.kv.policy.estimators import Leverage, OneDirection, Trace
from suffice.kv.policy.names import check_name
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.selection import TwoStage
from suffice.kv.policy.weights import (
    AccumulatedAttention,
    ExpectedAttention,
    KeyNorm,
    KeySalience,
    LastQueryAttention,
    MeanQuery,
    Random,
    Recency,
    ReplayAttention,
    SampledAttention,
    Uniform,
    WindowAttention,
)

_SNAPKV = WindowAttention(window_size=64, kernel_size=5, prefix_only=True)

# Attention of queries from the whole text, and keys that differ from the other keys.
_SPREAD = (
    3 * WindowAttention(window_size=8, kernel_size=1)
    + SampledAttention(count=16, min_distance=32)
    + ExpectedAttention(future=0, recent=512, diagonal=True)
    + KeySalience()
)


def _published_replay(name: str, kind: str, paper: str) -> Policy:
    """Return KVzip, KVzip+ or KVgrad as it was published: one threshold on a kind of scores, and no window."""
    return Policy(
        name=name,
        weights=ReplayAttention(kind),
        directions=Constant(),
        estimator=Trace(),
        allocation=HighestReplayScores(kind=kind),
        window=0,
        paper=paper,
    )


_POLICIES = (
    # The default: the policy with one pass over the prompt that stays close to the full cache on both measured models
    # (docs/results/kv-two-models.md). An entry must be read, and its key must differ from the others.
    Policy(
        name="capkv-salience",
        weights=_SPREAD * KeySalience(beta=12.0),
        directions=Value(),
        estimator=Leverage(power=0.75, ridge=0.1),
        allocation=HeadProfile(),
        paper="2604.25975",
    ),
    # The sum of the weights alone. On SmolLM2, it is closer on text at small budgets; on Gemma 3, it loses questions.
    Policy(
        name="capkv-profile",
        weights=_SPREAD,
        directions=Value(),
        estimator=Leverage(power=0.5, ridge=0.1),
        allocation=HeadProfile(),
        paper="2604.25975",
    ),
    # Of all measured policies with equal budgets for all heads, it stays closest to the full cache.
    Policy(
        name="capkv",
        weights=WindowAttention(window_size=16, kernel_size=5)
        + ExpectedAttention(future=0, recent=512, pooled=True, diagonal=True)
        + 2 * KeySalience(),
        directions=Value(),
        estimator=Leverage(power=0.5, ridge=0.1),
        paper="2604.25975",
    ),
    # `capkv-profile` with equal budgets for all heads.
    Policy(
        name="capkv-spread",
        weights=_SPREAD,
        directions=Value(),
        estimator=Leverage(power=0.5, ridge=0.1),
        paper="2604.25975",
    ),
    # Only the attention of the last queries, ranked by the exact deletion cost. It works well only if the prompt ends
    # with the question.
    Policy(
        name="capkv-window",
        weights=WindowAttention(window_size=32, kernel_size=9),
        directions=Value(),
        estimator=Leverage(ridge=0.1),
        paper="2604.25975",
    ),
    # The paper's Algorithm 1 without changes: weights from the mean query with τ = 5, and A = I + Σ w u uᵀ.
    Policy(
        name="capkv-paper",
        weights=MeanQuery(tau=5.0),
        directions=Value(),
        estimator=Leverage(ridge=1.0, relative=False),
        paper="2604.25975",
    ),
    Policy(
        name="h2o",
        weights=AccumulatedAttention(),
        directions=Constant(),
        estimator=Trace(),
        paper="2306.14048",
    ),
    Policy(
        name="tova",
        weights=LastQueryAttention(),
        directions=Constant(),
        estimator=Trace(),
        paper="2401.06104",
    ),
    Policy(
        name="snapkv",
        weights=_SNAPKV,
        directions=Constant(),
        estimator=Trace(),
        window=64,
        paper="2404.14469",
    ),
    Policy(
        name="pyramidkv",
        weights=_SNAPKV,
        directions=Constant(),
        estimator=Trace(),
        allocation=Pyramid(beta=20),
        window=64,
        paper="2406.02069",
    ),
    Policy(
        name="expected-attention",
        weights=ExpectedAttention(future=512),
        directions=Value(),
        estimator=Trace(power=1),
        paper="2510.00636",
    ),
    Policy(
        name="vatp",
        weights=_SNAPKV,
        directions=Value(),
        estimator=Trace(norm=1, power=1),
        window=64,
        paper="2406.12335",
    ),
    Policy(
        name="criticalkv",
        weights=WindowAttention(window_size=64, kernel_size=5, prefix_only=True, floor=1e-4),
        directions=OutputValue(),
        estimator=Trace(norm=1, power=1),
        selection=TwoStage(first=0.5),
        window=64,
        paper="2502.03805",
    ),
    Policy(
        name="knorm",
        weights=KeyNorm(),
        directions=Constant(),
        estimator=Trace(),
        paper="2406.11430",
    ),
    Policy(
        name="keydiff",
        weights=Uniform(),
        directions=Key(unit=True),
        estimator=OneDirection(),
        paper="2504.15364",
    ),
    Policy(
        name="key-leverage",
        weights=Uniform(),
        directions=Key(rotary=False, centered=True),
        estimator=Leverage(ridge=1e-4),
        paper="2507.08143",
    ),
    Policy(
        name="streaming-llm",
        weights=Recency(),
        directions=Constant(),
        estimator=Trace(),
        paper="2309.17453",
    ),
    # Scores entries while the model repeats the prompt, as KVzip does, and prefers keys that differ from the others.
    Policy(
        name="capkv-replay",
        weights=ReplayAttention("largest") * KeySalience(beta=6.0),
        directions=Value(),
        estimator=Leverage(power=0.5, ridge=0.1),
        allocation=HighestReplayScores(),
        paper="2604.25975",
    ),
    _published_replay("kvzip", "largest", "2505.23416"),
    _published_replay("kvzip+", "output", "2505.23416"),
    _published_replay("kvgrad", "gradient", "openreview:cg1wTCJjjk"),
    Policy(name="random", weights=Random(), directions=Constant(), estimator=Trace()),
    Policy(name="full", weights=Uniform(), directions=Constant(), estimator=Trace(), keep_all=True),
)


_ALLOCATIONS: dict[str, Allocation] = {
    "equal": Equal(),
    "pyramid": Pyramid(),
    "adakv": AdaKV(),
    "marginal": MarginalCapacity(),
    "profile": HeadProfile(),
}


def allocations() -> dict[str, Allocation]:
    """Return all named allocations by name."""
    return dict(_ALLOCATIONS)


def get_allocation(name: str | Allocation) -> Allocation:
    """Return the allocation with this name; an `Allocation` is returned unchanged.

    Raises:
        ValueError: `name` is not a known name; the message lists the known names.
        TypeError: `name` is neither a string nor an `Allocation`.

    """
    return _lookup("allocation", name, Allocation, _ALLOCATIONS)


def policies(*, replay: bool | None = None) -> dict[str, Policy]:
    """Return all named policies by name, the default first.

    Args:
        replay: True for those that score entries in a second pass over the prompt, False for those that do not; None
            for all.

    Raises:
        TypeError: `replay` is neither a boolean nor None.

    """
    if replay is not None:
        check_flag("replay", replay)
    return {policy.name: policy for policy in _POLICIES if replay in (None, policy.needs_replay)}


def get_policy(name: str | Policy) -> Policy:
    """Return the policy with this name; a `Policy` is returned unchanged.

    Raises:
        ValueError: `name` is not a known name; the message lists the known names.
        TypeError: `name` is neither a string nor a `Policy`.

    """
    return _lookup("policy", name, Policy, policies())


Part = TypeVar("Part")


def _lookup(argument: str, name: object, base: type[Part], known: Mapping[str, Part]) -> Part:
    if isinstance(name, base):
        return name
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be an instance of {base.__name__} or one of {', '.join(known)}, got {name!r}")
    return known[check_name(argument, name, known)]
