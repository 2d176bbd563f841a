"""Builds and loads the C++ library that makes a PyTorch without CUDA report a CUDA device."""

import ctypes
import importlib.util
import subprocess
from pathlib import Path


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def build(folder: Path) -> Path:
    """Compile the library into a folder, in a second or two, and return its path."""
    torch, library = _torch_folder(), folder / "fake_cuda.so"
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch / 'include'}"]
    command += [str(Path(__file__).with_name("fake_cuda.cpp")), "-o", str(library)]
    command += [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def load(library: Path) -> None:
    """Load the library; must be called before torch is imported, because torch looks for its devices only once."""
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))
