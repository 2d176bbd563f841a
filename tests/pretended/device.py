"""A pretended CUDA device: tensors that say they are on it, hold their numbers on the CPU, and mix with no others.

With it, code runs as on a GPU, without one: `is_cuda` holds, an operation on tensors of two devices raises, and each
time that the program would wait for the device is written down in `WAITS`. What it can't show is speed. Triton's
kernels run through its interpreter if TRITON_INTERPRET is 1, and not at all otherwise.

Only for a process of its own whose environment names the library in PRETENDED_CUDA: torch is changed for good.
"""

import os
import traceback
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
NAME = "cuda:0"
_DEVICE = torch.device(NAME)
_BETWEEN_DEVICES = {aten.copy_.default, aten._to_copy.default}
_INDEXING = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}
# Their results' shapes, or the result itself, are known on the device alone.
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
"""Where the program waited: `file.py:line operation`, of the innermost line of the package."""

LAUNCHED: list[str] = []
"""Names of the kernels that were launched."""


def _waits(operation: object) -> None:
    own = [frame for frame in traceback.extract_stack() if "/src/suffice/" in frame.filename]
    if own:
        WAITS.append(f"{own[-1].filename.rsplit('/src/suffice/', 1)[1]}:{own[-1].lineno} {operation}")


class OnDevice(Tensor):
    """A tensor on the pretended device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        own = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=_DEVICE,
        )
        own.inner = inner
        return own

    def __repr__(self) -> str:
        return f"OnDevice({self.inner})"

    def tolist(self) -> Any:
        _waits("tolist")
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a tensor on cuda:0 to numpy")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        assert all(x.shape == x.inner.shape for x in tensors if isinstance(x, OnDevice)), f"{func} got a stale shape"
        if func is aten._fused_sdp_choice.default:
            return 0  # attention by its formula: the CPU's own kernel would be another operation
        if func is aten.histc.default:  # the CPU's takes no whole numbers
            return cls(aten.histc(args[0].inner.float(), *args[1:], **kwargs).to(args[0].dtype))
        cls._check(func, args, tensors)
        target = kwargs.get("device")
        stays = torch.device(target).type == "cuda" if target is not None else True
        if func is aten.copy_.default:
            stays = isinstance(args[0], OnDevice)
            if not isinstance(args[1], OnDevice) and not (len(args) > 2 and args[2]):
                _waits("upload")
        masks = [x for x in tree_leaves(args[1:2]) if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
        if not stays or func in _WAITING or (func in _INDEXING and masks):
            _waits(func)
        if target is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        out = func(*_unwrapped(args), **_unwrapped(kwargs))
        if func is aten.copy_.default:
            return args[0]
        if stays:
            out = tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, out)
        return out if func is aten._to_copy.default else return_and_correct_aliasing(func, args, kwargs, out)

    @staticmethod
    def _check(func: Any, args: Any, tensors: list[Tensor]) -> None:
        """Raise if an operation mixes devices, as CUDA does."""
        if func in _BETWEEN_DEVICES or (func in _INDEXING and isinstance(args[0], OnDevice)):
            return
        strays = [tuple(x.shape) for x in tensors if not isinstance(x, OnDevice) and x.dim() > 0]
        if strays:
            raise RuntimeError(f"{func}: expected all tensors on cuda:0, found tensors on cpu of shapes {strays}")


def _unwrapped(tree: Any) -> Any:
    return tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, tree)


def _to_device(x: Tensor, *, dtype: Any = None, non_blocking: bool = False, **options: Any) -> Tensor:
    if not isinstance(x, OnDevice) and not non_blocking:
        _waits("upload")
    return OnDevice(aten._to_copy(_unwrapped(x), dtype=dtype, memory_format=options.get("memory_format")))


def _maker(make: Any) -> Any:
    def made(*args: Any, dtype: Any = None, **options: Any) -> Tensor:
        return OnDevice(make(*args, dtype=dtype))

    return made


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    LAUNCHED.append(kernel.__name__)
    kernel[grid](*_unwrapped(arguments), **options)


# Operations that make tensors out of nothing reach the device's own implementations.
_library = torch.library.Library("aten", "IMPL")
for _name, _make in (
    ("empty.memory_format", torch.empty),
    ("empty_strided", torch.empty_strided),
    ("eye", torch.eye),
    ("arange", torch.arange),
    ("arange.start", torch.arange),
    ("arange.start_step", torch.arange),
):
    _library.impl(_name, _maker(_make), "CUDA")
_library.impl("_to_copy", _to_device, "CUDA")

torch.__future__.set_overwrite_module_params_on_conversion(True)
torch.cuda._lazy_init = lambda: None
torch.cuda.mem_get_info = lambda device=None: (2**33, 2**33)
torch.cuda.get_rng_state = lambda device=None: torch.zeros(1, dtype=torch.uint8)
torch.cuda.set_rng_state = lambda new_state, device=None: None

if os.environ.get("TRITON_INTERPRET") == "1":
    # Modules of kernels take these names from there when they are imported, which is not before they are needed.
    import suffice.gpu

    suffice.gpu._is_supported = lambda device: True
    suffice.gpu.launch = _launch
    import suffice.kv.kernels.grid

    suffice.kv.kernels.grid.num_multiprocessors = lambda device: 8
