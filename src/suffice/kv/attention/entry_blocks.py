"""Division of the quantized entries of all heads into blocks that are dequantized together."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class EntryPart:
    """Entries of one head in a block, or all entries of several heads of equal length.

    Args:
        heads: range of the heads.
        columns: range of the entries within each head.
        start: index of the first entry within the block.
        block_start: index of the first entry of the block.

    """

    heads: slice
    columns: slice
    start: int
    block_start: int

    @property
    def num_heads(self) -> int:
        """Number of heads."""
        return self.heads.stop - self.heads.start

    @property
    def length(self) -> int:
        """Number of entries of each head."""
        return self.columns.stop - self.columns.start

    def of(self, block: Tensor) -> Tensor:
        """Return the vectors of the part, [heads, entries, dim], from those of the block, [entries, dim]."""
        return block.narrow(0, self.start, self.num_heads * self.length).view(self.num_heads, self.length, -1)

    def of_block(self, block: Tensor) -> Tensor:
        """Return the numbers of the part, [groups * heads, entries, size], from the block's, [groups, entries, size].

        They are copied only if the part has several heads and the block has other parts.
        """
        own = block.narrow(1, self.start, self.num_heads * self.length)
        return own if self.num_heads == 1 else own.reshape(-1, self.length, block.shape[-1])

    def of_layer(self, scales: Tensor) -> Tensor:
        """Return the scales of the part, [groups, heads, entries], from those of all entries, [groups, entries]."""
        own = scales.narrow(1, self.block_start + self.start, self.num_heads * self.length)
        return own.view(-1, self.num_heads, self.length)

    def of_heads(self, x: Tensor) -> Tensor:
        """Return the items of the part's heads, [groups * heads, …], from those of all heads, [groups, heads, …]."""
        return x[:, self.heads].flatten(0, 1)


@dataclass(frozen=True)
class EntryBlock:
    """Entries that are dequantized together.

    Args:
        entries: range of the entries among those of all heads.
        parts: the entries by head.

    """

    entries: slice
    parts: tuple[EntryPart, ...]


@functools.lru_cache(maxsize=1024)
def divide_entries(lengths: tuple[int, ...], size: int) -> tuple[EntryBlock, ...]:
    """Divide the entries of all heads into blocks. Only heads with more than `size` entries are divided.

    Args:
        lengths: number of entries of each head.
        size: largest number of entries of a block.

    """
    blocks: list[EntryBlock] = []
    start, parts, used = 0, list[EntryPart](), 0

    def end_block() -> None:
        nonlocal start, parts, used
        blocks.append(EntryBlock(slice(start, start + used), tuple(parts)))
        start, parts, used = start + used, [], 0

    for head, length in enumerate(lengths):
        if parts and used + length > size:
            end_block()
        for first in range(0, length, size):
            count = min(size, length - first)
            earlier = parts[-1] if parts else None
            if earlier is not None and earlier.columns == slice(0, length) and earlier.heads.stop == head:
                parts[-1] = replace(earlier, heads=slice(earlier.heads.start, head + 1))
            else:
                parts.append(EntryPart(slice(head, head + 1), slice(first, first + count), used, start))
            used += count
            if first + count < length:
                end_block()
    if parts:
        end_block()
    return tuple(blocks)
