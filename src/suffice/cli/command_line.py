"""The command that is running."""

from __future__ import annotations

import shlex
import sys


def command_line() -> str:
    """Return the command that is running, as one would type it."""
    return shlex.join(["suffice", *sys.argv[1:]])
