"""ELPH: a GNN combined with sketched counts of nodes by distance (Chamberlain et al. 2023, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from suffice.link.models.base import Encoding
from suffice.link.models.encoder import Encoder, EncoderModelSettings
from suffice.link.models.registry import Preset, register_model
from suffice.link.models.sketched import PUBLISHED_TRAINING, SketchHead, SketchModel, check_hops
from suffice.link.sparse.adjacency import Adjacency, as_adjacency


class ELPH(SketchModel):
    """Score a pair by its counts of nodes by distance and the product of its node embeddings.

    Args:
        encoder: embeds the nodes.
        norm: normalization over pairs: `batch`, `layer`, `graph` or `none`.
        dropout: probability that a channel is dropped.
        hops: radius of the sketched neighborhoods, 1 to 3.

    """

    def __init__(self, encoder: Encoder, norm: str = "batch", dropout: float = 0.0, *, hops: int = 2) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = SketchHead(hops, encoder.out_channels, norm, dropout)
        self.last = nn.Linear(self.head.out_channels, 1)

    def encode(self, x: Tensor, edge_index: Tensor | Adjacency) -> Encoding:
        """Embed the nodes."""
        adjacency = as_adjacency(edge_index, x.size(0))
        return Encoding(self.encoder(x, adjacency), x, adjacency)

    def product(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return z_i ⊙ z_j, [pairs, hidden]."""
        z = encoding.nodes
        return z.index_select(0, pairs[0]) * z.index_select(0, pairs[1])


@register_model("elph")
@dataclass(frozen=True, kw_only=True)
class ELPHSettings(EncoderModelSettings):
    """Options of `ELPH`.

    Args:
        hops: radius of the neighborhoods that are counted, 1 to 3.

    """

    hops: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hops(self.hops)

    def create(self, in_channels: int) -> ELPH:
        """Return the model."""
        return ELPH(self.create_encoder(in_channels), self.decoder_norm, self.dropout, hops=self.hops)

    @classmethod
    def published(cls, data: str) -> Preset:
        """Return the authors' settings (melifluos/subgraph-sketching); their GNN has no ReLU."""
        hops, dropout = (3, 0.2) if data == "PubMed" else (2, 0.5)
        settings = cls(hidden=1024, dropout=dropout, hops=hops, encoder_norm="none", decoder_norm="batch", linear=True)
        return Preset(settings, PUBLISHED_TRAINING)
