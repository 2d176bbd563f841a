"""KV cache eviction by information: a cache for `generate`, policies, and their parts.

`RetainCache` is the cache; `policies` names what it can keep; `Policy` composes new ones from
`retain.kv.weights`, `retain.kv.directions` and `retain.kv.estimators`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retain.kv.accounting import CacheReport, HeadReport
    from retain.kv.cache import RetainCache
    from retain.kv.models import DEFAULT_MODEL, DefaultModelError, load
    from retain.kv.named import DEFAULT_POLICY, get_policy, policies
    from retain.kv.policy import Policy
    from retain.kv.selection import Greedy, Rounds, Top, TwoStage
    from retain.kv.signals import Signals

__all__ = [
    "DEFAULT_MODEL",
    "DEFAULT_POLICY",
    "CacheReport",
    "DefaultModelError",
    "Greedy",
    "HeadReport",
    "Policy",
    "RetainCache",
    "Rounds",
    "Signals",
    "Top",
    "TwoStage",
    "get_policy",
    "load",
    "policies",
]

_HOME = {
    "CacheReport": "retain.kv.accounting",
    "DEFAULT_MODEL": "retain.kv.models",
    "DEFAULT_POLICY": "retain.kv.named",
    "DefaultModelError": "retain.kv.models",
    "Greedy": "retain.kv.selection",
    "HeadReport": "retain.kv.accounting",
    "Policy": "retain.kv.policy",
    "RetainCache": "retain.kv.cache",
    "Rounds": "retain.kv.selection",
    "Signals": "retain.kv.signals",
    "Top": "retain.kv.selection",
    "TwoStage": "retain.kv.selection",
    "get_policy": "retain.kv.named",
    "load": "retain.kv.models",
    "policies": "retain.kv.named",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: transformers takes seconds, and policies do not need it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)
