"""Makes Triton's interpreter faster, with the same results."""

from __future__ import annotations

import importlib.util
import types
from typing import Any


def speed_up_interpreter() -> None:
    """Replace the functions of `triton.language` once for each launch of a kernel.

    The interpreter replaces them again whenever the kernel calls another function of Triton, such as `tl.sum`, and
    searches through all of `triton.language` for them, which takes a third of the time of a kernel.
    """
    if importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # versions of Triton that never undo the replacement
        return
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
