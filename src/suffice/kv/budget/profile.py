"""Head profiles: how much of its cache each head of a model reads, and the files that store them."""

from __future__ import annotations

import importlib.resources
import json
import os
from dataclasses import dataclass
from pathlib import Path

from suffice.folders import cache_folder

# Version of the files. Increase it when their content or the fingerprint of models changes.
_FORMAT = 2
MIN_TOKENS = 32
"""Number of tokens below which the profile of a text is not reliable."""


@dataclass(frozen=True)
class Profile:
    """How much of its cache each head of a model reads.

    Args:
        attention: for each compressed layer and KV head, a number between 0 and 1: the largest attention that a cached
            token receives from any query that repeats the text, averaged over the tokens. Layers may have different
            numbers of KV heads. See `suffice.kv.budget.calibration.calibrate`.
        model: fingerprint of the model, see `suffice.kv.hf.fingerprint.fingerprint`.
        source: description of the text on which the profile was measured.

    Raises:
        ValueError: there is no layer, a layer has no heads, or a number is not positive and finite.

    """

    attention: tuple[tuple[float, ...], ...]
    model: str
    source: str

    def __post_init__(self) -> None:
        if not self.attention or not all(self.attention):
            raise ValueError(
                f"attention must have at least one layer, and at least one head in every layer, got {self.num_heads} "
                "heads"
            )
        for value in (value for layer in self.attention for value in layer):
            if not 0 < value < float("inf"):
                raise ValueError(f"attention must be a positive finite number for every head, got {value!r}")

    @property
    def num_heads(self) -> list[int]:
        """Number of KV heads of each layer."""
        return [len(layer) for layer in self.attention]

    def rounded(self) -> Profile:
        """Return the profile with five significant digits, as it is stored in files."""
        attention = tuple(tuple(float(f"{value:.5g}") for value in layer) for layer in self.attention)
        return Profile(attention, self.model, self.source)


def write_profile(profile: Profile, path: Path | None = None) -> Path:
    """Write a profile as JSON with five significant digits. The file is replaced atomically.

    Args:
        profile: the profile.
        path: the file; None means the file in Suffice's cache folder in which caches look for the profile.

    Returns:
        The path of the file.

    Raises:
        OSError: the file cannot be written.

    """
    path = path or _stored_profile(profile.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    attention = profile.rounded().attention
    content = {"format": _FORMAT, "model": profile.model, "source": profile.source, "attention": attention}
    temporary = path.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_profile(path: Path) -> Profile:
    """Read a profile that `write_profile` wrote.

    Raises:
        ValueError: the file does not contain a profile, or was written in another format.

    """
    return _parse_profile(path.read_text(encoding="utf-8"), str(path))


def find_profile(model: str) -> Profile | None:
    """Find the profile of a model on this machine.

    Args:
        model: fingerprint of the model, see `suffice.kv.hf.fingerprint.fingerprint`.

    Returns:
        The profile in Suffice's cache folder, or the one in the package; None if there is neither.

    """
    shipped = importlib.resources.files("suffice.kv.budget") / "profiles" / f"{model}.json"
    for file in (_stored_profile(model), shipped):
        if file.is_file():
            return _parse_profile(file.read_text(encoding="utf-8"), str(file))
    return None


def _stored_profile(model: str) -> Path:
    return cache_folder() / "profiles" / f"{model}.json"


def _parse_profile(text: str, file: str) -> Profile:
    try:
        content = json.loads(text)
        attention = tuple(tuple(float(value) for value in layer) for layer in content["attention"])
        profile = Profile(attention, str(content["model"]), str(content["source"]))
        found = int(content.get("format", 1))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} must contain a head profile, got other content ({type(error).__name__}: {error}). Delete the "
            "file, and the profile is measured again"
        ) from None
    if found != _FORMAT:
        remedy = "Update suffice" if found > _FORMAT else "Measure it again with `suffice kv calibrate`"
        raise ValueError(f"{file} must contain a head profile of format {_FORMAT}, got one of format {found}. {remedy}")
    return profile
