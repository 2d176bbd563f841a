"""Names of the policies and of the allocations, which can be checked without importing torch."""

from __future__ import annotations

from collections.abc import Iterable

from suffice.arguments import did_you_mean

DEFAULT_POLICY = "capkv-salience"
DEFAULT_REPLAY_POLICY = "capkv-replay"
POLICY_USES = {
    "capkv-salience": "The default: of all policies with one pass over the prompt, closest to the full cache.",
    "capkv-profile": "Text at small budgets, if tune finds it closer than the default.",
    "capkv": "All heads must keep equal numbers, or the context window has fewer than 96 tokens.",
    "capkv-spread": "Comparisons: capkv-profile with equal heads.",
    "capkv-window": "Prompts that end with the question, with equal heads.",
    "capkv-paper": "Comparisons: Algorithm 1 of the paper, unchanged.",
    "h2o": "Comparisons: attention received from all tokens.",
    "tova": "Comparisons: attention of the last token.",
    "snapkv": "Comparisons: attention of the last 64 tokens.",
    "pyramidkv": "Comparisons: snapkv with more entries in the lower layers.",
    "expected-attention": "Comparisons: attention that later tokens are expected to pay.",
    "vatp": "Comparisons: snapkv times the size of the values.",
    "criticalkv": "Comparisons: snapkv in two stages, with projected values.",
    "knorm": "The least overhead, with much more loss: keys with small norms.",
    "keydiff": "Comparisons: keys that differ from the mean key.",
    "key-leverage": "Comparisons: leverage of the keys, without attention.",
    "streaming-llm": "The least overhead, with much more loss: the first and the last tokens.",
    "capkv-replay": "Few entries for many questions about one document. Reads the prompt twice.",
    "kvzip": "As capkv-replay, as it was published.",
    "kvzip+": "As kvzip, with scores that include the size of the outputs.",
    "kvgrad": "As kvzip, with gradients as scores.",
    "random": "Comparisons: random entries.",
    "full": "Comparisons: keeps everything.",
}
"""When to use each policy, in a sentence; the default comes first."""
POLICY_NAMES = tuple(POLICY_USES)
POLICY_PAPERS = {
    **dict.fromkeys(("capkv-salience", "capkv-profile", "capkv", "capkv-spread", "capkv-window"), "2604.25975"),
    **dict.fromkeys(("capkv-paper", "capkv-replay"), "2604.25975"),
    **dict.fromkeys(("kvzip", "kvzip+"), "2505.23416"),
    "h2o": "2306.14048",
    "tova": "2401.06104",
    "snapkv": "2404.14469",
    "pyramidkv": "2406.02069",
    "expected-attention": "2510.00636",
    "vatp": "2406.12335",
    "criticalkv": "2502.03805",
    "knorm": "2406.11430",
    "keydiff": "2504.15364",
    "key-leverage": "2507.08143",
    "streaming-llm": "2309.17453",
    "kvgrad": "openreview:cg1wTCJjjk",
    "random": "",
    "full": "",
}
"""The paper of each policy: its number at arXiv, or `openreview:` and its number at OpenReview."""
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
