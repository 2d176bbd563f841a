"""Names that the options of `suffice link` accept, which can be checked without importing torch."""

from __future__ import annotations

from suffice.arguments import check_choice, did_you_mean

MODEL_NAMES = ("encoder-decoder", "neognn", "ncn", "ncnc", "elph", "buddy")
ENCODER_NAMES = ("gcn", "sage", "pure")
DECODER_NAMES = ("dot", "hadamard", "concat")
NORM_NAMES = ("batch", "layer", "graph", "none")
OWN_NORM = "own"
"""Stands for the norms of the model's settings."""
ARM_COMPOSITIONS = ("fixed", "random", "random+balanced", "separate")
REPRODUCED_MODELS = ("gcn", "sage", "neognn", "elph", "buddy", "ncn", "ncnc")
"""Models of the study; `gcn` and `sage` are encoders of the model `encoder-decoder`."""


def check_arm(argument: str, key: str) -> None:
    """Check the key of an arm: `fixed/batch`, `random+balanced/layer` or `random/none-batch`.

    Args:
        argument: argument or option that gave it, for the error.
        key: the key.

    Raises:
        ValueError: the key names an unknown composition or norm.

    """
    composition, _, norms = key.partition("/")
    if composition not in ARM_COMPOSITIONS:
        raise ValueError(
            f"{argument} must be one of {', '.join(ARM_COMPOSITIONS)}, a slash and a norm, got {key!r}"
            f"{did_you_mean(composition, ARM_COMPOSITIONS)}"
        )
    for norm in norms.split("-", 1):
        check_choice(f"the norm of {argument} {key!r}", norm, (*NORM_NAMES, OWN_NORM))
