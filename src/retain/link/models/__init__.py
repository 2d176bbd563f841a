"""Encoders, decoders and the link predictor made of them."""

from retain.link.models.concat import ConcatMLP
from retain.link.models.dot import Dot
from retain.link.models.encoder import Encoder
from retain.link.models.gcn import GCN
from retain.link.models.hadamard import HadamardMLP
from retain.link.models.norms import NORMS, make_norm
from retain.link.models.predictor import (
    DECODERS,
    ENCODERS,
    LinkPredictor,
    ModelSettings,
    PairScorer,
    mask_targets,
)
from retain.link.models.sage import GraphSAGE

__all__ = [
    "DECODERS",
    "ENCODERS",
    "GCN",
    "NORMS",
    "ConcatMLP",
    "Dot",
    "Encoder",
    "GraphSAGE",
    "HadamardMLP",
    "LinkPredictor",
    "ModelSettings",
    "PairScorer",
    "make_norm",
    "mask_targets",
]
