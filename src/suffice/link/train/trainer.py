"""Training of any module that scores pairs, with every choice recorded and resumable to the same result."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suffice.link.batches.composition import Composition, Fixed
from suffice.link.batches.sampler import EdgeBatch, EdgeBatches
from suffice.link.data import checkpoint as files
from suffice.link.data.graph import Graph, Split
from suffice.link.metrics import evaluate
from suffice.link.models.base import LinkPredictor, score_in_chunks
from suffice.link.sparse.adjacency import Adjacency, remove_edges
from suffice.link.sparse.propagation import is_mostly_zero
from suffice.link.train.distributed import ranks, replicate, share_buffers, wait
from suffice.link.train.memory_check import check_room, named_shortage

_MANY_EDGES = 50_000  # both directions


@dataclass(frozen=True)
class TrainSettings:
    """How a model is trained.

    Args:
        composition: positives in a mini-batch.
        balanced: weight both classes the same in every batch.
        epochs: most epochs.
        directions: 2 to use every undirected edge in both directions in an epoch, as PyG's `edge_index` holds
            it, 1 to use it once. The same pair either way, but 2 takes twice the steps.
        batch_size: edges in a batch.
        learning_rate: Adam's.
        weight_decay: Adam's.
        clip: largest norm of the gradient; None for no clipping.
        patience: stop after so many epochs without a better validation metric, and keep the best; None for
            all epochs, and keep the last.
        metric: validation metric, `hits@K`, `auc`, `ap` or `mrr`.
        seed: decides batches, negatives and dropout.

    Raises:
        ValueError: a number is out of range.

    """

    composition: Composition = field(default_factory=Fixed)
    balanced: bool = False
    epochs: int = 30
    directions: int = 2
    batch_size: int = 512
    learning_rate: float = 5e-3
    weight_decay: float = 0.0
    clip: float | None = None
    patience: int | None = None
    metric: str = "hits@100"
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"epochs": 1, "batch_size": 2, "learning_rate": 0, "weight_decay": 0, "seed": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: at least {value}")
        if self.directions not in (1, 2):
            raise ValueError(f"directions is {self.directions}; accepted: 1, 2")
        for name in ("clip", "patience"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; accepted: above 0, or None")
        if self.metric not in ("auc", "ap", "mrr") and not self.metric.removeprefix("hits@").isdigit():
            raise ValueError(f"metric is {self.metric!r}; accepted: hits@K, auc, ap, mrr")

    @property
    def k(self) -> int:
        """K of Hits@K."""
        return int(self.metric.removeprefix("hits@")) if self.metric.startswith("hits@") else 100

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON holds them."""
        return {**asdict(self), "composition": str(self.composition)}


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave: mean loss, validation metric, realised fractions of positives by batch."""

    number: int
    loss: float
    metric: float
    fractions: tuple[float, ...]


@dataclass(frozen=True)
class TrainResult:
    """A training: every epoch, and which one's parameters the model now has."""

    epochs: tuple[Epoch, ...]
    chosen: int

    @property
    def metric(self) -> float:
        """Validation metric of the chosen epoch."""
        return self.epochs[self.chosen].metric


Progress = Callable[[Epoch], None]


def fit(
    model: nn.Module,
    graph: Graph,
    split: Split,
    settings: TrainSettings,
    *,
    checkpoint: str | Path | None = None,
    facts: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a module called as `model(x, edge_index, pairs)` that returns logits [pairs].

    Targets of a batch are masked from its messages. The model is trained where its parameters are. In a process group
    every rank calls this with the same arguments: edges are sharded, a step takes `batch_size` edges of each rank at
    one fraction of positives, and all end with the same model; rank 0 writes the checkpoint.

    Args:
        model: trained in place.
        graph: features and size.
        split: edges.
        settings: how.
        checkpoint: file to write after every epoch, and to go on from if it exists.
        facts: what else the checkpoint records (data set, protocol, the model's own settings).
        progress: called after every epoch.

    Raises:
        CheckpointError: the checkpoint is of a training with other settings.
        DoesNotFitError: it needs more memory than there is.
        FloatingPointError: the loss is NaN or infinite.

    """
    device = next(model.parameters()).device
    rank, world = ranks()
    split = split.to(device)
    check_room(graph.x, split.train.size(1), model)
    x = features(graph, model).to(device)
    optimizer = adam(model, settings)
    batches = EdgeBatches(
        split.train if settings.directions == 1 else split.message_edges(),
        graph.num_nodes,
        settings.composition,
        batch_size=settings.batch_size,
        known=split.known,
        balanced=settings.balanced,
        seed=settings.seed,
        rank=rank,
        world_size=world,
    )
    step = replicate(model)
    record = {"settings": settings.describe(), **(facts or {})}
    messages = message_edges(model, split, graph.num_nodes)
    done, chosen, best = _resume(checkpoint, record, model, optimizer)
    while len(done) < settings.epochs and not _stop(done, settings):
        number = len(done)
        with named_shortage(checkpoint):
            loss = _run_epoch(step, x, messages, split, batches, optimizer, settings, number)
            share_buffers(model)
            scores = evaluate(*score_validation(model, x, split, messages), settings.k)
        done.append(Epoch(number, loss, scores[settings.metric], tuple(batches.fractions)))
        if settings.patience is None or _best(done) == number:
            chosen, best = number, _copy(model) if settings.patience is not None else {}
        if checkpoint is not None and rank == 0:
            _save(checkpoint, record, model, optimizer, done, chosen, best)
        if progress is not None:
            progress(done[-1])
    wait()
    if best:
        model.load_state_dict(best)
    model.eval()
    return TrainResult(tuple(done), chosen)


def adam(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Return Adam over a model's parameters; in one pass for models of neighbourhoods, which have many."""
    fused = True if getattr(model, "uses_adjacency", False) else None
    rate, decay = settings.learning_rate, settings.weight_decay
    return torch.optim.Adam(model.parameters(), lr=rate, weight_decay=decay, fused=fused)


def features(graph: Graph, model: nn.Module) -> Tensor:
    """Return the node features, sparse (CSR) where an encoder's first product gains from it."""
    if getattr(getattr(model, "encoder", None), "accepts_sparse_features", False) and is_mostly_zero(graph.x):
        import warnings

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta state.*")
            return graph.x.to_sparse_csr()
    return graph.x


def message_edges(model: nn.Module, split: Split, num_nodes: int, *, validation: bool = False) -> Tensor | Adjacency:
    """Return the edges that messages pass over as a model wants them: for one of neighbourhoods, in compressed rows.

    Of a large graph also for our encoders, which then take a twentieth of the time of PyG's messages.
    """
    messages = split.message_edges(validation=validation)
    compressed = getattr(model, "uses_adjacency", False)
    if isinstance(model, LinkPredictor) and messages.size(1) > _MANY_EDGES:
        compressed = True
    return Adjacency(messages, num_nodes) if compressed else messages


def score_validation(
    model: nn.Module, x: Tensor, split: Split, messages: Tensor | Adjacency | None = None
) -> tuple[Tensor, Tensor]:
    """Scores of validation positives and negatives in eval mode, joint in one pass."""
    messages = split.message_edges() if messages is None else messages
    return score_parts(model, x, messages, split.validation, split.validation_negatives)


def score_parts(
    model: nn.Module, x: Tensor, edge_index: Tensor | Adjacency, positives: Tensor, negatives: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores of positives and of negatives in eval mode."""
    training = model.training
    model.eval()
    pairs = torch.cat([positives, negatives], dim=1)
    with torch.no_grad():
        if isinstance(model, LinkPredictor):
            scores = score_in_chunks(model, model.encode(x, edge_index), pairs)
        else:
            scores = model(x, edge_index, pairs)
    model.train(training)
    return scores[: positives.size(1)], scores[positives.size(1) :]


def step_loss(scores: Tensor, batch: EdgeBatch) -> Tensor:
    """Binary cross-entropy of a batch, weighted if the batch has weights: a scalar."""
    return F.binary_cross_entropy_with_logits(scores, batch.labels, weight=batch.weights)


def _run_epoch(
    model: nn.Module,
    x: Tensor,
    messages: Tensor | Adjacency,
    split: Split,
    batches: EdgeBatches,
    optimizer: torch.optim.Optimizer,
    settings: TrainSettings,
    number: int,
) -> float:
    model.train()
    size = split.train.size(1)
    batches.set_epoch(number)
    passes = settings.composition.passes
    sum_of_losses, steps = torch.zeros((), dtype=torch.float64, device=x.device), 0
    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        # From seed, epoch and rank alone, so that a resumed run draws the same dropout.
        torch.manual_seed(settings.seed * 1_000_003 + number + 7_919 * ranks()[0])
        for count, batch in enumerate(batches, start=1):
            rest = remove_edges(messages, split.train[:, batch.index % size], x.size(0))
            scores = model(x, rest, batch.pairs)
            loss = torch.stack([step_loss(part, batch) for part in scores]).sum() / passes
            torch.autograd.backward(loss)
            sum_of_losses += loss.detach()  # not read here: a GPU would have to catch up in every step
            if count % passes == 0:
                if settings.clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
    total = float(sum_of_losses)
    if not math.isfinite(total):
        raise FloatingPointError(f"the loss of epoch {number} is {total}: lower the learning rate or clip")
    return total / steps


def _best(done: list[Epoch]) -> int:
    return max(range(len(done)), key=lambda number: done[number].metric)


def _stop(done: list[Epoch], settings: TrainSettings) -> bool:
    return settings.patience is not None and len(done) > _best(done) + settings.patience if done else False


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def _save(
    path: str | Path,
    record: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    done: list[Epoch],
    chosen: int,
    best: dict[str, Tensor],
) -> None:
    tensors = {f"model/{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"best/{key}": value for key, value in best.items()}
    tensors |= files.pack_optimizer(optimizer)
    files.save_checkpoint(path, tensors, {**record, "epochs": [asdict(epoch) for epoch in done], "chosen": chosen})


def _resume(
    path: str | Path | None, record: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[list[Epoch], int, dict[str, Tensor]]:
    if path is None or not Path(path).exists():
        return [], 0, {}
    tensors, facts = files.load_checkpoint(path)
    for key, value in record.items():
        if facts.get(key) != json.loads(json.dumps(value)):
            raise files.CheckpointError(
                f"{path} was made with {key} {facts.get(key)}; accepted: {value}, or another file"
            )
    model.load_state_dict(files.select_prefix(tensors, "model"))
    files.unpack_optimizer(optimizer, tensors)
    done = [Epoch(e["number"], e["loss"], e["metric"], tuple(e["fractions"])) for e in facts["epochs"]]
    return done, facts["chosen"], files.select_prefix(tensors, "best")
