"""Builds and loads the library that lets PyTorch without CUDA believe in a device: before `import torch`."""

import ctypes
import importlib.util
import subprocess
from pathlib import Path


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0])


def build(folder: Path) -> Path:
    """Compile the library into a folder, in a second or two."""
    torch, library = _torch(), folder / "cuda.so"
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch / 'include'}"]
    command += [str(Path(__file__).with_name("cuda.cpp")), "-o", str(library)]
    command += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def load(library: Path) -> None:
    """Load it; torch asks for its devices when it is imported, and never again."""
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))
