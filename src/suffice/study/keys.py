"""The identity of a run: its settings, its seed and the code behind it."""

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


def canonical_json(value: Any) -> str:
    """Return JSON text that does not depend on the order of keys.

    Raises:
        ValueError: JSON cannot represent the value.

    """
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings must be values that JSON can represent, got {value!r} ({error})") from None


def run_key(kind: str, code_version: str, settings: Mapping[str, Any], seed: int) -> str:
    """Return the key of a run: a hash of its kind, code version, complete settings and seed."""
    text = canonical_json({"kind": kind, "code": code_version, "settings": settings, "seed": seed})
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def describe_environment() -> dict[str, str]:
    """Return the versions of Python and of the packages, the kind of machine, and a digest of this package's source."""
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
    """Return a hash of this package's source files."""
    digest = hashlib.sha256()
    root = Path(suffice.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]
