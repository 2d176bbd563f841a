"""Reuse of freed memory, tested in subprocesses because the setting holds for a whole process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from suffice.link.train.allocator import reuse_freed_memory

_COUNT_PAGE_FAULTS = """
import resource, sys
import torch
from suffice.link.train.allocator import reuse_freed_memory
changed = reuse_freed_memory(int(sys.argv[1]), 64)
x = torch.zeros(200_000, 64)
for _ in range(20):
    x + 1
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    x + 1
print(changed, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_page_faults(num_nodes: int) -> tuple[str, int]:
    changed, count = subprocess.run(
        [sys.executable, "-c", _COUNT_PAGE_FAULTS, str(num_nodes)], capture_output=True, text=True, check=True
    ).stdout.split()
    return changed, int(count)


def test_small_graphs_change_nothing():
    assert reuse_freed_memory(1_000, 64) is False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is a function of glibc")
def test_a_large_tensor_reuses_the_pages_of_the_previous_one():
    changed, with_reuse = count_page_faults(200_000)
    if changed == "False":
        pytest.skip("the C library is not glibc")
    # The heap needs some tensors to settle, so that a few page faults remain.
    assert with_reuse * 2 < count_page_faults(1_000)[1]
