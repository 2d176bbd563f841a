"""Encoders, decoders and the link predictors made of them."""

from retain.link.models.base import Encoding, PairModel
from retain.link.models.buddy import BUDDY
from retain.link.models.concat import ConcatMLP
from retain.link.models.dot import Dot
from retain.link.models.elph import ELPH
from retain.link.models.encoder import Encoder
from retain.link.models.gcn import GCN
from retain.link.models.hadamard import HadamardMLP
from retain.link.models.ncn import NCN
from retain.link.models.ncnc import NCNC
from retain.link.models.neognn import NeoGNN
from retain.link.models.norms import NORMS, make_norm
from retain.link.models.predictor import LinkPredictor
from retain.link.models.presets import preset
from retain.link.models.pure import PureGCN
from retain.link.models.sage import GraphSAGE
from retain.link.models.scorer import PairScorer, mask_targets
from retain.link.models.settings import DECODERS, ENCODERS, MODELS, ModelSettings

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
    "Encoding",
    "GraphSAGE",
    "HadamardMLP",
    "LinkPredictor",
    "ModelSettings",
    "NeoGNN",
    "PairModel",
    "PairScorer",
    "PureGCN",
    "make_norm",
    "mask_targets",
    "preset",
]
