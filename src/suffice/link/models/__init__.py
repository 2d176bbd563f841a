"""Link predictors, and the encoders, decoders and norms that they are made of.

Every file of this package is imported here, which registers its parts: a new model, encoder or decoder is one new file.
"""

import importlib
import pkgutil

from suffice.link.models.base import Encoding, LinkPredictor
from suffice.link.models.buddy import BUDDY, BUDDYSettings
from suffice.link.models.concat import ConcatMLP
from suffice.link.models.decoder import Decoder, decoders
from suffice.link.models.dot import Dot
from suffice.link.models.elph import ELPH, ELPHSettings
from suffice.link.models.encoder import Encoder, EncoderModelSettings, encoders
from suffice.link.models.encoder_decoder import EncoderDecoder, EncoderDecoderSettings
from suffice.link.models.gcn import GCN
from suffice.link.models.hadamard import HadamardMLP
from suffice.link.models.ncn import NCN, NCNSettings
from suffice.link.models.ncnc import NCNC, NCNCSettings
from suffice.link.models.neognn import NeoGNN, NeoGNNSettings
from suffice.link.models.norms import make_norm, norms
from suffice.link.models.pure import PureGCN
from suffice.link.models.registry import (
    ModelSettings,
    Preset,
    PublishedTraining,
    build_model,
    get_model_settings,
    models,
    preset,
    register_model,
)
from suffice.link.models.sage import GraphSAGE
from suffice.link.models.scorer import PairScorer

for _module in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = [
    "BUDDY",
    "ELPH",
    "GCN",
    "NCN",
    "NCNC",
    "BUDDYSettings",
    "ConcatMLP",
    "Decoder",
    "Dot",
    "ELPHSettings",
    "Encoder",
    "EncoderDecoder",
    "EncoderDecoderSettings",
    "EncoderModelSettings",
    "Encoding",
    "GraphSAGE",
    "HadamardMLP",
    "LinkPredictor",
    "ModelSettings",
    "NCNCSettings",
    "NCNSettings",
    "NeoGNN",
    "NeoGNNSettings",
    "PairScorer",
    "Preset",
    "PublishedTraining",
    "PureGCN",
    "build_model",
    "decoders",
    "encoders",
    "get_model_settings",
    "make_norm",
    "models",
    "norms",
    "preset",
    "register_model",
]
