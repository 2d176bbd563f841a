"""NCN: features summed over common neighbours, beside the product of the ends' (Wang et al. 2024, eq. 9)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from suffice.link.models.base import Encoding, LinkPredictor, dense_block
from suffice.link.models.dropout import ByteDropout
from suffice.link.models.encoder import Encoder
from suffice.link.models.norms import make_norm
from suffice.link.sparse.adjacency import Adjacency
from suffice.link.sparse.neighbors import Neighbors, common_neighbors, pool


class NCN(LinkPredictor):
    """Score lin(β · f(Σ_{k∈N(i)∩N(j)} h'_k) + g(h_i ⊙ h_j)), with h' = h + xlin(h).

    Args:
        encoder: of the nodes.
        norm: over pairs: `batch`, `layer`, `graph` or `none`.
        node_norm: over nodes, in xlin.
        dropout: share of channels dropped in the perceptrons.
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
            return dense_block(hidden, hidden, make_norm(norm, hidden), ByteDropout(dropout))

        self.encoder = encoder
        self.node_mlp = nn.Sequential(*block("none"), *block(node_norm))
        self.common_mlp = nn.Sequential(*block("none"), *block(norm))
        self.product_mlp = block(norm)
        self.join_mlp = nn.Sequential(*block(norm), *(block(norm) if two_layers else ()))
        self.beta = nn.Parameter(torch.ones(1))
        self.last = nn.Linear(hidden, 1)

    @property
    def node_modules(self) -> tuple[nn.Module, ...]:
        """What `encode` runs."""
        return self.encoder, self.node_mlp

    def encode(self, x: Tensor, messages: Tensor | Adjacency) -> Encoding:
        """Embed the nodes, and what is summed of them."""
        encoding = Encoding(x, x, messages)
        h = self.encoder(x, graph := encoding.graph)
        return Encoding(h, x, graph, h + self.node_mlp(h))

    def pooled(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the sum over common neighbours, [edges, hidden]."""
        assert encoding.pooled is not None
        return pool(encoding.pooled, common_neighbors(encoding.graph, pairs))

    def edge_embedding(self, encoding: Encoding, pairs: Tensor) -> Tensor:
        """Return the last hidden layer, [edges, hidden]."""
        h = encoding.nodes
        common = self.common_mlp(self.pooled(encoding, pairs))
        return self.join_mlp(
            common * self.beta + self.product_mlp(h.index_select(0, pairs[0]) * h.index_select(0, pairs[1]))
        )


def fast_scores(model: NCN, encoding: Encoding, first: Tensor, pairs: Tensor, lists: Neighbors) -> Tensor:
    """Return NCN's logits without gradients, for many pairs whose common neighbours are known: [edges].

    The first layer is applied to nodes rather than to pairs, and a pair without common neighbours takes a constant.

    Args:
        model: in eval mode.
        encoding: of the graph.
        first: the first layer's product with what is pooled, without its bias, [nodes, hidden].
        pairs: long [2, edges].
        lists: common neighbours of the pairs.

    """
    layer = model.common_mlp[0]
    assert isinstance(layer, nn.Linear)
    has = (lists.pointers.diff() > 0).nonzero().flatten()
    starts = torch.cat([lists.pointers[:-1][has], lists.pointers[-1:]])
    owner = torch.repeat_interleave(starts.diff())
    sums = torch.cat([pool(first, Neighbors(lists.node, owner, starts)), first.new_zeros(1, first.size(1))])
    made = model.common_mlp[1:](sums + layer.bias)
    common = made[-1].repeat(pairs.size(1), 1)
    common[has] = made[:-1]
    h = encoding.nodes
    joined = common.mul_(model.beta).add_(model.product_mlp(h.index_select(0, pairs[0]) * h.index_select(0, pairs[1])))
    return model.last(model.join_mlp(joined)).squeeze(-1)
