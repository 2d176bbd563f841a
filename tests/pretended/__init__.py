"""A CUDA device that is only pretended, for machines without one."""

import os
from pathlib import Path

from tests.pretended.build import load

# Before anything imports torch, which asks for its devices then and never again.
if "PRETENDED_CUDA" in os.environ:
    load(Path(os.environ["PRETENDED_CUDA"]))
