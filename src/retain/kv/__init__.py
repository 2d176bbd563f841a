"""KV cache eviction by information: a cache for `generate`, policies, and their parts.

`RetainCache` is the cache; `policies` names what it can keep; `Policy` composes new ones from
`retain.kv.weights`, `retain.kv.directions` and `retain.kv.estimators`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retain.kv.accounting import CacheReport, HeadReport
    from retain.kv.allocation import Equal, MarginalCapacity, PooledScores, Pyramid
    from retain.kv.answering import answer
    from retain.kv.cache import RetainCache
    from retain.kv.calibration import calibrate, profile_of, read_profile, write_profile
    from retain.kv.models import DEFAULT_MODEL, DefaultModelError, load
    from retain.kv.named import DEFAULT_POLICY, allocations, get_allocation, get_policy, policies
    from retain.kv.policy import Policy
    from retain.kv.profile import HeadProfile, Profile
    from retain.kv.selection import Greedy, Rounds, Top, TwoStage
    from retain.kv.signals import Signals
    from retain.kv.slow_pairs import profile_from_weights

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_POLICY",
    "CacheReport",
    "DefaultModelError",
    "Equal",
    "Greedy",
    "HeadProfile",
    "HeadReport",
    "MarginalCapacity",
    "Policy",
    "PooledScores",
    "Profile",
    "Pyramid",
    "RetainCache",
    "Rounds",
    "Signals",
    "Top",
    "TwoStage",
    "allocations",
    "answer",
    "calibrate",
    "get_allocation",
    "get_policy",
    "load",
    "policies",
    "profile_from_weights",
    "profile_of",
    "read_profile",
    "write_profile",
]

_HOME = {
    "CacheReport": "retain.kv.accounting",
    "DEFAULT_MODEL": "retain.kv.models",
    "DEFAULT_POLICY": "retain.kv.named",
    "DefaultModelError": "retain.kv.models",
    "Equal": "retain.kv.allocation",
    "Greedy": "retain.kv.selection",
    "HeadProfile": "retain.kv.profile",
    "HeadReport": "retain.kv.accounting",
    "MarginalCapacity": "retain.kv.allocation",
    "Policy": "retain.kv.policy",
    "PooledScores": "retain.kv.allocation",
    "Profile": "retain.kv.profile",
    "Pyramid": "retain.kv.allocation",
    "RetainCache": "retain.kv.cache",
    "Rounds": "retain.kv.selection",
    "Signals": "retain.kv.signals",
    "Top": "retain.kv.selection",
    "TwoStage": "retain.kv.selection",
    "allocations": "retain.kv.named",
    "answer": "retain.kv.answering",
    "calibrate": "retain.kv.calibration",
    "get_allocation": "retain.kv.named",
    "get_policy": "retain.kv.named",
    "load": "retain.kv.models",
    "policies": "retain.kv.named",
    "profile_of": "retain.kv.calibration",
    "read_profile": "retain.kv.calibration",
    "profile_from_weights": "retain.kv.slow_pairs",
    "write_profile": "retain.kv.calibration",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: transformers takes seconds, and policies do not need it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
