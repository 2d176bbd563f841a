"""Evaluation of a trained link predictor on validation and test edges."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from suffice.link.data.graph import Graph, Split, SplitConfig
from suffice.link.metrics import compute_metrics
from suffice.link.models.base import LinkPredictor, score_in_chunks
from suffice.link.sparse.adjacency import Adjacency
from suffice.link.train.inputs import message_edges, node_features


def evaluate(model: nn.Module, graph: Graph, split: Split, config: SplitConfig, k: int = 100) -> dict[str, float]:
    """Return all metrics of a model on the test edges, scored in eval mode.

    Args:
        model: module called as `model(x, edge_index, pairs)` that returns logits [pairs].
        graph: graph that provides the node features.
        split: edges of the graph.
        config: settings of the split; decides whether messages pass over validation edges.
        k: K of Hits@K.

    Returns:
        `hits@K`, `auc`, `ap` and `mrr`.

    """
    device = next(model.parameters()).device
    split = split.to(device)
    edge_index = message_edges(model, split, graph.num_nodes, validation=config.validation_edges_at_test)
    x = node_features(graph, model, split).to(device)
    return compute_metrics(*score_edges(model, x, edge_index, split.test, split.test_negatives), k)


def score_validation_edges(
    model: nn.Module, x: Tensor, edge_index: Tensor | Adjacency, split: Split
) -> tuple[Tensor, Tensor]:
    """Return the scores of the validation positives and negatives in eval mode, as `score_edges` does."""
    return score_edges(model, x, edge_index, split.validation, split.validation_negatives)


def score_edges(
    model: nn.Module, x: Tensor, edge_index: Tensor | Adjacency, positives: Tensor, negatives: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the scores of positives and negatives in eval mode, computed together in one pass.

    Args:
        model: module called as `model(x, edge_index, pairs)` that returns logits [pairs].
        x: node features, [nodes, features].
        edge_index: message-passing edges, long [2, edges], or an adjacency.
        positives: long [2, positives].
        negatives: long [2, negatives].

    Returns:
        scores [positives] and [negatives].

    """
    was_training = model.training
    model.eval()
    pairs = torch.cat([positives, negatives], dim=1)
    with torch.no_grad():
        if isinstance(model, LinkPredictor):
            scores = score_in_chunks(model, model.encode(x, edge_index), pairs)
        else:
            scores = model(x, edge_index, pairs)
    model.train(was_training)
    return scores[: positives.size(1)], scores[positives.size(1) :]
