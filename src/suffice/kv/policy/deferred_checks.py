"""What must hold of numbers on a GPU, asked all at once: the program waits for the device each time it is asked."""

from __future__ import annotations

import torch
from torch import Tensor


class Verdicts:
    """Conditions on a layer's numbers and the errors that they raise, collected until `settle` looks at them."""

    def __init__(self) -> None:
        self._found: list[tuple[Tensor, Exception]] = []

    def require(self, right: Tensor, error: Exception) -> None:
        """Note a condition, a bool of no dimensions, and what is raised unless it holds."""
        self._found.append((right, error))

    def settle(self) -> None:
        """Raise the error of the first condition that does not hold."""
        found, self._found = self._found, []
        if not found:
            return
        held = torch.stack([right for right, _ in found]).tolist()
        for right, (_, error) in zip(held, found, strict=True):
            if not right:
                raise error
