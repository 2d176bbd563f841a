"""A compressed layer whose keys and values are also read by later layers, which have none of their own (Gemma 3n)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from suffice.kv.attention.call import AttentionCall, run_attention
from suffice.kv.backend.triton_backend import choose_backend
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.storage.base import Storage


class SourceLayer(CompressedLayer):
    """A layer whose entries later layers read too.

    Within a forward pass, all of them read the same entries: those before the eviction of the pass. The entries are
    scored by the queries of this layer, because models may compute the later layers for the last token only.

    Args:
        arguments: see `CompressedLayer`.

    """

    _readable: Storage | None  # what later layers read; None if they read what the model passes

    def __init__(self, **arguments: Any) -> None:
        self._readable = None
        super().__init__(**arguments)

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Compute an attention call of this layer or of a later one."""
        if self.owns(call):
            return super().attend(call)
        if self._readable is None:
            return run_attention(call)
        return self._readable.attend(call.last_keys(), choose_backend(call.query, call.key, call.value))

    def pre_attention(self, call: AttentionCall) -> None:
        """Check an attention call of this layer, and store its new tokens."""
        super().pre_attention(call)
        # A copy keeps its entries when this layer evicts.
        self._readable = self.storage if self.storage is None or self._plan is None else self.storage.copy()

    def end_attention(self, call: AttentionCall | None = None) -> None:
        """Do nothing: later layers read the entries too."""

    def end_pass(self) -> None:
        """Free the entries that later layers have read in a forward pass."""
        self._readable = None
        super().end_attention()
