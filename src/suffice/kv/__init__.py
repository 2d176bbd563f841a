"""KV cache eviction by information: a cache for `generate`, policies, and their parts.

`CompressedCache` is the cache; `policies` names what it can keep; `Policy` composes new ones from
`suffice.kv.policy.weights`, `suffice.kv.policy.directions` and `suffice.kv.policy.estimators`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from suffice.kv.budget.allocation import Equal, MarginalCapacity, PooledScores, Pyramid
    from suffice.kv.budget.calibration import calibrate, profile_of, read_profile, write_profile
    from suffice.kv.budget.head_profile import HeadProfile, Profile
    from suffice.kv.budget.profile_from_weights import profile_from_weights
    from suffice.kv.cache.cache import CompressedCache
    from suffice.kv.cache.report import CacheReport, HeadReport
    from suffice.kv.eval.answer import answer
    from suffice.kv.hf.default_model import DEFAULT_MODEL, DefaultModelError
    from suffice.kv.hf.loading import load_model
    from suffice.kv.policy.attention_stats import Signals
    from suffice.kv.policy.policy import Policy
    from suffice.kv.policy.registry import DEFAULT_POLICY, allocations, get_allocation, get_policy, policies
    from suffice.kv.policy.selection import Greedy, Rounds, Top, TwoStage

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_POLICY",
    "CacheReport",
    "CompressedCache",
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
    "Rounds",
    "Signals",
    "Top",
    "TwoStage",
    "allocations",
    "answer",
    "calibrate",
    "get_allocation",
    "get_policy",
    "load_model",
    "policies",
    "profile_from_weights",
    "profile_of",
    "read_profile",
    "write_profile",
]

_HOME = {
    "CacheReport": "suffice.kv.cache.report",
    "DEFAULT_MODEL": "suffice.kv.hf.default_model",
    "DEFAULT_POLICY": "suffice.kv.policy.registry",
    "DefaultModelError": "suffice.kv.hf.default_model",
    "Equal": "suffice.kv.budget.allocation",
    "Greedy": "suffice.kv.policy.selection",
    "HeadProfile": "suffice.kv.budget.head_profile",
    "HeadReport": "suffice.kv.cache.report",
    "MarginalCapacity": "suffice.kv.budget.allocation",
    "Policy": "suffice.kv.policy.policy",
    "PooledScores": "suffice.kv.budget.allocation",
    "Profile": "suffice.kv.budget.head_profile",
    "Pyramid": "suffice.kv.budget.allocation",
    "CompressedCache": "suffice.kv.cache.cache",
    "Rounds": "suffice.kv.policy.selection",
    "Signals": "suffice.kv.policy.attention_stats",
    "Top": "suffice.kv.policy.selection",
    "TwoStage": "suffice.kv.policy.selection",
    "allocations": "suffice.kv.policy.registry",
    "answer": "suffice.kv.eval.answer",
    "calibrate": "suffice.kv.budget.calibration",
    "get_allocation": "suffice.kv.policy.registry",
    "get_policy": "suffice.kv.policy.registry",
    "load_model": "suffice.kv.hf.loading",
    "policies": "suffice.kv.policy.registry",
    "profile_of": "suffice.kv.budget.calibration",
    "read_profile": "suffice.kv.budget.calibration",
    "profile_from_weights": "suffice.kv.budget.profile_from_weights",
    "write_profile": "suffice.kv.budget.calibration",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: transformers takes seconds, and policies do not need it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
