"""Normalization layers by name, for encoders (over nodes) and decoders (over the edge batch)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch_geometric.nn import BatchNorm, GraphNorm

from suffice.link.models.named_parts import NamedParts

Norm = Callable[[int], nn.Module]  # number of channels -> layer over rows [rows, channels]

NORMS: NamedParts[Norm] = NamedParts("norm")
# `batch` and `graph` mix the rows of their input: nodes in an encoder, the edges of a batch in a decoder.
NORMS.register("batch")(BatchNorm)
NORMS.register("layer")(nn.LayerNorm)
NORMS.register("graph")(GraphNorm)
NORMS.register("none")(nn.Identity)


def norms() -> dict[str, Norm]:
    """Return every normalization by name."""
    return NORMS.entries()


def make_norm(name: str, channels: int) -> nn.Module:
    """Return a normalization layer over rows [rows, channels].

    Raises:
        ValueError: there is no such norm.

    """
    return NORMS.find(name)(channels)
