"""Which attention implementation a model has selected."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

# Prefix of the names of Suffice's attention functions. The name of the model's own implementation follows.
PREFIX = "suffice_"

_ATTRIBUTE = "_attn_implementation_internal"


def selected_implementation(decoder: PreTrainedModel) -> str:
    """Return the name of the attention implementation that a model uses."""
    return str(decoder.config._attn_implementation)  # pyright: ignore[reportPrivateUsage]


def select_hook(decoder: PreTrainedModel, implementation: str) -> None:
    """Select Suffice's attention function in place of an implementation, in all parts of a model that use it.

    `set_attn_implementation` is not used, because it tries to load a package for every name that contains "flash".
    The name is written to the private attribute, because the setter of the configuration may refuse unknown names.

    Models that cannot change their implementation are left as they are.

    Args:
        decoder: the model.
        implementation: name of the model's own implementation.

    """
    if decoder._can_set_attn_implementation():  # pyright: ignore[reportPrivateUsage]
        for config in _configurations(decoder):
            if config._attn_implementation == implementation:
                vars(config)[_ATTRIBUTE] = PREFIX + implementation


def restore_implementation(decoder: PreTrainedModel) -> None:
    """Select the model's own attention implementation again."""
    for config in _configurations(decoder):
        selected = str(config._attn_implementation)
        if selected.startswith(PREFIX):
            vars(config)[_ATTRIBUTE] = selected.removeprefix(PREFIX)


def _configurations(decoder: PreTrainedModel) -> list[Any]:
    """Return the configurations of a model and of all its modules, each once."""
    configurations = (getattr(module, "config", None) for module in decoder.modules())
    unique = {id(config): config for config in configurations if hasattr(config, _ATTRIBUTE)}
    return list(unique.values())
