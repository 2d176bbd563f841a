"""Training of any module that scores pairs of nodes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suffice.link.batches.sampler import EdgeBatch, EdgeBatches
from suffice.link.data.graph import Graph, Split
from suffice.link.metrics import compute_metric
from suffice.link.sparse.adjacency import Adjacency, remove_edges
from suffice.link.train.checkpoint import data_digests, resume_training, save_training
from suffice.link.train.config import TrainConfig
from suffice.link.train.distributed import broadcast_buffers, distribute, rank_and_world_size, wait_for_all_ranks
from suffice.link.train.evaluate import score_validation_edges
from suffice.link.train.inputs import message_edges, node_features
from suffice.link.train.memory import check_memory, explain_out_of_memory
from suffice.link.train.state import EpochResult, TrainResult, TrainState

EpochCallback = Callable[[EpochResult], None]  # called after each epoch


def fit(
    model: nn.Module,
    graph: Graph,
    split: Split,
    config: TrainConfig,
    *,
    checkpoint: str | Path | None = None,
    metadata: dict[str, Any] | None = None,
    on_epoch: EpochCallback | None = None,
) -> TrainResult:
    """Train a module with binary cross-entropy on positive and sampled negative edges.

    The positives of a batch are removed from the message-passing edges. The model is trained on the device of
    its parameters.

    In a `torch.distributed` process group, every rank calls this function with the same arguments. Each rank trains on
    its share of the edges: a step takes `batch_size` edges of each rank, all with the same fraction of positives. All
    ranks end with the same model, and rank 0 writes the checkpoint.

    Args:
        model: module called as `model(x, edge_index, pairs)` that returns logits [pairs]; trained in place.
        graph: graph that provides the node features.
        split: edges of the graph.
        config: settings of the training.
        checkpoint: file to write after each epoch. If it exists, the training resumes from it; the result is the same
            as without the interruption.
        metadata: JSON-serializable dictionary to write to the checkpoint (data set, settings of the model, …).
        on_epoch: called with the result of each epoch.

    Returns:
        the result of each epoch.

    Raises:
        CheckpointError: the checkpoint belongs to a training with other settings, or on another graph or split.
        NotEnoughMemoryError: the training needs more memory than is available.
        FloatingPointError: the loss is NaN or infinite.
        ValueError: early stopping uses Hits@K with fewer than K validation negatives, which is always 1.0.

    """
    _check_negatives(config, split)
    device = next(model.parameters()).device
    rank, _ = rank_and_world_size()
    check_memory(graph.x, split.train.size(1), model)
    training = _Training.start(model, graph, split.to(device), config)
    record = {"settings": config.to_dict(), "data": data_digests(graph, split), **(metadata or {})}
    state = TrainState()
    if checkpoint is not None and Path(checkpoint).exists():
        state = resume_training(checkpoint, record, model, training.optimizer)
    while len(state.epochs) < config.epochs and not state.should_stop(config.patience):
        with explain_out_of_memory(checkpoint):
            epoch = training.run_epoch(len(state.epochs))
        state.record(epoch, model, config.patience)
        if checkpoint is not None and rank == 0:
            save_training(checkpoint, record, model, training.optimizer, state)
        if on_epoch is not None:
            on_epoch(epoch)
    wait_for_all_ranks()
    if state.best_parameters:
        model.load_state_dict(state.best_parameters)
    model.eval()
    return TrainResult(tuple(state.epochs), state.kept_epoch)


def _check_negatives(config: TrainConfig, split: Split) -> None:
    """Raise if early stopping would compare values of Hits@K that are all 1.0."""
    count = split.validation_negatives.size(1)
    if config.patience is not None and config.metric.startswith("hits@") and count < config.k:
        raise ValueError(
            f"metric must be one that {count} validation negatives can measure, such as auc, got {config.metric!r} "
            f"with patience {config.patience}. Use another metric, or more negatives in SplitConfig"
        )


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return Adam over the parameters of a model.

    The update is fused for models that compare neighborhoods, because they have many small parameters.
    """
    return torch.optim.Adam(
        model.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True if getattr(model, "uses_adjacency", False) else None,
    )


def batch_loss(logits: Tensor, batch: EdgeBatch) -> Tensor:
    """Return the mean binary cross-entropy of a batch, weighted if the batch has weights: a scalar.

    Args:
        logits: [pairs].
        batch: labels and weights of the pairs.

    """
    return F.binary_cross_entropy_with_logits(logits, batch.labels, weight=batch.weights)


@dataclass(frozen=True)
class _Training:
    """Everything that the epochs of a training share."""

    model: nn.Module
    forward: nn.Module
    x: Tensor
    edge_index: Tensor | Adjacency
    split: Split
    batches: EdgeBatches
    optimizer: torch.optim.Optimizer
    config: TrainConfig

    @classmethod
    def start(cls, model: nn.Module, graph: Graph, split: Split, config: TrainConfig) -> _Training:
        """Prepare a training on the device of the model, where the split already is."""
        rank, world_size = rank_and_world_size()
        batches = EdgeBatches(
            split.train if config.directions == 1 else split.message_edges(),
            graph.sides,
            config.composition,
            batch_size=config.batch_size,
            known=split.known,
            balanced=config.balanced,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
        )
        return cls(
            model=model,
            forward=distribute(model),
            x=node_features(graph, model, split).to(split.train.device),
            edge_index=message_edges(model, split, graph.num_nodes),
            split=split,
            batches=batches,
            optimizer=make_optimizer(model, config),
            config=config,
        )

    def run_epoch(self, number: int) -> EpochResult:
        """Train for one epoch and evaluate on the validation edges."""
        loss = self._train_epoch(number)
        broadcast_buffers(self.model)
        scores = score_validation_edges(self.model, self.x, self.edge_index, self.split)
        metric = compute_metric(self.config.metric, *scores)
        return EpochResult(number, loss, metric, tuple(self.batches.fractions))

    def _train_epoch(self, number: int) -> float:
        """Take the optimizer steps of one epoch and return their mean loss."""
        self.forward.train()
        self.batches.set_epoch(number)
        batches_per_step = self.config.composition.batches_per_step
        # Summed on the device: reading the loss in each step would synchronize with a GPU.
        loss_sum, num_steps = torch.zeros((), dtype=torch.float64, device=self.x.device), 0
        with torch.random.fork_rng(devices=[self.x.device] if self.x.is_cuda else []):
            # The seed depends only on the configuration, so that a resumed training draws the same dropout masks.
            torch.manual_seed(self.config.seed * 1_000_003 + number + 7_919 * rank_and_world_size()[0])
            for count, batch in enumerate(self.batches, start=1):
                loss = self._loss(batch) / batches_per_step
                torch.autograd.backward(loss)
                loss_sum += loss.detach()
                if count % batches_per_step == 0:
                    self._step()
                    num_steps += 1
        total = float(loss_sum)
        if not math.isfinite(total):
            raise FloatingPointError(
                f"loss must be finite, got {total} in epoch {number}. Use a lower learning_rate or set clip"
            )
        return total / num_steps

    def _loss(self, batch: EdgeBatch) -> Tensor:
        positives = self.split.train
        # With two directions, index i + len(positives) is the reverse of positive i.
        batch_positives = positives[:, batch.positive_index % positives.size(1)]
        edge_index = remove_edges(self.edge_index, batch_positives, self.x.size(0))
        logits = self.forward(self.x, edge_index, batch.pairs)
        return torch.stack([batch_loss(part, batch) for part in logits]).sum()

    def _step(self) -> None:
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
