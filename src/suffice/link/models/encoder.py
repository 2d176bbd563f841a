"""Base classes of all encoders, which compute node embeddings from the features and the edges of a graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from suffice.arguments import check_int, check_number
from suffice.link.models.dropout import ByteDropout, drop_features
from suffice.link.models.named_parts import NamedParts
from suffice.link.models.norms import NORMS, make_norm
from suffice.link.models.registry import ModelSettings
from suffice.link.sparse.adjacency import Adjacency


class Encoder(nn.Module, ABC):
    """Base class of all encoders; an encoder defines `embed` and is registered by `ENCODERS.register`.

    Args:
        in_channels: number of features of a node.
        hidden: number of channels of every layer and of the embedding.
        layers: number of layers.
        norm: normalization over nodes after every layer: `batch`, `layer`, `graph` or `none`.
        dropout: probability that a channel is dropped between layers in training.
        input_dropout: probability that a feature is dropped in training.
        output_dropout: probability that a channel of the embedding is dropped in training.
        linear: leave out the ReLU between layers.

    Raises:
        ValueError: `layers` is below 1, or `linear` is True and the encoder has no ReLU to leave out.

    """

    has_activation: ClassVar[bool] = True  # whether there is a ReLU between layers
    accepts_sparse_features: ClassVar[bool] = False  # whether `x` may be a sparse CSR tensor

    def __init__(
        self,
        in_channels: int,
        hidden: int = 64,
        layers: int = 2,
        norm: str = "batch",
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        output_dropout: float = 0.0,
        *,
        linear: bool = False,
    ) -> None:
        super().__init__()
        check_int("layers", layers, 1)
        if linear and not self.has_activation:
            raise ValueError(f"linear must be False for {type(self).__name__}, which has no ReLU, got True")
        self.out_channels = hidden
        self.is_linear = linear or not self.has_activation
        self.create_layers(in_channels, hidden, layers)
        self.norms = nn.ModuleList(make_norm(norm, hidden) for _ in range(layers))
        self.input_dropout = ByteDropout(input_dropout)
        self.dropout = ByteDropout(dropout)
        self.output_dropout = ByteDropout(output_dropout)

    @abstractmethod
    def create_layers(self, in_channels: int, hidden: int, layers: int) -> None:
        """Create the modules and parameters of the layers; the base class creates norms and dropouts."""

    @abstractmethod
    def embed(self, x: Tensor, edge_index: Tensor | Adjacency) -> Tensor:
        """Return node embeddings [nodes, hidden] of features [nodes, in_channels] after dropout."""

    def forward(self, x: Tensor, edge_index: Tensor | Adjacency) -> Tensor:
        """Embed the nodes.

        Args:
            x: features, [nodes, in_channels].
            edge_index: message-passing edges in both directions, long [2, edges], or an adjacency.

        Returns:
            Node embeddings, [nodes, hidden].

        """
        return self.output_dropout(self.embed(drop_features(self.input_dropout, x), edge_index))


class ConvolutionalEncoder(Encoder):
    """Base class of encoders that stack convolutions.

    Each convolution is followed by a norm and, except for the last one, by ReLU and dropout. A subclass defines
    `create_convolution`, and overrides `convolve` if the convolution is not called with features and edge index.
    """

    def create_layers(self, in_channels: int, hidden: int, layers: int) -> None:
        """Create the convolutions."""
        sizes = [in_channels] + [hidden] * layers
        self.convolutions = nn.ModuleList(self.create_convolution(size, out) for size, out in pairwise(sizes))

    @abstractmethod
    def create_convolution(self, in_channels: int, out_channels: int) -> nn.Module:
        """Return one convolution."""

    def convolve(self, convolution: nn.Module, x: Tensor, edge_index: Tensor | Adjacency) -> Tensor:
        """Apply one convolution to x [nodes, in_channels]: [nodes, out_channels]."""
        return convolution(x, edge_index.edge_index if isinstance(edge_index, Adjacency) else edge_index)

    def embed(self, x: Tensor, edge_index: Tensor | Adjacency) -> Tensor:
        """Return node embeddings, [nodes, hidden]."""
        last = len(self.convolutions) - 1
        for number, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = norm(self.convolve(convolution, x, edge_index))
            if number < last:
                x = self.dropout(x if self.is_linear else torch.relu(x))
        return x


ENCODERS: NamedParts[type[Encoder]] = NamedParts("encoder")


def encoders() -> dict[str, type[Encoder]]:
    """Return every encoder by name."""
    return ENCODERS.entries()


@dataclass(frozen=True, kw_only=True)
class EncoderModelSettings(ModelSettings):
    """Options of the models that have an encoder: the base class of their settings.

    Args:
        encoder: `gcn`, `sage` or `pure` (propagation without weights).
        layers: number of layers of the encoder.
        encoder_norm: normalization over nodes: `batch`, `layer`, `graph` or `none`.
        encoder_dropout: probability that a channel is dropped between the encoder's layers; `dropout` if None.
        input_dropout: probability that a feature is dropped.
        output_dropout: probability that a channel of the node embedding is dropped.
        linear: leave out the ReLU between the encoder's layers; `pure` has none.

    """

    encoder: str = "gcn"
    layers: int = 2
    encoder_norm: str = "batch"
    encoder_dropout: float | None = None
    input_dropout: float = 0.0
    output_dropout: float = 0.0
    linear: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        ENCODERS.check("encoder", self.encoder)
        NORMS.check("encoder_norm", self.encoder_norm)
        check_int("layers", self.layers, 1)
        for option in ("encoder_dropout", "input_dropout", "output_dropout"):
            if getattr(self, option) is not None:
                check_number(option, getattr(self, option), minimum=0, below=1)
        if self.linear and not ENCODERS.find(self.encoder).has_activation:
            raise ValueError(f"linear must be False with encoder {self.encoder!r}, which has no ReLU, got True")

    def create_encoder(self, in_channels: int, norm: str | None = None) -> Encoder:
        """Return the encoder, with `encoder_norm` unless another norm is given."""
        return ENCODERS.find(self.encoder)(
            in_channels,
            self.hidden,
            self.layers,
            self.encoder_norm if norm is None else norm,
            self.dropout if self.encoder_dropout is None else self.encoder_dropout,
            self.input_dropout,
            self.output_dropout,
            linear=self.linear,
        )
