"""Normalisation layers by name, for encoders (over nodes) and decoders (over the edge batch)."""

from __future__ import annotations

from torch import nn
from torch_geometric.nn import BatchNorm, GraphNorm

NORMS = ("batch", "layer", "graph", "none")


def make_norm(norm: str, channels: int) -> nn.Module:
    """Return a normalisation layer over rows of `channels` features.

    `batch` and `graph` mix the rows they are given: nodes in an encoder, the edge batch in a decoder.

    Raises:
        ValueError: there is no such norm.

    """
    if norm == "batch":
        return BatchNorm(channels)
    if norm == "layer":
        return nn.LayerNorm(channels)
    if norm == "graph":
        return GraphNorm(channels)
    if norm == "none":
        return nn.Identity()
    raise ValueError(f"norm is {norm!r}; accepted: {', '.join(NORMS)}")
