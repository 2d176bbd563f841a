"""Audit and scores of a model that this package trained, on held-out and on training edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from suffice.link.auditing.audit import AuditReport, EdgeSet, audit
from suffice.link.batches.negatives import draw_negatives
from suffice.link.data.checkpoint import CheckpointError, load_checkpoint, select_prefix
from suffice.link.data.graph import Graph, Split, SplitConfig
from suffice.link.metrics import evaluate
from suffice.link.models import LinkPredictor, ModelSettings, PairScorer
from suffice.link.sparse.adjacency import remove_edges
from suffice.link.train.trainer import features, message_edges, score_parts


def audit_trained(
    model: LinkPredictor, graph: Graph, split: Split, *, batch_size: int = 512, seed: int = 0
) -> AuditReport:
    """Audit a trained link predictor on held-out edges (validation and test) and on training edges.

    The training edges audited are masked from the messages, all of them at once, so that the make-up of a
    batch can act through the batch alone.

    Args:
        model: trained on `split`.
        graph: features and size.
        split: edges.
        batch_size: that of the training.
        seed: decides all draws.

    """
    device = next(model.parameters()).device
    split = split.to(device)
    x = features(graph, model).to(device)
    scorer = PairScorer(model, x, split.message_edges())
    heldout = EdgeSet(
        torch.cat([split.validation, split.test], dim=1),
        torch.cat([split.validation_negatives, split.test_negatives], dim=1),
        scorer,
    )
    size = min(split.train.size(1), batch_size)
    order = torch.randperm(split.train.size(1), generator=torch.Generator().manual_seed(seed))[:size]
    positives = split.train[:, order.to(device)]
    # Not by the split's own seed: its draws are the held-out negatives, all known here.
    negatives = draw_negatives(split.known, graph.num_nodes, size, seed + 1)
    messages = remove_edges(split.message_edges(), positives, graph.num_nodes)
    train = EdgeSet(positives, negatives, PairScorer(model, x, messages))
    return audit(
        scorer,
        {"heldout": heldout, "train": train},
        module=model,
        batch_size=batch_size,
        seed=seed,
    )


def held_out_scores(
    model: LinkPredictor, graph: Graph, split: Split, protocol: SplitConfig, k: int = 100
) -> dict[str, float]:
    """Return every metric on the test edges, in eval mode, under the protocol."""
    device = next(model.parameters()).device
    split = split.to(device)
    messages = message_edges(model, split, graph.num_nodes, validation=protocol.validation_edges_at_test)
    x = features(graph, model).to(device)
    return evaluate(*score_parts(model, x, messages, split.test, split.test_negatives), k)


def load_trained(path: str | Path, device: str = "cpu") -> tuple[LinkPredictor, dict[str, Any]]:
    """Return the link predictor of a checkpoint, in eval mode, and what the checkpoint records.

    Raises:
        CheckpointError: the file is missing, no checkpoint of ours, or doesn't say what model it holds.

    """
    tensors, facts = load_checkpoint(path)
    if "model" not in facts or "in" not in facts:
        raise CheckpointError(f"{path} doesn't say what model it holds: it was not written by `suffice link`")
    model = ModelSettings.from_dict(facts["model"]).build(facts["in"])
    model.load_state_dict(select_prefix(tensors, "best") or select_prefix(tensors, "model"))
    return model.to(device).eval(), facts
