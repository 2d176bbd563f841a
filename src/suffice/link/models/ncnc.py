"""NCNC: NCN whose sum includes neighbors of one node, weighted by a predicted edge (Wang et al. 2024, eq. 11)."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from suffice.link.models.base import Encoding
from suffice.link.models.encoder import Encoder
from suffice.link.models.ncn import NCN, NCNSettings, score_common_neighbors
from suffice.link.models.registry import Preset, register_model
from suffice.link.sparse.neighbors import common_neighbors, pool, residual_neighbors

_CHUNK_SIZE = 2**12  # number of pairs whose 256 channels fit into a processor's cache


class NCNC(NCN):
    """NCN whose sum includes residual neighbors, weighted by the probability that NCN predicts for their missing edge.

    A residual neighbor k of a pair (i, j) is a neighbor of only one of the nodes; its missing edge joins it to
    the other one.

    The weight of k ∈ N(i) − N(j) is α·p·q / (p·q + 1 − q) with q = σ(scale · (score of (j, k) − offset)). Weights are
    computed without gradients and in eval mode: without dropout, and no norm updates its statistics on pairs that are
    not in the batch.

    Args:
        encoder: embeds the nodes.
        norm: normalization over pairs: `batch`, `layer`, `graph` or `none`.
        node_norm: normalization over nodes in xlin.
        dropout: probability that a channel of the perceptrons is dropped.
        two_layers: whether lin has a second hidden layer.
        alpha: largest weight of a residual neighbor (α).
        scale: scale of the score of the missing edge.
        offset: offset of the score of the missing edge.
        prior: prior probability of the missing edge (p).

    """

    def __init__(
        self,
        encoder: Encoder,
        norm: str = "layer",
        node_norm: str = "layer",
        dropout: float = 0.0,
        *,
        two_layers: bool = False,
        alpha: float = 1.0,
        scale: float = 5.0,
        offset: float = 3.0,
        prior: float = 0.5,
    ) -> None:
        super().__init__(encoder, norm, node_norm, dropout, two_layers=two_layers)
        self.alpha, self.scale, self.offset, self.prior = alpha, scale, offset, prior

    def pool_neighbors(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the sum over common neighbors and, weighted, residual neighbors, [pairs, hidden]."""
        assert encoding.pooled is not None
        total = super().pool_neighbors(encoding, pairs)
        residuals = residual_neighbors(encoding.adjacency, pairs)
        # The missing edge of a residual neighbor of one node joins it to the other node.
        missing = [torch.stack([pairs[1 - side][found.owner], found.node]) for side, found in enumerate(residuals)]
        weights = self._weights(encoding, torch.cat(missing, dim=1)).split([part.size(1) for part in missing])
        for neighbors, weight in zip(residuals, weights, strict=True):
            total = total + pool(encoding.pooled, neighbors, weight)
        return total

    @torch.no_grad()
    def _weights(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the weight of each missing edge [2, pairs]: [pairs]."""
        adjacency = encoding.adjacency
        assert encoding.pooled is not None
        # Scores are symmetric, and the same pair occurs many times at nodes of high degree: score each pair once.
        low, high = pairs.min(dim=0).values, pairs.max(dim=0).values
        codes, inverse = torch.unique(low * adjacency.num_nodes + high, return_inverse=True)
        low = torch.div(codes, max(adjacency.num_nodes, 1), rounding_mode="floor")
        unique_pairs = torch.stack([low, codes - low * adjacency.num_nodes])
        layer = self.common_mlp[0]
        assert isinstance(layer, nn.Linear)
        with _eval_mode(self):
            first_layer = encoding.pooled @ layer.weight.T
            logits = [
                score_common_neighbors(self, encoding, first_layer, part, common_neighbors(adjacency, part))
                for part in unique_pairs.split(_CHUNK_SIZE, dim=1)
            ]
        q = torch.sigmoid(self.scale * (torch.cat(logits) - self.offset)) if logits else first_layer.new_zeros(0)
        return (self.alpha * self.prior * q / (self.prior * q + 1 - q))[inverse]


@contextmanager
def _eval_mode(module: nn.Module) -> Generator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@register_model("ncnc")
@dataclass(frozen=True, kw_only=True)
class NCNCSettings(NCNSettings):
    """Options of `NCNC`.

    Args:
        alpha: largest weight of a residual neighbor.
        scale: scale of the score of the missing edge.
        offset: offset of the score of the missing edge.
        prior: prior probability of the missing edge.

    """

    alpha: float = 1.0
    scale: float = 5.0
    offset: float = 3.0
    prior: float = 0.5

    def create(self, in_channels: int) -> NCNC:
        """Return the model."""
        return NCNC(
            self.create_ncn_encoder(in_channels),
            self.decoder_norm,
            self.encoder_norm,
            self.dropout,
            two_layers=self.two_layers,
            alpha=self.alpha,
            scale=self.scale,
            offset=self.offset,
            prior=self.prior,
        )

    @classmethod
    def published(cls, data: str) -> Preset:
        """Return the authors' settings (GraphPKU/NeuralCommonNeighbor), which extend those of NCN."""
        ncn = NCNSettings.published(data)
        alpha, scale, offset, prior = _PUBLISHED.get(data, _PUBLISHED["Cora"])
        return ncn._replace(
            model=cls(**asdict(ncn.model), alpha=alpha, scale=scale, offset=offset, prior=prior),
        )


_PUBLISHED = {  # alpha, scale, offset, prior
    "Cora": (1.0, 4.3, 2.8, 0.75),
    "CiteSeer": (0.4, 6.5, 4.4, 0.75),
    "PubMed": (0.3, 5.3, 0.5, 0.5),
}
