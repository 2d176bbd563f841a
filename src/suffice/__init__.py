"""Suffice answers what information a model keeps.

`suffice.kv` keeps the most information of a transformer's KV cache in the fewest bytes. `suffice.link` audits link
predictors on graphs for a bias by the composition of mini-batches, and corrects it. Both are built on
`suffice.information` (log-determinants and leverage scores), `suffice.study` (resumable grids of experiments) and
`suffice.report` (pages and figures).
"""

__version__ = "0.1.0.dev0"


class SufficeError(RuntimeError):
    """An operation failed for a reason other than a wrong argument; the message says what to do."""
