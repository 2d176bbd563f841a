"""Encoders, decoders and the link predictors made of them."""

from suffice.link.models.base import Encoding, LinkPredictor
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
from suffice.link.models.norms import NORMS, make_norm
from suffice.link.models.predictor import EncoderDecoder
from suffice.link.models.presets import preset
from suffice.link.models.pure import PureGCN
from suffice.link.models.sage import GraphSAGE
from suffice.link.models.scorer import PairScorer
from suffice.link.models.settings import DECODERS, ENCODERS, MODELS, ModelSettings

__all__ = [
    "BUDDY",
    "DECODERS",
    "ELPH",
    "ENCODERS",
    "GCN",
    "MODELS",
    "NCN",
    "NCNC",
    "NORMS",
    "ConcatMLP",
    "Dot",
    "Encoder",
    "EncoderDecoder",
    "Encoding",
    "GraphSAGE",
    "HadamardMLP",
    "LinkPredictor",
    "ModelSettings",
    "NeoGNN",
    "PairScorer",
    "PureGCN",
    "make_norm",
    "preset",
]
