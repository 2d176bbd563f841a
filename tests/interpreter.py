"""Makes Triton's interpreter faster, with the same results."""

from __future__ import annotations

import importlib.util
import types
from typing import Any


def speed_up_interpreter() -> None:
    """Let the interpreter keep what it otherwise computes again for each operation of a kernel."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton.language import core, semantic
    from triton.runtime import interpreter

    _replace_functions_once(interpreter)
    _keep_block_types(core)
    _keep_shapes(core)
    _broadcast_where_shapes_differ(semantic.TritonSemantic)
    _unwrap_by_type(core)
    interpreter._get_np_dtype = _by_scalar_type(core, interpreter._get_np_dtype)


def _replace_functions_once(interpreter: Any) -> None:
    """Replace the functions of `triton.language` once for each launch of a kernel.

    The interpreter replaces them again whenever the kernel calls another function of Triton, such as `tl.sum`, and
    searches through all of `triton.language` for them, which takes a third of the time of a kernel.
    """
    if not hasattr(interpreter, "_LangPatchScope"):  # versions of Triton that never undo the replacement
        return
    import triton.language as tl

    patch_all = interpreter._patch_lang
    replaced: list[Any] = []  # modules whose functions are replaced at the moment

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:
            super().restore()
            replaced.clear()

    def patch_new(function: Any) -> Any:
        """Replace the functions of the modules that a function of Triton uses, unless they are replaced already."""
        modules = [value for value in function.__globals__.values() if isinstance(value, types.ModuleType)]
        missing = [value for value in modules if value in (tl, tl.core) and value not in replaced]
        if not missing:
            return Scope()
        replaced.extend(missing)
        return patch_all(function)

    interpreter._LangPatchScope = Scope
    interpreter._patch_lang = patch_new


def _keep_block_types(core: Any) -> None:
    """Validate and describe each type of a block once; types of the same shape share the object `shape`."""
    initialize = core.block_type.__init__
    known: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, Any] = {}

    def initialize_once(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(size.value if type(size) is core.constexpr else size for size in shape)
        if type(element_ty) is not core.dtype or not all(type(size) is int for size in sizes):
            initialize(self, element_ty, shape)
            return
        key = (element_ty.name, sizes)
        if key not in known:
            initialize(self, element_ty, shape)
            known[key] = vars(self) | {"shape": shapes.setdefault(sizes, self.shape)}
        vars(self).update(known[key])

    core.block_type.__init__ = initialize_once


def _keep_shapes(core: Any) -> None:
    """Make the attributes of a tensor that depend only on its shape once for each shape."""
    initialize = core.tensor.__init__
    known: dict[Any, dict[str, Any]] = {}

    def initialize_once(self: Any, handle: Any, type: Any) -> None:  # noqa: A002
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in known:
            initialize(self, handle, type)
            known[sizes] = {name: vars(self)[name] for name in ("shape", "numel") if name in vars(self)}
        vars(self).update(known[sizes], handle=handle, type=type, dtype=type.scalar)

    core.tensor.__init__ = initialize_once


def _broadcast_where_shapes_differ(semantic: Any) -> None:
    """Return tensors whose shapes are the same object as they are."""
    broadcast = semantic.broadcast_impl_value

    def broadcast_if_needed(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast_if_needed


def _unwrap_by_type(core: Any) -> None:
    """Decide by its type that a value is no constant to unwrap, which most values are not."""
    unwrap = core._unwrap_if_constexpr
    plain = {int, float, bool, str, type(None), core.tensor, core.dtype, core.block_type, core.pointer_type}

    def unwrap_by_type(value: Any) -> Any:
        return value if type(value) in plain else unwrap(value)

    core._unwrap_if_constexpr = unwrap_by_type


def _by_scalar_type(core: Any, convert: Any) -> Any:
    """Return a function of the types of Triton that computes its result once for each scalar type."""
    known: dict[str, Any] = {}

    def convert_once(triton_type: Any) -> Any:
        scalar = triton_type.scalar
        if type(scalar) is not core.dtype:
            return convert(triton_type)
        if scalar.name not in known:
            known[scalar.name] = convert(triton_type)
        return known[scalar.name]

    return convert_once
