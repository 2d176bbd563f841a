"""Conditions on tensors that are checked together, because each check waits for the GPU."""

from __future__ import annotations

import torch
from torch import Tensor


class DeferredChecks:
    """Collects conditions and their errors; `raise_if_failed` reads all conditions with one synchronization."""

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, Exception]] = []

    def require(self, condition: Tensor, error: Exception) -> None:
        """Record a condition (bool tensor without dimensions) and the error to raise if it does not hold."""
        self._pending.append((condition, error))

    def raise_if_failed(self) -> None:
        """Raise the error of the first recorded condition that does not hold, and forget all of them."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        holds = torch.stack([condition for condition, _ in pending]).tolist()
        for condition_holds, (_, error) in zip(holds, pending, strict=True):
            if not condition_holds:
                raise error
