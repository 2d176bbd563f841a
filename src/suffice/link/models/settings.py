"""What a link predictor is made of, by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from suffice.link.models.base import LinkPredictor
from suffice.link.models.buddy import BUDDY
from suffice.link.models.concat import ConcatMLP
from suffice.link.models.dot import Dot
from suffice.link.models.elph import ELPH
from suffice.link.models.encoder import Encoder
from suffice.link.models.gcn import GCN
from suffice.link.models.hadamard import HadamardMLP
from suffice.link.models.ncn import NCN
from suffice.link.models.ncnc import NCNC
from suffice.link.models.neognn import NeoGNN
from suffice.link.models.norms import NORMS
from suffice.link.models.predictor import EncoderDecoder
from suffice.link.models.pure import PureGCN
from suffice.link.models.sage import GraphSAGE
from suffice.link.train.memory_check import named_shortage

ENCODERS: dict[str, type[Encoder]] = {"gcn": GCN, "sage": GraphSAGE, "pure": PureGCN}
DECODERS: dict[str, type[Dot] | type[HadamardMLP]] = {
    "dot": Dot,
    "hadamard": HadamardMLP,
    "concat": ConcatMLP,
}
MODELS = ("pair", "neognn", "ncn", "ncnc", "elph", "buddy")


@dataclass(frozen=True)
class ModelSettings:
    """What a link predictor is made of.

    Args:
        encoder: `gcn`, `sage` or `pure` (weightless propagation); BUDDY has none.
        decoder: `dot`, `hadamard` or `concat`, of the model `pair`.
        encoder_norm: `batch`, `layer`, `graph` or `none`, over nodes; of NCN and NCNC on `pure` in xlin alone.
        decoder_norm: the same choice, over pairs.
        hidden: channels.
        layers: of the encoder.
        dropout: share of channels dropped.
        model: `pair` for encoder and decoder, or `neognn`, `ncn`, `ncnc`, `elph`, `buddy`.
        encoder_dropout: share of channels dropped in the encoder; None for `dropout`.
        input_dropout: share of features dropped.
        output_dropout: share of channels dropped of what the encoder returns.
        linear: leave out the ReLU between the encoder's layers; `pure` has none.
        hops: of neighbourhoods that ELPH and BUDDY count, 1 to 3.
        two_layers: whether NCN and NCNC join by two hidden layers.
        completion: NCNC's largest weight, scale, offset and prior.

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
    model: str = "pair"
    encoder_dropout: float | None = None
    input_dropout: float = 0.0
    hops: int = 2
    two_layers: bool = False
    completion: tuple[float, float, float, float] = (1.0, 5.0, 3.0, 0.5)
    output_dropout: float = 0.0
    linear: bool = False

    def __post_init__(self) -> None:
        choices = {
            "model": MODELS,
            "encoder": ENCODERS,
            "decoder": DECODERS,
            "encoder_norm": NORMS,
            "decoder_norm": NORMS,
        }
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} is {getattr(self, name)!r}; accepted: {', '.join(accepted)}")
        for name in ("hidden", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: at least 1")
        for name in ("dropout", "encoder_dropout", "input_dropout", "output_dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: 0 up to 1")
        if self.linear and self.encoder == "pure":
            raise ValueError("linear is True with encoder='pure', which is linear already; accepted: gcn, sage")
        if not 1 <= self.hops <= 3:
            raise ValueError(f"hops is {self.hops}; accepted: 1 to 3")
        if len(self.completion) != 4:
            raise ValueError(f"completion is {self.completion}; accepted: largest weight, scale, offset, prior")
        object.__setattr__(self, "completion", tuple(self.completion))  # JSON makes a list of it

    def build(self, in_channels: int, seed: int = 0) -> LinkPredictor:
        """Return a freshly initialised model; no global generator is moved.

        Raises:
            DoesNotFitError: there is no memory for its weights.
            ValueError: nodes have no features.

        """
        if in_channels < 1:
            raise ValueError(f"in_channels is {in_channels}: nodes have no features; accepted: at least 1")
        with torch.random.fork_rng(devices=[]), named_shortage():
            torch.manual_seed(seed)
            return self._build(in_channels)

    def _build(self, in_channels: int) -> LinkPredictor:
        norm, dropout = self.decoder_norm, self.dropout
        if self.model == "buddy":
            return BUDDY(in_channels, self.hidden, norm, dropout, hops=self.hops)
        inner = dropout if self.encoder_dropout is None else self.encoder_dropout
        kind = ENCODERS[self.encoder]
        sizes, drops = (in_channels, self.hidden, self.layers), (inner, self.input_dropout, self.output_dropout)
        # As NCN's authors have it: the norm over nodes stands in xlin, behind propagation that has no weights.
        bare = self.encoder == "pure" and self.model in ("ncn", "ncnc")
        more = {"linear": True} if self.linear else {}
        encoder = kind(*sizes, "none" if bare else self.encoder_norm, *drops, **more)
        if self.model == "neognn":
            return NeoGNN(encoder, norm, dropout)
        if self.model == "elph":
            return ELPH(encoder, norm, dropout, hops=self.hops)
        if self.model == "ncn":
            return NCN(encoder, norm, self.encoder_norm, dropout, two_layers=self.two_layers)
        if self.model == "ncnc":
            alpha, scale, offset, prior = self.completion
            return NCNC(
                encoder,
                norm,
                self.encoder_norm,
                dropout,
                two_layers=self.two_layers,
                alpha=alpha,
                scale=scale,
                offset=offset,
                prior=prior,
            )
        return EncoderDecoder(encoder, DECODERS[self.decoder](self.hidden, self.hidden, norm, dropout))
