"""KV cache eviction by information: a cache for `generate`, policies, and their parts.

`RetainCache` is the cache; `policies` names what it can keep; `Policy` composes new ones from
`retain.kv.weights`, `retain.kv.directions` and `retain.kv.estimators`.
"""

from retain.kv.accounting import CacheReport, HeadReport
from retain.kv.cache import RetainCache
from retain.kv.models import DEFAULT_MODEL, DefaultModelError, load
from retain.kv.named import DEFAULT_POLICY, get_policy, policies
from retain.kv.policy import Greedy, Policy, Rounds, Top, TwoStage
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
