"""A link predictor made of an encoder over the message edges and a decoder over pairs."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from suffice.link.models.base import Encoding, LinkPredictor
from suffice.link.models.dot import Dot
from suffice.link.models.encoder import Encoder
from suffice.link.models.hadamard import HadamardMLP
from suffice.link.sparse.adjacency import Adjacency


class EncoderDecoder(LinkPredictor):
    """Logits of pairs of nodes."""

    uses_adjacency: ClassVar[bool] = False

    def __init__(self, encoder: Encoder, decoder: Dot | HadamardMLP) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, x: Tensor, messages: Tensor | Adjacency) -> Encoding:
        """Embed the nodes."""
        return Encoding(self.encoder(x, messages), x, messages)

    def edge_embedding(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the decoder's hidden layer, [edges, hidden]."""
        return self.decoder.hidden(encoding.nodes, pairs)

    def score(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Logits of the pairs, [edges]."""
        return self.decoder(encoding.nodes, pairs)
