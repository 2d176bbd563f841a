"""Names of the policies and of the allocations, which can be checked without importing torch."""

from __future__ import annotations

from collections.abc import Iterable

from suffice.arguments import did_you_mean

DEFAULT_POLICY = "capkv-salience"
DEFAULT_REPLAY_POLICY = "capkv-replay"
POLICY_NAMES = (
    "capkv-salience",
    "capkv-profile",
    "capkv",
    "capkv-spread",
    "capkv-window",
    "capkv-paper",
    "h2o",
    "tova",
    "snapkv",
    "pyramidkv",
    "expected-attention",
    "vatp",
    "criticalkv",
    "knorm",
    "keydiff",
    "key-leverage",
    "streaming-llm",
    "capkv-replay",
    "kvzip",
    "kvzip+",
    "kvgrad",
    "random",
    "full",
)
OWN_ALLOCATION = "own"
"""Stands for the allocation of the policy, where several allocations are compared."""
ALLOCATION_NAMES = ("equal", "pyramid", "adakv", "marginal", "profile")


def canonical_name(name: str) -> str:
    """Return a name in lower case with hyphens, as policies and allocations are registered: `h2o` for `H2O`."""
    return name.lower().replace("_", "-")


def check_name(argument: str, name: str, known: Iterable[str]) -> str:
    """Return the registered form of a name.

    Args:
        argument: name of the argument, for the error message.
        name: name of a policy or an allocation.
        known: registered names.

    Raises:
        ValueError: the name is not known; the message lists the known names.

    """
    names, key = list(known), canonical_name(name)
    if key not in names:
        hint = did_you_mean(key, names)
        raise ValueError(f"{argument} must be one of {', '.join(names)}, got {name!r}{hint}")
    return key
