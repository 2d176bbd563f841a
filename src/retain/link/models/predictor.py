"""A link predictor: an encoder over the message edges and a decoder over pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from retain.link.models.concat import ConcatMLP
from retain.link.models.dot import Dot
from retain.link.models.encoder import Encoder
from retain.link.models.gcn import GCN
from retain.link.models.hadamard import HadamardMLP
from retain.link.models.norms import NORMS
from retain.link.models.sage import GraphSAGE

ENCODERS: dict[str, type[Encoder]] = {"gcn": GCN, "sage": GraphSAGE}
DECODERS: dict[str, type[Dot] | type[HadamardMLP]] = {
    "dot": Dot,
    "hadamard": HadamardMLP,
    "concat": ConcatMLP,
}


@dataclass(frozen=True)
class ModelSettings:
    """What a link predictor is made of.

    Raises:
        ValueError: a name or a number is not accepted.

    """

    encoder: str = "gcn"
    decoder: str = "hadamard"
    encoder_norm: str = "batch"
    decoder_norm: str = "batch"
    hidden: int = 64
    layers: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        choices = {"encoder": ENCODERS, "decoder": DECODERS, "encoder_norm": NORMS, "decoder_norm": NORMS}
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted: {', '.join(accepted)}")
        for name in ("hidden", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; accepted: 0 up to 1")

    def build(self, in_channels: int, seed: int = 0) -> LinkPredictor:
        """Return a freshly initialised model; no global generator is moved."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = ENCODERS[self.encoder](in_channels, self.hidden, self.layers, self.encoder_norm, self.dropout)
            decoder = DECODERS[self.decoder](self.hidden, self.hidden, self.decoder_norm, self.dropout)
            return LinkPredictor(encoder, decoder)


class LinkPredictor(nn.Module):
    """Logits of pairs of nodes."""

    def __init__(self, encoder: Encoder, decoder: Dot | HadamardMLP) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, x: Tensor, edge_index: Tensor, pairs: Tensor) -> Tensor:
        """Score pairs.

        Args:
            x: features, [nodes, features].
            edge_index: edges that messages pass over, without the pairs themselves (see `mask_targets`).
            pairs: [2, edges].

        Returns:
            Logits, [edges].

        """
        return self.decoder(self.encoder(x, edge_index), pairs)

    def edge_embeddings(self, z: Tensor, pairs: Tensor) -> Tensor:
        """Return the decoder's hidden layer, [edges, hidden]."""
        return self.decoder.hidden(z, pairs)


class PairScorer:
    """Score pairs on a fixed graph with nothing but the pairs as argument, as an audit wants it.

    Nodes are embedded when the mode of the encoder changes, since they don't depend on the pairs; one embedding
    is kept. Make a new scorer after the parameters changed.

    Args:
        model: what to score with.
        x: features, [nodes, features].
        edge_index: edges that messages pass over, [2, edges].

    """

    def __init__(self, model: LinkPredictor, x: Tensor, edge_index: Tensor) -> None:
        self.model = model
        self.x = x
        self.edge_index = edge_index
        self._nodes: tuple[tuple[bool, ...], Tensor] | None = None

    def embed(self) -> Tensor:
        """Return the node embeddings in the encoder's present mode, [nodes, hidden]."""
        mode = tuple(module.training for module in self.model.encoder.modules())
        if self._nodes is None or self._nodes[0] != mode:
            self._nodes = None  # freed before the next is made
            with torch.no_grad():
                self._nodes = mode, cast(Tensor, self.model.encoder(self.x, self.edge_index))
        return self._nodes[1]

    def __call__(self, pairs: Tensor) -> Tensor:
        """Logits of the pairs, [edges]."""
        return self.model.decoder(self.embed(), pairs)


def mask_targets(edge_index: Tensor, pairs: Tensor, num_nodes: int) -> Tensor:
    """Return the message edges without the pairs that are to be scored, in either direction.

    Args:
        edge_index: [2, edges].
        pairs: [2, targets].
        num_nodes: nodes of the graph.

    """
    targets = torch.cat([pairs[0] * num_nodes + pairs[1], pairs[1] * num_nodes + pairs[0]])
    return edge_index[:, ~torch.isin(edge_index[0] * num_nodes + edge_index[1], targets)]
