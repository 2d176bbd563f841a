"""Facts about a transformers model."""

from __future__ import annotations

from transformers import PreTrainedModel


def context_window(model: PreTrainedModel) -> int | None:
    """Return the number of tokens in a model's context window; None if its configuration does not state it."""
    config = model.config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_target_positions")  # the second name is that of Whisper
    return next((window for name in names if (window := getattr(config, name, None)) is not None), None)
