"""The transformers model inside the objects that other libraries wrap around it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def unwrap_model(model: object) -> PreTrainedModel:
    """Return the transformers model inside a PEFT model, a compiled model or a data-parallel one.

    Wrappers change the modules of this model or call it, so a cache that is made for it also works with the wrapper.

    Args:
        model: a transformers model, or a wrapper: a `peft.PeftModel`, the result of `torch.compile`, or a module that
            keeps the model in the attribute `module`, as `torch.nn.parallel.DistributedDataParallel` does.

    Raises:
        TypeError: there is no transformers model.
        ValueError: a PEFT model puts tokens or cache entries of its own before the prompt.

    """
    found: Any = model
    while not isinstance(found, PreTrainedModel):
        if callable(getattr(found, "get_base_model", None)):
            _check_adapter(found)
            found = found.get_base_model()
            continue
        inner = getattr(found, "_orig_mod", getattr(found, "module", None))
        if not isinstance(inner, nn.Module):
            raise TypeError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
        found = inner
    return found


def _check_adapter(model: Any) -> None:
    config = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise ValueError(
            f"model must have adapters that change its weights, such as LoRA, got {type(config).__name__}: prompt "
            "learning puts entries into the cache that are not tokens of the prompt"
        )
