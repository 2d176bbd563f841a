"""What a benchmark says about the machine and the process that it ran in."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine() -> str:
    """Name the processor, its cores and the threads used."""
    place = Path("/proc/cpuinfo")
    lines = place.read_text().splitlines() if place.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name, threads = names[0] if names else platform.processor(), torch.get_num_threads()
    return f"{name}, {os.cpu_count()} cores, {threads} thread, torch {torch.__version__}"


def status(name: str) -> int:
    """Return bytes that Linux counts for this process: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> None:
    """Let `VmHWM` start again from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
