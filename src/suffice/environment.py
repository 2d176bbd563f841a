"""The software and the machine with which results were computed."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import suffice


def describe_environment() -> dict[str, str]:
    """Return the versions of Python and of the packages, the kind of machine, and a digest of this package's source."""
    environment = {"python": platform.python_version(), "machine": platform.machine(), "source": source_digest()}
    environment["suffice"] = suffice.__version__
    for package in ("torch", "transformers", "torch-geometric"):
        try:
            environment[package] = version(package)
        except PackageNotFoundError:
            continue
    return environment


def format_environment(environment: Mapping[str, str]) -> str:
    """Return an environment as text, without the digest of the source."""
    return ", ".join(f"{name} {value}" for name, value in environment.items() if name != "source")


@cache
def source_digest() -> str:
    """Return a hash of the source files of this package."""
    digest = hashlib.sha256()
    root = Path(suffice.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]
