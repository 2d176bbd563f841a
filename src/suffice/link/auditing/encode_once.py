"""Scoring functions that embed the nodes at most twice in an audit, instead of once for each batch."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from suffice.arguments import check_callable
from suffice.link.auditing.couplings import tensors_in
from suffice.link.auditing.edge_set import Score
from suffice.link.auditing.module_state import find_modules


@dataclass(frozen=True)
class _Kept:
    """Encodings of one scoring function in training mode and in eval mode, and its modules."""

    modules: list[nn.Module]
    encodings: dict[bool, Any] = field(default_factory=dict[bool, Any])


_kept: ContextVar[dict[int, _Kept] | None] = ContextVar("kept encodings", default=None)


@contextmanager
def keep_encodings() -> Generator[None]:
    """Let functions of `encode_once` keep their encodings until exit. Parameters must not change meanwhile."""
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def encode_once(encode: Callable[[], Any], decode: Callable[..., Any]) -> Score:
    """Return a scoring function that calls `decode(encode(), pairs)`, and encodes only once for many batches.

    An audit scores about 200 batches. If the encoder does not see the pairs, such as a GNN on the whole graph, its
    output is the same for all of them. So each audit calls `encode` once in eval mode, and once while a module behind
    `encode` is in training mode. Outside of an audit, every call of the scoring function calls `encode`, with
    gradients.

    If `decode` writes into the tensors of the encoding, these are computed again for the next batch.

    If `encode` changes the mode of the model, the mode is restored before `decode` is called.

    Args:
        encode: function without arguments that returns what `decode` needs, such as node embeddings [nodes, channels].
        decode: function of the encoding and pairs [2, edges] -> scores [edges]. Items of the edges (see `EdgeSet`) are
            passed as keyword arguments.

    Raises:
        TypeError: an argument is not a function.

    Example:
        >>> import torch
        >>> from suffice.link import EdgeSet, audit
        >>> z = torch.eye(2)
        >>> score = encode_once(lambda: z * 2, lambda h, pairs: (h[pairs[0]] * h[pairs[1]]).sum(1))
        >>> score(torch.tensor([[0, 0], [0, 1]]))
        tensor([4., 0.])

    """
    check_callable("encode", encode)
    check_callable("decode", decode)
    return _EncodeOnce(encode, decode)


class _EncodeOnce:
    """See `encode_once`."""

    def __init__(self, encode: Callable[[], Any], decode: Callable[..., Any]) -> None:
        self._encode, self._decode = encode, decode

    def __call__(self, pairs: Any, **items: Any) -> Any:
        encoding = self._current_encoding()
        before = _versions(encoding)
        scores = self._decode(encoding, pairs, **items)
        if before != _versions(encoding) and (kept_of_all := _kept.get()):
            kept_of_all[id(self)].encodings.clear()  # the next batch must not get what decode has written into it
        return scores

    def _current_encoding(self) -> Any:
        kept_of_all = _kept.get()
        if kept_of_all is None:
            return self._encode_in_same_mode(self._find_modules())
        kept = kept_of_all.get(id(self))
        if kept is None:
            kept = kept_of_all[id(self)] = _Kept(self._find_modules())
        # An audit has two kinds of training mode. One encoding is enough for both: the encoder does not see the pairs.
        training = any(module.training for module in kept.modules)
        if training not in kept.encodings:
            kept.encodings[training] = self._encode_in_same_mode(kept.modules)
        return kept.encodings[training]

    def _find_modules(self) -> list[nn.Module]:
        found = find_modules([self._encode])
        return [] if found is None else list(found.modules())

    def _encode_in_same_mode(self, modules: list[nn.Module]) -> Any:
        modes = [module.training for module in modules]
        encoding = self._encode()
        for module, training in zip(modules, modes, strict=True):
            module.training = training
        return encoding


def _versions(encoding: object) -> list[int]:
    """Return a number for each tensor in an encoding, which changes when someone writes into the tensor."""
    return [
        tensor._version  # the only way to learn of it without a copy
        for _, tensor in tensors_in(encoding)
        if not tensor.is_inference()
    ]
