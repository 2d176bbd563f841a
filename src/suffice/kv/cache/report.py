"""What a cache kept: tokens, bytes and capacity by layer and head, as a table, a dict and a figure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from suffice.kv.cache.layer import CompressedLayer


@dataclass(frozen=True)
class HeadReport:
    """One KV head of one layer; tokens and bytes are summed over the rows of the batch, padding left out."""

    layer: int
    head: int
    tokens_seen: int
    tokens_kept: int
    bytes_full: int
    bytes_kept: int
    capacity_retained: float | None


def head_reports(layer: CompressedLayer) -> list[HeadReport]:
    """Return one report for each KV head of a layer that has seen tokens."""
    assert layer.storage is not None
    tokens_seen = len(layer.padding) * layer.seen - sum(layer.padding)
    kept = layer.storage.kept.sum(0).tolist()
    nbytes = layer.storage.nbytes_by_head
    shares = None if layer.capacity is None else layer.capacity.mean(0).tolist()
    return [
        HeadReport(
            layer=layer.index,
            head=layer.first_head + head,
            tokens_seen=tokens_seen,
            tokens_kept=kept[head],
            bytes_full=layer.bytes_full // layer.heads,
            bytes_kept=nbytes[head],
            capacity_retained=None if shares is None else shares[head],
        )
        for head in range(layer.heads)
    ]


@dataclass(frozen=True)
class CacheReport:
    """What a `CompressedCache` holds.

    Args:
        policy: name of the policy.
        heads: one entry for each compressed layer and KV head.
        batch: rows of the batch.
        bytes_full: bytes that the same cache without eviction would hold, sliding-window layers included.
        bytes_kept: bytes of all keys and values that the cache holds.
        bytes_index: bytes of the positions kept beside them.
        capacity_retained: share of the capacity that the kept entries carry, mean over layers, heads and
            rows; None if it was not measured.

    """

    policy: str
    heads: tuple[HeadReport, ...]
    batch: int
    bytes_full: int
    bytes_kept: int
    bytes_index: int
    capacity_retained: float | None

    @property
    def tokens_seen(self) -> int:
        """Tokens seen, of all rows."""
        return max((head.tokens_seen for head in self.heads), default=0)

    @property
    def tokens_kept(self) -> float:
        """Tokens kept, of all rows: mean over layers and heads."""
        return sum(head.tokens_kept for head in self.heads) / max(1, len(self.heads))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and lists, ready for JSON."""
        return {**asdict(self), "tokens_seen": self.tokens_seen, "tokens_kept": self.tokens_kept}

    def table(self) -> Table:
        """Return a rich table with a row for each layer."""
        from rich.table import Table

        table = Table(title=f"KV cache under {self.policy}: {self}")
        for column in ("layer", "tokens seen", "tokens kept", "MB kept", "MB full", "capacity kept"):
            table.add_column(column, justify="right")
        for layer in sorted({head.layer for head in self.heads}):
            heads = [head for head in self.heads if head.layer == layer]
            shares = [head.capacity_retained for head in heads if head.capacity_retained is not None]
            kept = sorted({head.tokens_kept for head in heads})
            table.add_row(
                str(layer),
                str(heads[0].tokens_seen),
                f"{kept[0]}" if len(kept) == 1 else f"{kept[0]}-{kept[-1]}",
                f"{sum(head.bytes_kept for head in heads) / 1e6:.2f}",
                f"{sum(head.bytes_full for head in heads) / 1e6:.2f}",
                f"{sum(shares) / len(shares):.1%}" if shares else "-",
            )
        return table

    def figure(self) -> Figure:
        """Return a matplotlib figure: tokens kept and capacity retained, by layer and head."""
        from suffice.report.figures import head_map

        panels = {"tokens kept": {(h.layer, h.head): float(h.tokens_kept) for h in self.heads}}
        shares = {(h.layer, h.head): h.capacity_retained for h in self.heads if h.capacity_retained is not None}
        if shares:
            panels["share of capacity retained"] = shares
        return head_map(panels, title=f"KV cache under {self.policy}")

    def __str__(self) -> str:
        if not self.heads:
            return "nothing seen yet"
        share = "" if self.capacity_retained is None else f", {self.capacity_retained:.1%} of the capacity"
        return (
            f"{self.tokens_kept:.0f} of {self.tokens_seen} tokens, "
            f"{self.bytes_kept / 1e6:.1f} of {self.bytes_full / 1e6:.1f} MB{share}"
        )
