"""A fake CUDA device that computes on the CPU, for tests of GPU code on machines without a GPU."""

import os
from pathlib import Path

from tests.fake_gpu.build import load

# Before anything imports torch, which looks for its devices only once.
if "FAKE_CUDA_LIBRARY" in os.environ:
    load(Path(os.environ["FAKE_CUDA_LIBRARY"]))
