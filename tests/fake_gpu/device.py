"""The fake CUDA device: tensors that report `cuda:0` as their device and hold their numbers on the CPU.

Code runs as on a GPU: `is_cuda` is True, operations on tensors of two devices raise, and each place where the program
would wait for the device is recorded in `WAITS`. Times mean nothing. Triton's interpreter runs the kernels if
TRITON_INTERPRET is 1; otherwise they are not used.

Importing this module changes torch for the rest of the process. The environment variable FAKE_CUDA_LIBRARY must hold
the path of the library that `tests.fake_gpu.build` compiles.
"""

import os
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from tests.interpreter import speed_up_interpreter

aten = torch.ops.aten
DEVICE = "cuda:0"
_BETWEEN_DEVICES = {aten.copy_.default, aten._to_copy.default}
_INDEXING = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}
# The host needs the result of these operations, or its shape.
_WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
}

WAITS: list[str] = []
"""Where the program waited for the device, as `file.py:line operation` of the innermost line of the package."""

LAUNCHED: list[str] = []
"""Names of the launched kernels."""


def _record_wait(operation: object) -> None:
    frames = [frame for frame in traceback.extract_stack() if "/src/suffice/" in frame.filename]
    if frames:
        WAITS.append(f"{frames[-1].filename.rsplit('/src/suffice/', 1)[1]}:{frames[-1].lineno} {operation}")


class FakeCudaTensor(Tensor):
    """A tensor on the fake device; `inner` holds its numbers on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "FakeCudaTensor":
        tensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(DEVICE),
        )
        tensor.inner = inner
        return tensor

    def __repr__(self) -> str:
        return f"FakeCudaTensor({self.inner})"

    def tolist(self) -> Any:
        _record_wait("tolist")
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a tensor on cuda:0 to numpy")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [*_tensors(args), *_tensors(kwargs)]
        assert all(x.shape == x.inner.shape for x in tensors if isinstance(x, FakeCudaTensor)), (
            f"{func} got a stale shape"
        )
        if func is aten._fused_sdp_choice.default:
            return 0  # attention by its formula, because the fused operation does not accept this device
        if func is aten.histc.default:  # on the CPU, it does not accept integers
            return cls(aten.histc(args[0].inner.float(), *args[1:], **kwargs).to(args[0].dtype))
        cls._check(func, args, tensors)
        target = kwargs.get("device")
        on_device = torch.device(target).type == "cuda" if target is not None else True
        if func is aten.copy_.default:
            on_device = isinstance(args[0], FakeCudaTensor)
            if not isinstance(args[1], FakeCudaTensor) and not (len(args) > 2 and args[2]):
                _record_wait("upload")
        if not on_device or func in _WAITING or (func in _INDEXING and _has_mask(args[1])):
            _record_wait(func)
        if target is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        out = func(*_unwrap(args), **_unwrap(kwargs))
        if func is aten.copy_.default:
            return args[0]
        if on_device:
            out = _map_tensors(cls, out)
        return out if func is aten._to_copy.default else return_and_correct_aliasing(func, args, kwargs, out)

    @staticmethod
    def _check(func: Any, args: Any, tensors: list[Tensor]) -> None:
        """Raise if an operation mixes devices, as on a GPU."""
        if func in _BETWEEN_DEVICES or (func in _INDEXING and isinstance(args[0], FakeCudaTensor)):
            return
        on_cpu = [tuple(x.shape) for x in tensors if not isinstance(x, FakeCudaTensor) and x.dim() > 0]
        if on_cpu:
            raise RuntimeError(f"{func}: all tensors must be on {DEVICE}, got CPU tensors of shapes {on_cpu}")


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to the tensors in nested lists, tuples and dictionaries, which `tree_map` takes longer for."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_map_tensors(function, one) for one in value])
    if isinstance(value, dict):
        return {key: _map_tensors(function, one) for key, one in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map_tensors(lambda x: found.append(x) or x, value)
    return found


def _has_mask(indices: Any) -> bool:
    return any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(indices))


def _unwrap(tree: Any) -> Any:
    return _map_tensors(lambda x: x.inner if isinstance(x, FakeCudaTensor) else x, tree)


def _to_device(x: Tensor, *, dtype: Any = None, non_blocking: bool = False, **options: Any) -> Tensor:
    if not isinstance(x, FakeCudaTensor) and not non_blocking:
        _record_wait("upload")
    return FakeCudaTensor(aten._to_copy(_unwrap(x), dtype=dtype, memory_format=options.get("memory_format")))


def _on_fake_device(factory: Any) -> Any:
    def make(*args: Any, dtype: Any = None, **options: Any) -> Tensor:
        return FakeCudaTensor(factory(*args, dtype=dtype))

    return make


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    LAUNCHED.append(kernel.__name__)
    kernel[grid](*_unwrap(arguments), **options)


# Operations without tensor arguments are dispatched by the device alone.
_library = torch.library.Library("aten", "IMPL")
for _name, _factory in (
    ("empty.memory_format", torch.empty),
    ("empty_strided", torch.empty_strided),
    ("eye", torch.eye),
    ("arange", torch.arange),
    ("arange.start", torch.arange),
    ("arange.start_step", torch.arange),
):
    _library.impl(_name, _on_fake_device(_factory), "CUDA")
_library.impl("_to_copy", _to_device, "CUDA")

torch.__future__.set_overwrite_module_params_on_conversion(True)
torch.cuda._lazy_init = lambda: None
torch.cuda.mem_get_info = lambda device=None: (2**33, 2**33)
torch.cuda.get_rng_state = lambda device=None: torch.zeros(1, dtype=torch.uint8)
torch.cuda.set_rng_state = lambda new_state, device=None: None

if os.environ.get("TRITON_INTERPRET") == "1":
    speed_up_interpreter()
    # The modules of kernels import these names later, when the first kernel is needed.
    import suffice.gpu

    suffice.gpu._is_supported = lambda device: True
    suffice.gpu.launch = _launch
    import suffice.kv.kernels.grid

    suffice.kv.kernels.grid.num_multiprocessors = lambda device: 8
