"""Weights from a replay: a second pass over a prompt, in which the model repeats it.

The queries of the repeated text show which entries the model reads to repeat it (KVzip, 2505.23416).
`suffice.kv.cache.replay` computes the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.weights.base import Weights

LARGEST = "largest"
"""The largest attention that an entry receives from a query of the repeated text and a head of its group (KVzip)."""
OUTPUT = "output"
"""As `LARGEST`, with each attention times ‖W_O v‖ / ‖h‖, where v is the value of the entry and h the input of the layer
at the query (KVzip+)."""
GRADIENT = "gradient"
"""As `LARGEST`, with each attention times ‖W_O v‖ ‖∂Φ/∂a‖, where a is the output of the attention at the query, and Φ
the sum of the squared outputs of the last layer (KVgrad)."""
MEAN = "mean"
"""The attention that an entry receives, averaged over the queries of the repeated text and the heads of its group."""
KINDS = (LARGEST, OUTPUT, GRADIENT, MEAN)

_DESCRIPTIONS = {
    LARGEST: "largest attention in a replay",
    OUTPUT: "largest attention × ‖W_O v‖ / ‖h‖ in a replay",
    GRADIENT: "largest attention × ‖W_O v‖ ‖∂Φ/∂a‖ in a replay",
    MEAN: "mean attention in a replay",
}


@dataclass(frozen=True)
class ReplayAttention(Weights):
    """The attention that an entry receives while the model repeats the prompt.

    A cache whose policy uses it is filled with `suffice.kv.prefill`, which runs the second pass.

    Args:
        kind: `"largest"` (KVzip), `"output"` (KVzip+), `"gradient"` (KVgrad) or `"mean"`; see this module.

    Raises:
        ValueError: `kind` is not one of these.

    """

    kind: str = LARGEST

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")

    def log_weights(self, stats: AttentionStats) -> Tensor:
        """Return the log of the score.

        Raises:
            ValueError: the prompt was not replayed.

        """
        return stats.replay_score(self.kind).log()

    @property
    def replay_kinds(self) -> frozenset[str]:
        """The kind of this weight."""
        return frozenset((self.kind,))

    def __str__(self) -> str:
        return _DESCRIPTIONS[self.kind]
