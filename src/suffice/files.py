"""The user's files: read texts, and check the names of files to write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from suffice.arguments import did_you_mean

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
    except FileNotFoundError:
        raise ValueError(
            f"{name} must be a text file, got {str(path)!r}, which cannot be read: no such file{similar_file(path)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} must be a text file, got {str(path)!r}, which cannot be read: {error}") from None


def check_file(path: str | Path, name: str, others: Sequence[str] = ()) -> None:
    """Check that a file exists; the error suggests a similar name in the same folder.

    Args:
        path: the file.
        name: argument or option that gave it, for the error.
        others: words that are also accepted.

    Raises:
        ValueError: there is no such file.

    """
    if str(path) in others or Path(path).is_file():
        return
    words = f", or {' or '.join(others)}" if others else ""
    raise ValueError(f"{name} must be an existing file{words}, got {str(path)!r}{similar_file(path, others)}")


def similar_file(path: str | Path, others: Sequence[str] = ()) -> str:
    """Return `. Did you mean 'x'?` with a similar file in the same folder or another word; empty if none is similar."""
    path = Path(path)
    files = [file.name for file in path.parent.iterdir() if file.is_file()] if path.parent.is_dir() else []
    # Names are compared without suffixes, which would make all files of one kind similar.
    files.sort(key=lambda name: Path(name).suffix == path.suffix)  # of files that differ in the suffix, the last counts
    return did_you_mean(path.name, (*files, *others), lambda name: Path(name).stem)


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
