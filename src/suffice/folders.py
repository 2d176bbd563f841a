"""Folders that Suffice writes to."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: `$SUFFICE_CACHE` or `$XDG_CACHE_HOME/suffice` if it is set, else `~/.cache/suffice`."""
    if folder := os.environ.get("SUFFICE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "suffice"
