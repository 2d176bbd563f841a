"""Folders that Suffice writes to."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return Suffice's cache folder: `$SUFFICE_CACHE`, else `$XDG_CACHE_HOME/suffice`, else `~/.cache/suffice`."""
    if folder := os.environ.get("SUFFICE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "suffice"
