# Audit a model.
from .auditing.audit import audit as audit
from .auditing.edge_set import EdgeSet as EdgeSet
from .auditing.encode_once import encode_once as encode_once
from .auditing.invariance import assert_composition_invariant as assert_composition_invariant
from .auditing.monitor import CompositionMonitor as CompositionMonitor
from .auditing.trained import audit_trained as audit_trained

# Correct it.
from .batches.composition import Fixed as Fixed
from .batches.composition import Random as Random
from .batches.composition import Separate as Separate
from .corrections import freeze_statistics as freeze_statistics
from .corrections import replace_batch_norm as replace_batch_norm
from .corrections import train_corrected as train_corrected

# Load a graph, build a model, train and evaluate it.
from .data.datasets import load_graph as load_graph
from .data.edge_rules import EdgeRules as EdgeRules
from .data.files import read_graph as read_graph
from .data.graph import SplitConfig as SplitConfig
from .data.graph import split_edges as split_edges
from .models import build_model as build_model
from .study.correct import correct as correct
from .train.alignment import alignment as alignment
from .train.config import TrainConfig as TrainConfig
from .train.evaluate import evaluate as evaluate
from .train.trainer import fit as fit
