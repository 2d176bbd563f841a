"""The user's files: read texts, and check the names of files to write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FIGURE_SUFFIXES = (".svg", ".pdf", ".eps", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")
PAGE_SUFFIXES = (".html", ".htm", ".md")


def read_text(path: str | Path, name: str) -> str:
    """Return the text of a UTF-8 file, without the byte-order mark that some editors write.

    Args:
        path: the file.
        name: argument or option that gave it, for the error.

    Raises:
        ValueError: the file cannot be read.

    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} must be a text file, got {str(path)!r}, which cannot be read: {error}") from None


def check_suffix(path: str | Path, suffixes: Sequence[str], name: str = "path") -> None:
    """Check the suffix of a file to write, in upper or lower case.

    Args:
        path: the file.
        suffixes: accepted suffixes, in lower case.
        name: argument or option that gave the file, for the error.

    Raises:
        ValueError: the file has another suffix, or is an existing folder.

    """
    path = Path(path)
    if path.suffix.lower() not in suffixes or path.is_dir():
        found = f"{str(path)!r}, which is a folder" if path.is_dir() else repr(str(path))
        raise ValueError(f"{name} must be a file ending in {', '.join(suffixes)}, got {found}")
