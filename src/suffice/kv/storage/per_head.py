"""The base class of storages whose heads may keep different numbers of entries."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from suffice.kv.storage.base import Storage


class PerHeadStorage(Storage):
    """A storage whose heads may keep different numbers of entries, so that entries of all heads can compete.

    The column `priority`, if there is one, decides which entries one budget for all heads and layers keeps.
    """

    @abstractmethod
    def keep(self, kept: Tensor) -> PerHeadStorage:
        """Return a storage of some entries, without changing this one.

        Args:
            kept: indices of the kept entries in `entries`, long [batch, num_key_value_heads, width], ascending; −1 in
                empty slots.

        """

    @abstractmethod
    def row_priorities(self, row: int) -> Tensor:
        """Return the priorities of the entries of a row that compete for a global budget, float32 [entries]."""

    @abstractmethod
    def keep_by_row(self, masks: list[Tensor]) -> None:
        """Keep the entries of `row_priorities` for which a mask is True, and drop the others.

        Args:
            masks: for each row, bool, shaped like the result of `row_priorities`.

        """
