"""NCN: embeddings summed over common neighbors, and the product of node embeddings (Wang et al. 2024, eq. 9)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from suffice.link.models.base import Encoding, LinkPredictor, mlp_block
from suffice.link.models.dropout import ByteDropout
from suffice.link.models.encoder import Encoder, EncoderModelSettings
from suffice.link.models.norms import make_norm
from suffice.link.models.registry import Preset, PublishedTraining, register_model
from suffice.link.sparse.adjacency import Adjacency, as_adjacency
from suffice.link.sparse.neighbors import Neighbors, common_neighbors, pool


class NCN(LinkPredictor):
    """Score a pair by lin(β · f(Σ_{k∈N(i)∩N(j)} h'_k) + g(h_i ⊙ h_j)), with h' = h + xlin(h).

    The modules of the formula are xlin: `node_mlp`, f: `common_mlp`, g: `product_mlp`, lin: `join_mlp` and `last`.

    Args:
        encoder: embeds the nodes (h).
        norm: normalization over pairs: `batch`, `layer`, `graph` or `none`.
        node_norm: normalization over nodes in xlin.
        dropout: probability that a channel of the perceptrons is dropped.
        two_layers: whether lin has a second hidden layer.

    """

    def __init__(
        self,
        encoder: Encoder,
        norm: str = "layer",
        node_norm: str = "layer",
        dropout: float = 0.0,
        *,
        two_layers: bool = False,
    ) -> None:
        super().__init__()
        hidden = encoder.out_channels

        def block(norm: str) -> nn.Sequential:
            return mlp_block(hidden, hidden, make_norm(norm, hidden), ByteDropout(dropout))

        self.encoder = encoder
        self.node_mlp = nn.Sequential(*block("none"), *block(node_norm))
        self.common_mlp = nn.Sequential(*block("none"), *block(norm))
        self.product_mlp = block(norm)
        self.join_mlp = nn.Sequential(*block(norm), *(block(norm) if two_layers else ()))
        self.beta = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(hidden, 1)

    @property
    def node_modules(self) -> tuple[nn.Module, ...]:
        """The modules that `encode` runs."""
        return self.encoder, self.node_mlp

    def encode(self, x: Tensor, edge_index: Tensor | Adjacency) -> Encoding:
        """Embed the nodes (h) and compute the values that are summed over neighbors (h')."""
        adjacency = as_adjacency(edge_index, x.size(0))
        h = self.encoder(x, adjacency)
        return Encoding(h, x, adjacency, h + self.node_mlp(h))

    def pool_neighbors(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the sum of h' over common neighbors of pairs [2, pairs]: [pairs, hidden]."""
        assert encoding.pooled is not None
        return pool(encoding.pooled, common_neighbors(encoding.adjacency, pairs))

    def edge_embedding(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the last hidden layer, [pairs, hidden]."""
        h = encoding.nodes
        common = self.common_mlp(self.pool_neighbors(encoding, pairs))
        product = self.product_mlp(h.index_select(0, pairs[0]) * h.index_select(0, pairs[1]))
        return self.join_mlp(common * self.beta + product)


def score_common_neighbors(
    model: NCN, encoding: Encoding, first_layer: Tensor, pairs: Tensor, neighbors: Neighbors
) -> Tensor:
    """Return NCN's logits without gradients for many pairs with known common neighbors: [pairs].

    The first layer of f is applied to nodes instead of pairs, and all pairs without common neighbors share one result.

    Args:
        model: in eval mode.
        encoding: of the graph.
        first_layer: first layer of f applied to h' of every node, without its bias, [nodes, hidden].
        pairs: long [2, pairs].
        neighbors: common neighbors of the pairs.

    """
    layer = model.common_mlp[0]
    assert isinstance(layer, nn.Linear)
    with_neighbors = (neighbors.offsets.diff() > 0).nonzero().flatten()
    offsets = torch.cat([neighbors.offsets[:-1][with_neighbors], neighbors.offsets[-1:]])
    owner = torch.repeat_interleave(offsets.diff())
    sums = pool(first_layer, Neighbors(neighbors.node, owner, offsets))
    sums = torch.cat([sums, first_layer.new_zeros(1, first_layer.size(1))])  # the last row: no common neighbor
    hidden = model.common_mlp[1:](sums + layer.bias)
    common = hidden[-1].repeat(pairs.size(1), 1)
    common[with_neighbors] = hidden[:-1]
    h = encoding.nodes
    product = model.product_mlp(h.index_select(0, pairs[0]) * h.index_select(0, pairs[1]))
    return model.last(model.join_mlp(common.mul_(model.beta).add_(product))).squeeze(-1)


@register_model("ncn")
@dataclass(frozen=True, kw_only=True)
class NCNSettings(EncoderModelSettings):
    """Options of `NCN`.

    `encoder_norm` is also the norm over nodes in xlin (see `NCN`). With the encoder `pure`, only xlin has this norm and
    the encoder has none, as in the authors' code.

    Args:
        two_layers: whether the pair perceptron has a second hidden layer.

    """

    two_layers: bool = False

    def create(self, in_channels: int) -> NCN:
        """Return the model."""
        encoder = self.create_ncn_encoder(in_channels)
        return NCN(encoder, self.decoder_norm, self.encoder_norm, self.dropout, two_layers=self.two_layers)

    def create_ncn_encoder(self, in_channels: int) -> Encoder:
        """Return the encoder, without a norm if it is `pure`."""
        return self.create_encoder(in_channels, norm="none" if self.encoder == "pure" else None)

    @classmethod
    def published(cls, data: str) -> Preset:
        """Return the authors' settings (GraphPKU/NeuralCommonNeighbor).

        Dropout of edges and a separate learning rate of the encoder are not supported: the learning rate is the one of
        the predictor.
        """
        row = _PUBLISHED.get(data, _PUBLISHED["Cora"])
        input_dropout, encoder_dropout, output_dropout, dropout, two_layers, learning_rate, batch_size = row
        settings = NCNSettings(
            hidden=256,
            encoder="pure",
            layers=1,
            encoder_norm="layer",
            decoder_norm="layer",
            input_dropout=input_dropout,
            encoder_dropout=encoder_dropout,
            output_dropout=output_dropout,
            dropout=dropout,
            two_layers=two_layers,
        )
        return Preset(settings, PublishedTraining(learning_rate=learning_rate, batch_size=batch_size))


# input_dropout, encoder_dropout, output_dropout, dropout, two_layers, learning_rate, batch_size. The batch size
# counts positives and negatives; that of the authors counts positives only.
_PUBLISHED = {
    "Cora": (0.7, 0.05, 0.3, 0.05, False, 2.4e-3, 2304),
    "CiteSeer": (0.4, 0.75, 0.0, 0.55, True, 7.8e-3, 768),
    "PubMed": (0.3, 0.1, 0.0, 0.05, False, 2e-3, 4096),
}
