"""Text files of the user."""

from __future__ import annotations

from pathlib import Path


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
