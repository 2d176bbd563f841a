"""Runs the GPU benchmark on the fake GPU, with kernels run by Triton's interpreter; its times mean nothing."""

import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

import tests.fake_gpu.device  # noqa: F401, registers the device with torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


class Event:
    """Stands in for `torch.cuda.Event`; records the wall time."""

    def __init__(self, **options):
        self.seconds = 0.0

    def record(self):
        self.seconds = time.perf_counter()

    def elapsed_time(self, other):
        return 1000 * (other.seconds - self.seconds)


def main():
    torch.cuda.Event = Event
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(
        name="fake", total_memory=2**33, multi_processor_count=8, major=9, minor=0
    )
    for name in ("_sleep", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, lambda *arguments: None)
    torch.cuda.memory_allocated = torch.cuda.max_memory_allocated = lambda: 0
    import gpu

    gpu.main()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
