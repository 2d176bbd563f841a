"""Suffice says what information a model keeps.

`suffice.kv` keeps the entries of a transformer's KV cache that carry the most information about the
coming output; `suffice.link` audits link predictors on graphs. Both stand on `suffice.information`.
"""

__version__ = "0.1.0.dev0"


class SufficeError(RuntimeError):
    """An error that is not the caller's argument: what could not be done, and the remedy."""
