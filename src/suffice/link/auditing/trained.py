"""Audit of a model that `suffice.link` trained, on held-out and on training edges."""

from __future__ import annotations

import torch

from suffice.link.auditing.audit import AuditReport, audit
from suffice.link.auditing.edge_set import EdgeSet
from suffice.link.batches.negatives import sample_negatives
from suffice.link.data.graph import Graph, Split
from suffice.link.models import LinkPredictor, PairScorer
from suffice.link.models.base import check_link_predictor
from suffice.link.sparse.adjacency import remove_edges
from suffice.link.train.inputs import message_edges, node_features


def audit_trained(
    model: LinkPredictor, graph: Graph, split: Split, *, batch_size: int = 512, metrics: bool = False, seed: int = 0
) -> AuditReport:
    """Audit a trained link predictor on held-out edges (validation and test) and on training edges.

    All audited training edges are removed from the message-passing edges at once. Every batch is then scored on the
    same graph, so that the composition of a batch cannot change the messages. Sketches and propagated features are
    those of the training: they lack only the edge that is scored.

    Args:
        model: link predictor that was trained on `split`.
        graph: graph that provides the node features.
        split: edges of the graph.
        batch_size: edges in a batch; use the batch size of the training.
        metrics: whether AUC, Hits@K and MRR are compared in batches of several compositions, as in `audit`.
        seed: seed of all draws.

    Returns:
        a report with the parts `heldout` and `train`.

    Raises:
        TypeError: the model is no `LinkPredictor`.

    """
    check_link_predictor(model, "Audit any other module with audit(score, edges, module=model)")
    device = next(model.parameters()).device
    split = split.to(device)
    x = node_features(graph, model, split).to(device)
    messages = message_edges(model, split, graph.num_nodes)
    heldout_scorer = PairScorer(model, x, messages)
    heldout = EdgeSet(
        torch.cat([split.validation, split.test], dim=1),
        torch.cat([split.validation_negatives, split.test_negatives], dim=1),
        heldout_scorer,
    )
    num_train = min(split.train.size(1), batch_size)
    order = torch.randperm(split.train.size(1), generator=torch.Generator().manual_seed(seed))[:num_train]
    positives = split.train[:, order.to(device)]
    # With the split's own seed, the sampler would propose the held-out negatives, which must not be drawn again.
    negatives = sample_negatives(split.known, graph.sides, num_train, seed + 1)
    train_scorer = PairScorer(model, x, remove_edges(messages, positives, graph.num_nodes))
    train = EdgeSet(positives, negatives, train_scorer)
    sets = {"heldout": heldout, "train": train}
    return audit(heldout_scorer, sets, module=model, batch_size=batch_size, metrics=metrics, seed=seed)
