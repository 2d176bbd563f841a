"""Neo-GNN: overlap of weighted neighbourhoods, mixed with a GNN's score (Yun et al. 2021, eq. 5 to 9)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suffice.link.models.base import Encoding, LinkPredictor
from suffice.link.models.encoder import Encoder
from suffice.link.models.hadamard import HadamardMLP
from suffice.link.models.norms import make_norm
from suffice.link.sparse.adjacency import Adjacency
from suffice.link.sparse.overlap import overlap


class NeoGNN(LinkPredictor):
    """Mix σ(g(Σ_k Ã_ik Ã_jk f(s_k)²)) and a GNN's probability by a learned softmax; Ã = A + βA², s = Σ f_edge(A).

    The logit of the mixture is returned. In training the losses of both parts are added to the mixture's.

    Args:
        encoder: of the nodes.
        norm: over pairs, in g and in the perceptron behind the GNN.
        dropout: share of channels dropped in that perceptron.
        beta: weight of two steps.
        channels: hidden channels of f_edge, and of f and g.

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

    def encode(self, x: Tensor, messages: Tensor | Adjacency) -> Encoding:
        """Embed the nodes."""
        graph = Encoding(x, x, messages).graph
        return Encoding(self.encoder(x, graph), x, graph)

    def edge_embedding(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return both hidden layers side by side, the GNN's first, [edges, hidden + 128]."""
        return torch.cat([self.decoder.hidden(encoding.nodes, pairs), self._overlap(encoding, pairs)], dim=1)

    def score(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the mixture's logits, [edges]."""
        return self._scores(encoding, pairs)[0]

    def training_logits(self, x: Tensor, edge_index: Tensor | Adjacency, pairs: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of the mixture, of the overlap and of the GNN."""
        return self._scores(self.encode(x, edge_index), pairs)

    def _overlap(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        # A is 0 or 1, so that every edge adds the same f_edge(1).
        each = self.edge_mlp(encoding.nodes.new_ones(1, 1))
        size = encoding.graph.degree.to(encoding.nodes.dtype).unsqueeze(-1)
        weight = self.node_mlp(size * each).squeeze(-1) ** 2
        return self.overlap_mlp(overlap(encoding.graph, pairs, weight, self.beta).unsqueeze(-1))

    def _scores(self, encoding: Encoding, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.edge_embedding(encoding, pairs)
        features, structure = hidden.split([self.decoder.last.in_features, self.overlap_last.in_features], dim=1)
        gnn = self.decoder.last(self.decoder.dropout(features)).squeeze(-1)
        structural = self.overlap_last(structure).squeeze(-1)
        shares = F.log_softmax(self.mixture, dim=0)
        yes = torch.logaddexp(shares[0] + F.logsigmoid(structural), shares[1] + F.logsigmoid(gnn))
        no = torch.logaddexp(shares[0] + F.logsigmoid(-structural), shares[1] + F.logsigmoid(-gnn))
        return yes - no, structural, gnn
