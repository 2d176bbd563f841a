"""Which attention implementation a model has selected."""

from __future__ import annotations

from transformers import PreTrainedModel

PREFIX = "suffice_"  # of the names of Suffice's attention functions; the name of the model's own implementation follows


def selected_implementation(decoder: PreTrainedModel) -> str:
    """Return the name of the attention implementation that a model uses."""
    return str(decoder.config._attn_implementation)  # pyright: ignore[reportPrivateUsage]


def restore_implementation(decoder: PreTrainedModel) -> None:
    """Select the model's own attention implementation again."""
    selected = selected_implementation(decoder)
    if selected.startswith(PREFIX):
        decoder.set_attn_implementation(selected.removeprefix(PREFIX))
