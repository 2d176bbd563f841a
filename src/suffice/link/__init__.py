"""Link prediction: audit any model for composition bias, correct it, measure what it keeps.

`audit` is the audit; `Fixed`, `Separate` and `Random` compose mini-batches; `fit` trains; `correct` compares
trainings side by side; `alignment` says what a representation keeps of the classes.

Names are loaded when they are used: PyG takes seconds to import, and imports much that is not needed here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from suffice.link.auditing.audit import AuditReport, EdgeSet, audit
    from suffice.link.auditing.trained import audit_trained, held_out_scores
    from suffice.link.batches.composition import Composition, Fixed, Random, Separate, balanced_weights
    from suffice.link.batches.negatives import TooFewNegativesError, draw_negatives
    from suffice.link.batches.sampler import EdgeBatch, EdgeBatches, LabelledBatches
    from suffice.link.corrections import Change, freeze_statistics, replace_batch_norm, train_corrected
    from suffice.link.data.checkpoint import CheckpointError
    from suffice.link.data.datasets import load_graph
    from suffice.link.data.files import read_graph
    from suffice.link.data.graph import Graph, Split, SplitConfig, prepare_graph, split_edges
    from suffice.link.metrics import auc, average_precision, evaluate, hits_at_k, mean_reciprocal_rank
    from suffice.link.models import (
        EncoderDecoderSettings,
        LinkPredictor,
        ModelSettings,
        PairScorer,
        build_model,
        preset,
    )
    from suffice.link.sparse.adjacency import Adjacency
    from suffice.link.study.arms import ARMS, Arm, parse_arm
    from suffice.link.study.correct import correct, edge_maps
    from suffice.link.study.reproduction import reproduce
    from suffice.link.study.results import Study
    from suffice.link.train.alignment import alignment, raw_alignment
    from suffice.link.train.trainer import TrainResult, TrainSettings, fit

_HOMES = {
    "study.arms": ("ARMS", "Arm", "parse_arm"),
    "train.alignment": ("alignment", "raw_alignment"),
    "auditing.audit": ("AuditReport", "EdgeSet", "audit"),
    "data.checkpoint": ("CheckpointError",),
    "batches.composition": ("Composition", "Fixed", "Random", "Separate", "balanced_weights"),
    "study.results": ("Study",),
    "corrections": ("Change", "freeze_statistics", "replace_batch_norm", "train_corrected"),
    "data.datasets": ("load_graph",),
    "data.graph": ("Graph", "SplitConfig", "Split", "prepare_graph", "split_edges"),
    "metrics": ("auc", "average_precision", "evaluate", "hits_at_k", "mean_reciprocal_rank"),
    "sparse.adjacency": ("Adjacency",),
    "models": ("EncoderDecoderSettings", "LinkPredictor", "ModelSettings", "PairScorer", "build_model", "preset"),
    "batches.negatives": ("TooFewNegativesError", "draw_negatives"),
    "study.reproduction": ("reproduce",),
    "study.correct": ("correct", "edge_maps"),
    "batches.sampler": ("EdgeBatch", "EdgeBatches", "LabelledBatches"),
    "data.files": ("read_graph",),
    "auditing.trained": ("audit_trained", "held_out_scores"),
    "train.trainer": ("TrainResult", "TrainSettings", "fit"),
}

__all__ = [
    "ARMS",
    "Adjacency",
    "Arm",
    "AuditReport",
    "Change",
    "CheckpointError",
    "Composition",
    "EdgeBatch",
    "EdgeBatches",
    "EdgeSet",
    "EncoderDecoderSettings",
    "Fixed",
    "Graph",
    "LabelledBatches",
    "LinkPredictor",
    "ModelSettings",
    "PairScorer",
    "Random",
    "Separate",
    "Split",
    "SplitConfig",
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
    "build_model",
    "correct",
    "draw_negatives",
    "edge_maps",
    "evaluate",
    "fit",
    "freeze_statistics",
    "held_out_scores",
    "hits_at_k",
    "load_graph",
    "mean_reciprocal_rank",
    "parse_arm",
    "prepare_graph",
    "preset",
    "raw_alignment",
    "read_graph",
    "replace_batch_norm",
    "reproduce",
    "split_edges",
    "train_corrected",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"suffice.link.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
