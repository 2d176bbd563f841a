"""Link prediction: audit any model for composition bias, correct it, measure what it keeps.

`audit` is the audit; `Fixed`, `Separate` and `Random` compose mini-batches; `fit` trains; `correct` compares
trainings side by side; `alignment` says what a representation keeps of the classes.

Names are loaded when they are used: PyG takes seconds to import, and imports much that is not needed here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retain.link.arms import ARMS, Arm, parse_arm
    from retain.link.auditing import AuditReport, EdgeSet, audit
    from retain.link.checkpoint import CheckpointError
    from retain.link.composition import Composition, Fixed, Random, Separate, balanced_weights
    from retain.link.corrections import Change, freeze_statistics, replace_batch_norm, train_corrected
    from retain.link.data import load
    from retain.link.embeddings import alignment, raw_alignment
    from retain.link.graph import Graph, Protocol, Split, prepare, split
    from retain.link.messages import MessageGraph
    from retain.link.metrics import auc, average_precision, evaluate, hits_at_k, mean_reciprocal_rank
    from retain.link.models import LinkPredictor, ModelSettings, PairModel, PairScorer, preset
    from retain.link.negatives import TooFewNegativesError, draw_negatives
    from retain.link.reproduction import reproduce
    from retain.link.runs import correct, edge_maps
    from retain.link.sampling import EdgeBatch, EdgeBatches, LabelledBatches
    from retain.link.study import Study
    from retain.link.tables import read_graph
    from retain.link.trained import audit_trained, held_out_scores
    from retain.link.training import TrainResult, TrainSettings, fit

_HOMES = {
    "arms": ("ARMS", "Arm", "parse_arm"),
    "embeddings": ("alignment", "raw_alignment"),
    "auditing": ("AuditReport", "EdgeSet", "audit"),
    "checkpoint": ("CheckpointError",),
    "composition": ("Composition", "Fixed", "Random", "Separate", "balanced_weights"),
    "study": ("Study",),
    "corrections": ("Change", "freeze_statistics", "replace_batch_norm", "train_corrected"),
    "data": ("load",),
    "graph": ("Graph", "Protocol", "Split", "prepare", "split"),
    "metrics": ("auc", "average_precision", "evaluate", "hits_at_k", "mean_reciprocal_rank"),
    "messages": ("MessageGraph",),
    "models": ("LinkPredictor", "ModelSettings", "PairModel", "PairScorer", "preset"),
    "negatives": ("TooFewNegativesError", "draw_negatives"),
    "reproduction": ("reproduce",),
    "runs": ("correct", "edge_maps"),
    "sampling": ("EdgeBatch", "EdgeBatches", "LabelledBatches"),
    "tables": ("read_graph",),
    "trained": ("audit_trained", "held_out_scores"),
    "training": ("TrainResult", "TrainSettings", "fit"),
}

__all__ = [
    "ARMS",
    "Arm",
    "AuditReport",
    "Change",
    "CheckpointError",
    "Composition",
    "EdgeBatch",
    "EdgeBatches",
    "EdgeSet",
    "Fixed",
    "Graph",
    "LabelledBatches",
    "LinkPredictor",
    "MessageGraph",
    "ModelSettings",
    "PairModel",
    "PairScorer",
    "Protocol",
    "Random",
    "Separate",
    "Split",
    "Study",
    "TooFewNegativesError",
    "TrainResult",
    "TrainSettings",
    "alignment",
    "auc",
    "audit",
    "audit_trained",
    "average_precision",
    "balanced_weights",
    "correct",
    "draw_negatives",
    "edge_maps",
    "evaluate",
    "fit",
    "freeze_statistics",
    "held_out_scores",
    "hits_at_k",
    "load",
    "mean_reciprocal_rank",
    "parse_arm",
    "prepare",
    "preset",
    "raw_alignment",
    "read_graph",
    "replace_batch_norm",
    "reproduce",
    "split",
    "train_corrected",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"retain.link.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
