# Audit a model.
from suffice.link.auditing.audit import audit as audit
from suffice.link.auditing.scoring import EdgeSet as EdgeSet
from suffice.link.auditing.trained import audit_trained as audit_trained

# Correct it.
from suffice.link.batches.composition import Fixed as Fixed
from suffice.link.batches.composition import Random as Random
from suffice.link.batches.composition import Separate as Separate
from suffice.link.corrections import freeze_statistics as freeze_statistics
from suffice.link.corrections import replace_batch_norm as replace_batch_norm
from suffice.link.corrections import train_corrected as train_corrected

# Load a graph, build a model, train and evaluate it.
from suffice.link.data.datasets import load_graph as load_graph
from suffice.link.data.graph import SplitConfig as SplitConfig
from suffice.link.data.graph import split_edges as split_edges
from suffice.link.models import build_model as build_model
from suffice.link.study.correct import correct as correct
from suffice.link.train.alignment import alignment as alignment
from suffice.link.train.config import TrainConfig as TrainConfig
from suffice.link.train.evaluate import evaluate as evaluate
from suffice.link.train.trainer import fit as fit
