"""Facts about a transformers model."""

from __future__ import annotations

from transformers import PreTrainedModel


def context_window(model: PreTrainedModel) -> int | None:
    """Return the number of tokens in a model's context window; None if its configuration does not state it."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
