"""A link predictor made of an encoder over the graph and a decoder over pairs of node embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from suffice.link.models.base import Encoding, LinkPredictor
from suffice.link.models.decoder import DECODERS, Decoder
from suffice.link.models.encoder import Encoder, EncoderModelSettings
from suffice.link.models.registry import register_model
from suffice.link.sparse.adjacency import Adjacency


class EncoderDecoder(LinkPredictor):
    """Score a pair by a decoder of its two node embeddings, as a graph autoencoder does.

    Args:
        encoder: embeds the nodes.
        decoder: scores pairs of embeddings.

    """

    uses_adjacency: ClassVar[bool] = False

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, x: Tensor, edge_index: Tensor | Adjacency) -> Encoding:
        """Embed the nodes."""
        return Encoding(self.encoder(x, edge_index), x, edge_index)

    def edge_embedding(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the input of the decoder's last layer, [pairs, edge channels]."""
        return self.decoder.edge_embedding(encoding.nodes, pairs)

    def score(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return logits, [pairs]."""
        return self.decoder(encoding.nodes, pairs)


@register_model("encoder-decoder")
@dataclass(frozen=True, kw_only=True)
class EncoderDecoderSettings(EncoderModelSettings):
    """Options of `EncoderDecoder`.

    Args:
        decoder: `dot`, `hadamard` or `concat`.

    """

    decoder: str = "hadamard"

    def __post_init__(self) -> None:
        super().__post_init__()
        DECODERS.check("decoder", self.decoder)

    def create(self, in_channels: int) -> EncoderDecoder:
        """Return the model."""
        encoder = self.create_encoder(in_channels)
        return EncoderDecoder(
            encoder, DECODERS.find(self.decoder)(self.hidden, self.hidden, self.decoder_norm, self.dropout)
        )
