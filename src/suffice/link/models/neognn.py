"""Neo-GNN: a mixture of the overlap of neighborhoods and the score of a GNN (Yun et al. 2021, eq. 5 to 9)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suffice.link.models.base import Encoding, LinkPredictor
from suffice.link.models.encoder import Encoder, EncoderModelSettings
from suffice.link.models.hadamard import HadamardMLP
from suffice.link.models.norms import make_norm
from suffice.link.models.registry import Preset, PublishedTraining, register_model
from suffice.link.sparse.adjacency import Adjacency, as_adjacency
from suffice.link.sparse.overlap import overlap


class NeoGNN(LinkPredictor):
    """Mix the probabilities σ(g(Σ_k Ã_ik Ã_jk f(s_k)²)) and those of a GNN, with learned weights.

    Here Ã = A + βA² and s_i = Σ_j f_edge(A_ij). The modules of the formula are f_edge: `edge_mlp`, f: `node_mlp`,
    g: `overlap_mlp` and `overlap_last`. Scores are the logits of the mixture. Training adds the losses of both parts to
    the loss of the mixture.

    Args:
        encoder: embeds the nodes.
        norm: normalization over pairs, in g and in the decoder of the GNN.
        dropout: probability that a hidden channel of the decoder is dropped.
        beta: weight of walks of length two.
        channels: number of hidden channels of f_edge, and of f and g.

    """

    def __init__(
        self,
        encoder: Encoder,
        norm: str = "none",
        dropout: float = 0.0,
        *,
        beta: float = 0.1,
        channels: tuple[int, int] = (8, 128),
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = HadamardMLP(encoder.out_channels, encoder.out_channels, norm, dropout)
        self.edge_mlp = nn.Sequential(nn.Linear(1, channels[0]), nn.ReLU(), nn.Linear(channels[0], 1))
        self.node_mlp = nn.Sequential(nn.Linear(1, channels[1]), nn.ReLU(), nn.Linear(channels[1], 1))
        self.overlap_mlp = nn.Sequential(nn.Linear(1, channels[1]), make_norm(norm, channels[1]), nn.ReLU())
        self.overlap_last = nn.Linear(channels[1], 1)
        self.mixture = nn.Parameter(torch.zeros(2))
        self.beta = beta

    def encode(self, x: Tensor, edge_index: Tensor | Adjacency) -> Encoding:
        """Embed the nodes."""
        adjacency = as_adjacency(edge_index, x.size(0))
        return Encoding(self.encoder(x, adjacency), x, adjacency)

    def edge_embedding(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the hidden layers of the decoder and of g, concatenated, [pairs, hidden + 128]."""
        return torch.cat([self.decoder.edge_embedding(encoding.nodes, pairs), self._overlap(encoding, pairs)], dim=1)

    def score(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the logits of the mixture, [pairs]."""
        return self._logits(encoding, pairs)[0]

    def training_logits(self, x: Tensor, edge_index: Tensor | Adjacency, pairs: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of the mixture, of the overlap and of the GNN, each [pairs]."""
        return self._logits(self.encode(x, edge_index), pairs)

    def _overlap(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        # The entries of A are 0 or 1: s_k is the degree of k times f_edge(1).
        edge_weight = self.edge_mlp(encoding.nodes.new_ones(1, 1))
        degree = encoding.adjacency.degree.to(encoding.nodes.dtype).unsqueeze(-1)
        node_weight = self.node_mlp(degree * edge_weight).squeeze(-1) ** 2
        return self.overlap_mlp(overlap(encoding.adjacency, pairs, node_weight, self.beta).unsqueeze(-1))

    def _logits(self, encoding: Encoding, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.edge_embedding(encoding, pairs)
        features, structure = hidden.split([self.decoder.last.in_features, self.overlap_last.in_features], dim=1)
        gnn = self.decoder.last(self.decoder.dropout(features)).squeeze(-1)
        structural = self.overlap_last(structure).squeeze(-1)
        log_shares = F.log_softmax(self.mixture, dim=0)
        log_edge = torch.logaddexp(log_shares[0] + F.logsigmoid(structural), log_shares[1] + F.logsigmoid(gnn))
        log_no_edge = torch.logaddexp(log_shares[0] + F.logsigmoid(-structural), log_shares[1] + F.logsigmoid(-gnn))
        return log_edge - log_no_edge, structural, gnn


@register_model("neognn")
@dataclass(frozen=True, kw_only=True)
class NeoGNNSettings(EncoderModelSettings):
    """Options of `NeoGNN`."""

    def create(self, in_channels: int) -> NeoGNN:
        """Return the model."""
        return NeoGNN(self.create_encoder(in_channels), self.decoder_norm, self.dropout)

    @classmethod
    def published(cls, data: str) -> Preset:
        """Return the authors' settings for ogbl-collab (seongjunyun/Neo-GNNs).

        They publish no settings for the other data sets. The learning rate is Adam's default. There are
        two layers because three give a lower validation metric.
        """
        settings = cls(hidden=256, layers=2, encoder_norm="none", decoder_norm="none")
        # The batch size counts positives and negatives; that of the authors counts positives only.
        return Preset(settings, PublishedTraining(learning_rate=1e-3, batch_size=2048, clip=1.0))
