"""Report of what a cache keeps: tokens, bytes and capacity by layer and head, as a table, a dict and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from suffice.kv.cache.layer_report import HeadReport, LayerReport
from suffice.kv.storage.quantization import Bits, format_bits, shortest_bits

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclass(frozen=True)
class CacheReport:
    """What a `CompressedCache` or a `CrossAttentionCache` holds.

    Args:
        policy: name of the policy.
        heads: one report for each compressed layer and KV head.
        batch: number of rows of the batch.
        bytes_full: bytes that the same cache would hold without eviction, including layers that are not compressed.
        bytes_kept: bytes of all keys and values that the cache holds.
        bytes_index: bytes of everything else: positions of the entries, the numbers that repair adds to their logits,
            spare slots, and what the policy remembers for the next eviction.
        capacity_retained: share of the capacity that the kept entries carry, averaged over layers, heads and rows; None
            if it was not measured.
        bytes_limit: limit on `bytes`; None for no limit.
        heads_repaired: number of heads that have kept a repair of their entries, at any eviction; None without repair.
        repair_error_before: relative error of the outputs of held-out queries before the last repair that was kept,
            averaged over heads; None without repair.
        repair_error_after: the same after the repair.

    """

    policy: str
    heads: tuple[HeadReport, ...]
    batch: int
    bytes_full: int
    bytes_kept: int
    bytes_index: int
    capacity_retained: float | None
    bytes_limit: int | None = None
    heads_repaired: int | None = None
    repair_error_before: float | None = None
    repair_error_after: float | None = None

    @classmethod
    def from_layers(cls, policy: str, layers: Sequence[LayerReport], bytes_uncompressed: int = 0) -> CacheReport:
        """Return the report of a cache.

        Args:
            policy: name of the policy.
            layers: reports of the compressed layers.
            bytes_uncompressed: bytes of the keys and values of all other layers.

        """
        heads = tuple(head for layer in layers for head in layer.heads)
        shares = [share for head in heads if (share := head.capacity_retained) is not None]
        repairs = [repair for head in heads if (repair := head.repair) is not None]
        limits = [limit for layer in layers if (limit := layer.bytes_limit) is not None]
        return cls(
            policy=policy,
            heads=heads,
            batch=max((layer.num_rows for layer in layers), default=0),
            bytes_full=bytes_uncompressed + sum(layer.bytes_full for layer in layers),
            bytes_kept=bytes_uncompressed + sum(layer.bytes_kept for layer in layers),
            bytes_index=sum(layer.bytes_index for layer in layers),
            capacity_retained=_mean(shares),
            bytes_limit=bytes_uncompressed + sum(limits) if len(limits) == len(layers) else None,
            heads_repaired=sum(repair.is_kept for repair in repairs) if repairs else None,
            repair_error_before=_mean([error for repair in repairs if (error := repair.error_before) is not None]),
            repair_error_after=_mean([error for repair in repairs if (error := repair.error_after) is not None]),
        )

    @property
    def bytes(self) -> int:
        """Bytes of everything that the cache holds: the sum of `bytes_kept` and `bytes_index`."""
        return self.bytes_kept + self.bytes_index

    @property
    def tokens_seen(self) -> int:
        """Number of tokens seen, over all rows."""
        return max((head.tokens_seen for head in self.heads), default=0)

    @property
    def tokens_kept(self) -> float:
        """Number of entries kept, over all rows; averaged over layers and heads."""
        return sum(head.tokens_kept for head in self.heads) / max(1, len(self.heads))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and lists, ready for JSON."""
        sums = {"bytes": self.bytes, "tokens_seen": self.tokens_seen, "tokens_kept": self.tokens_kept}
        return {**asdict(self), **sums}

    def table(self) -> Table:
        """Return a rich table with one row for each layer."""
        from rich.table import Table

        table = Table(title=f"KV cache, policy {self.policy}: {self}")
        is_quantized = any(head.bits is not None for head in self.heads)
        columns = ("layer", "tokens seen", "tokens kept", "MB kept", "MB full", "capacity kept")
        for column in (*columns, "bits", "key error", "value error") if is_quantized else columns:
            # One word on each line, because rich cuts cells off if a table is wider than the terminal.
            table.add_column(column.replace(" ", "\n"), justify="right")
        for layer in sorted({head.layer for head in self.heads}):
            heads = [head for head in self.heads if head.layer == layer]
            shares = [head.capacity_retained for head in heads if head.capacity_retained is not None]
            kept = sorted({head.tokens_kept for head in heads})
            quantization = describe_quantization(heads) if is_quantized else ()
            table.add_row(
                str(layer),
                str(heads[0].tokens_seen),
                f"{kept[0]}" if len(kept) == 1 else f"{kept[0]}-{kept[-1]}",
                f"{sum(head.bytes_kept for head in heads) / 1e6:.2f}",
                f"{sum(head.bytes_full for head in heads) / 1e6:.2f}",
                f"{sum(shares) / len(shares):.1%}" if shares else "-",
                *quantization,
            )
        return table

    def figure(self) -> Figure:
        """Return a matplotlib figure of tokens kept and capacity retained, by layer and head."""
        from suffice.report import head_heatmap

        panels = {"tokens kept": {(head.layer, head.head): float(head.tokens_kept) for head in self.heads}}
        shares = {(h.layer, h.head): h.capacity_retained for h in self.heads if h.capacity_retained is not None}
        if shares:
            panels["share of capacity retained"] = shares
        return head_heatmap(panels, title=f"KV cache, policy {self.policy}")

    def __str__(self) -> str:
        if not self.heads:
            return "no tokens seen yet"
        share = "" if self.capacity_retained is None else f", {self.capacity_retained:.1%} of the capacity"
        if self.heads_repaired is not None:
            share += f", {self.heads_repaired} of {len(self.heads)} heads repaired"
        if self.bytes_limit is not None:
            share += f", {self.bytes / 1e6:.1f} of {self.bytes_limit / 1e6:.1f} MB allowed"
        bits = sorted({head.bits for head in self.heads if head.bits and head.key_error is not None}, reverse=True)
        stored = f" ({' or '.join(format_bits(shortest_bits(pair)) for pair in bits)} bits)" if bits else ""
        return (
            f"{self.tokens_kept:.0f} of {self.tokens_seen} tokens{stored}, "
            f"{self.bytes_kept / 1e6:.1f} of {self.bytes_full / 1e6:.1f} MB{share}"
        )


def _mean(numbers: Sequence[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None


def stored_bits(report: CacheReport) -> Bits | None:
    """Return the bits of the quantized entries of the first compressed layer; None if it has none."""
    layer = [head for head in report.heads if head.layer == report.heads[0].layer]
    is_quantized = any(head.key_error is not None for head in layer)
    return shortest_bits(layer[0].bits) if is_quantized else None


def describe_quantization(heads: Sequence[HeadReport]) -> tuple[str, str, str]:
    """Return the bits of a layer's heads and their largest relative errors of keys and of values."""
    bits = heads[0].bits
    key_errors = [head.key_error for head in heads if head.key_error is not None]
    value_errors = [head.value_error for head in heads if head.value_error is not None]
    return (
        "-" if bits is None else f"{bits[0]}" if bits[0] == bits[1] else f"{bits[0]}, {bits[1]}",
        f"{max(key_errors):.1%}" if key_errors else "-",
        f"{max(value_errors):.1%}" if value_errors else "-",
    )
