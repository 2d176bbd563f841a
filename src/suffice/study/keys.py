"""What makes a run the same run: its configuration, its seed and the code behind it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import suffice


def canonical(value: Any) -> str:
    """Return JSON that is the same text for the same value, whatever the order of its keys.

    Raises:
        ValueError: JSON has no such value.

    """
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings are {value!r}; accepted: what JSON holds ({error})") from None


def run_key(kind: str, code: str, settings: Mapping[str, Any], seed: int) -> str:
    """Return the name of a run: a hash of its kind, code version, full configuration and seed."""
    text = canonical({"kind": kind, "code": code, "settings": settings, "seed": seed})
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def made_with() -> dict[str, str]:
    """Return what a run is made with: versions, machine, and a digest of this package's source."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "source": source_digest()}
    found["suffice"] = suffice.__version__
    for package in ("torch", "transformers", "torch-geometric"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def source_digest() -> str:
    """Return a hash of the source files of this package."""
    digest = hashlib.sha256()
    home = Path(suffice.__file__).parent
    for file in sorted(home.rglob("*.py")):
        digest.update(file.relative_to(home).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]
