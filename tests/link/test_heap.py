"""Memory kept for reuse: in a process of its own, since it is for the whole process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from suffice.link.train.allocator import reuse_large_blocks

_FAULTS = """
import resource, sys
import torch
from suffice.link.train.allocator import reuse_large_blocks
asked = reuse_large_blocks(int(sys.argv[1]), 64)
x = torch.zeros(200_000, 64)
for _ in range(20):
    x + 1
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    x + 1
print(asked, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(nodes: int) -> tuple[str, int]:
    asked, count = subprocess.run(
        [sys.executable, "-c", _FAULTS, str(nodes)], capture_output=True, text=True, check=True
    ).stdout.split()
    return asked, int(count)


def test_small_graphs_are_left_alone():
    assert reuse_large_blocks(1_000, 64) is False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_a_large_tensor_takes_the_pages_of_the_last_one():
    asked, kept = faults(200_000)
    if asked == "False":
        pytest.skip("the C library is not glibc")
    # The heap takes some tensors to settle, and not always to the same place.
    assert kept * 2 < faults(1_000)[1]
