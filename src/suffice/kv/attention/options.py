"""Keyword arguments that models pass to their attention function, and which of them work with evicted entries."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

from torch import nn

SUPPORTED_OPTIONS = frozenset(
    (
        # Tensors of the call itself.
        *("module", "query", "key", "value", "attention_mask"),
        # Supported by the model's own implementation and by the attention over heads of unequal length.
        *("scaling", "softcap", "s_aux"),
        # The mask contains the same information. Packed sequences have no cache.
        *("is_causal", "sliding_window", "position_ids"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
        # No effect on the output in evaluation mode; see `check_dropout`.
        *("dropout", "output_attentions", "deterministic"),
    )
)
"""Options that do not depend on the index of an entry, so that they work with evicted entries."""


def check_attention_options(module: nn.Module) -> None:
    """Raise an error if an attention module passes an option to its attention function that does not allow eviction.

    For example, a bias for each distance between two tokens is a tensor over all tokens, including evicted ones. The
    options are read from the source code of the module. If it is not available, they are not checked.

    Args:
        module: the attention module of a layer.

    Raises:
        ValueError: the module passes an unsupported option that is not None.

    """
    for name, attribute in _unsupported_options(type(module)):
        if attribute is None or getattr(module, attribute, None) is not None:
            raise ValueError(
                f"model must have attention that depends on queries, keys, values and a mask only, got "
                f"{type(module).__name__}, which passes {name} to its attention function. Entries of this model cannot "
                "be evicted"
            )


def check_dropout(options: dict[str, Any]) -> None:
    """Raise an error if the options of an attention call ask for dropout.

    Raises:
        ValueError: the probability of dropout is not 0.

    """
    if options.get("dropout"):
        raise ValueError(
            f"model must be in evaluation mode, got attention dropout with probability {options['dropout']}. Call "
            "model.eval() first"
        )


@functools.cache
def _unsupported_options(module_type: type[nn.Module]) -> tuple[tuple[str, str | None], ...]:
    """Return the name of each unsupported option, and the module's attribute that holds it (None if it is computed)."""
    try:
        forward: Any = inspect.unwrap(module_type.forward)
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return ()
    functions = {name for node in ast.walk(tree) for name in _names_of_attention_functions(node)}
    found: dict[str, str | None] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in functions:
            continue
        for keyword in node.keywords:
            is_none = isinstance(keyword.value, ast.Constant) and keyword.value.value is None
            if keyword.arg is not None and keyword.arg not in SUPPORTED_OPTIONS and not is_none:
                found[keyword.arg] = _attribute_of_self(keyword.value)
    return tuple(found.items())


def _names_of_attention_functions(node: ast.AST) -> list[str]:
    """Return the names to which a statement assigns a function from `ALL_ATTENTION_FUNCTIONS`."""
    if isinstance(node, ast.Assign):
        targets, value = node.targets, node.value
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        targets, value = [node.target], node.value
    else:
        return []
    names = [part.id for part in ast.walk(value) if isinstance(part, ast.Name)]
    if "ALL_ATTENTION_FUNCTIONS" not in names:
        return []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _attribute_of_self(value: ast.expr) -> str | None:
    if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name) and value.value.id == "self":
        return value.attr
    return None
