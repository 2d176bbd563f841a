"""Data, trainings and audits of the zoo."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suffice.link import EdgeSet, Random, SplitConfig, audit, load_graph, replace_batch_norm, split_edges
from suffice.link.auditing.audit import AuditReport
from suffice.link.batches.composition import class_weights
from suffice.link.batches.negatives import sample_negatives
from suffice.link.batches.sampler import CompositionBatchSampler
from suffice.link.sparse.adjacency import Adjacency
from zoo_subgraphs import Subgraph, extract
from zoo_triples import corrupt, knowledge_graph

MAX_AUDITED = 1024  # edges in a batch of an audit; a training with larger batches is audited with these
NUM_SUBGRAPHS = 2500  # positives that models of subgraphs are trained on
MAX_RATE_OF_LAYER_NORM = 3e-3  # models with LayerNorm can fail to learn with a higher learning rate
Items = dict[str, Tensor]


@dataclass(frozen=True)
class Examples:
    """Positives and as many negatives.

    Args:
        positives: long [2, positives].
        negatives: long [2, negatives].
        items: what else is passed to the model, of positives and of negatives, by name.

    """

    positives: Tensor
    negatives: Tensor
    items: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """What a model is trained and audited on.

    Args:
        x: node features, [nodes, features].
        graph: training edges.
        train: examples for the training.
        heldout: examples for the audit.
        relations: number of relations; 0 if edges have none.
        subgraphs: subgraphs by number, for models of subgraphs.

    """

    x: Tensor
    graph: Adjacency
    train: Examples
    heldout: Examples
    relations: int = 0
    subgraphs: tuple[Subgraph, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A code base, how it trains, and which verdict its code lets expect.

    Args:
        name: name of the entry.
        repository: GitHub repository.
        source: files and classes that were read.
        coupling: what makes the score of an edge depend on the rest of its batch.
        batches: how positives and negatives are put into batches.
        expected: levels of the verdict that would be right.
        why: reason for the expectation.
        kind: `pairs`, `subgraphs` or `triples`.
        make: returns the model for a task.
        layout: `shuffled` (positives and negatives are shuffled together), `paired` (as many of both in every batch),
            `separate` (two passes) or `full` (one batch).
        batch_size: examples in a pass of the model.
        loss: `bce`, `log` (cross-entropy of probabilities), `mse` or `retrieval`.
        learning_rate: learning rate of Adam.
        epochs: number of epochs.
        fresh: whether negatives are drawn anew in each epoch.
        mask: edges that messages do not pass: `none`, `batch` (the positives of the step) or `positives` (the same,
            but only in the pass of the positives).

    """

    name: str
    repository: str
    source: str
    coupling: str
    batches: str
    expected: tuple[str, ...]
    why: str
    kind: str
    make: Callable[[Task], nn.Module]
    layout: str
    batch_size: int
    loss: str = "bce"
    learning_rate: float = 1e-3
    epochs: int = 10
    fresh: bool = False
    mask: str = "none"


@lru_cache(maxsize=4)
def load_task(kind: str, seed: int) -> Task:
    """Return the data for a kind of entries; the seed decides the split and the negatives."""
    if kind == "triples":
        return _load_triples(seed)
    data = load_graph("digits")
    split = split_edges(data, SplitConfig(), seed)
    graph = Adjacency(split.message_edges(), data.num_nodes)
    negatives = sample_negatives(split.known, data.num_nodes, split.train.size(1), seed + 1)
    train = Examples(split.train, negatives, {})
    heldout = Examples(
        torch.cat([split.validation, split.test], dim=1),
        torch.cat([split.validation_negatives, split.test_negatives], dim=1),
        {},
    )
    if kind == "pairs":
        return Task(data.x, graph, train, heldout)
    train = Examples(train.positives[:, :NUM_SUBGRAPHS], train.negatives[:, :NUM_SUBGRAPHS], {})
    pairs = [train.positives, train.negatives, heldout.positives, heldout.negatives]
    numbers = torch.arange(sum(part.size(1) for part in pairs)).split([part.size(1) for part in pairs])
    subgraphs = tuple(extract(graph, torch.cat(pairs, dim=1)))
    train = Examples(train.positives, train.negatives, {"index": (numbers[0], numbers[1])})
    heldout = Examples(heldout.positives, heldout.negatives, {"index": (numbers[2], numbers[3])})
    return Task(data.x, graph, train, heldout, subgraphs=subgraphs)


def _load_triples(seed: int) -> Task:
    pairs, relation, num_relations = knowledge_graph()
    num_nodes = int(pairs.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(pairs.size(1), generator=generator)
    chosen = order.split([pairs.size(1) - 1000, 1000])
    train, heldout = (
        Examples(
            pairs[:, part],
            corrupt(pairs[:, part], num_nodes, generator),
            {"relation": (relation[part], relation[part])},
        )
        for part in chosen
    )
    return Task(torch.zeros(num_nodes, 1), Adjacency(train.positives, num_nodes), train, heldout, num_relations)


@dataclass(frozen=True)
class Pass:
    """The examples that the model scores in one call."""

    pairs: Tensor
    labels: Tensor
    items: Items


def steps(entry: Entry, task: Task, epoch: int, seed: int, *, random: bool) -> Iterator[list[Pass]]:
    """Yield the passes of each optimizer step of an epoch.

    Args:
        entry: decides the layout of the batches.
        task: examples for the training.
        epoch: number of the epoch.
        seed: seed of the training.
        random: whether to draw the fraction of positives of each batch, all in one pass, whatever the layout.

    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    positives, negatives = task.train.positives, task.train.negatives
    if entry.fresh and entry.kind == "triples":
        negatives = corrupt(positives, task.graph.num_nodes, generator)
    elif entry.fresh:
        negatives = torch.randint(task.graph.num_nodes, positives.shape, generator=generator)
    pairs = torch.cat([positives, negatives], dim=1)
    items = {name: torch.cat(values) for name, values in task.train.items.items()}
    count = positives.size(1)
    labels = (torch.arange(pairs.size(1)) < count).float()

    def make(index: Tensor) -> Pass:
        return Pass(pairs[:, index], labels[index], {name: values[index] for name, values in items.items()})

    if random:
        size = min(entry.batch_size, count // 2)
        sampler = CompositionBatchSampler(labels, Random(), batch_size=size, seed=seed)
        sampler.set_epoch(epoch)
        batches = [[torch.tensor(index)] for index in sampler]
    elif entry.layout == "full":
        batches = [[torch.arange(pairs.size(1))]]
    elif entry.layout == "shuffled":
        batches = [[part] for part in torch.randperm(pairs.size(1), generator=generator).split(entry.batch_size)]
    else:
        size = entry.batch_size // 2 if entry.layout == "paired" else entry.batch_size
        batches = [[part, part + count] for part in torch.randperm(count, generator=generator).split(size)]
        if entry.layout == "paired":
            batches = [[torch.cat(both)] for both in batches]
    for batch in batches:
        if min(index.numel() for index in batch) >= 4:  # BatchNorm cannot train on a single edge
            yield [make(index) for index in batch]


def loss_of(kind: str, scores: Tensor, labels: Tensor, *, balanced: bool) -> Tensor:
    """Return the mean loss of a pass, in which both classes weigh the same if `balanced`."""
    if kind == "bce":
        losses = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    elif kind == "mse":
        losses = (scores - labels).square()
    else:
        losses = -torch.log(torch.where(labels > 0, scores, 1 - scores) + 1e-7)
    if balanced:
        num_positives = int(labels.sum())
        positive, negative = class_weights(num_positives, labels.numel() - num_positives)
        losses = losses * torch.where(labels > 0, positive, negative)
    return losses.mean()


def train(entry: Entry, task: Task, seed: int, arm: str, epochs: int | None = None) -> nn.Module:
    """Train the model of an entry.

    Args:
        entry: what is trained, and how.
        task: `load_task` of the entry's kind.
        seed: seed of parameters and batches.
        arm: `published`, `layer` (LayerNorm in place of BatchNorm) or `random` (random fractions and balanced loss).
        epochs: number of epochs if not those of the entry.

    """
    torch.manual_seed(seed)
    model = entry.make(task)
    rate = entry.learning_rate
    if arm == "layer":
        replace_batch_norm(model, "layer")
        rate = min(rate, MAX_RATE_OF_LAYER_NORM)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    model.train()
    for epoch in range(epochs or entry.epochs):
        for passes in steps(entry, task, epoch, seed, random=arm == "random"):
            positives = torch.cat([part.pairs[:, part.labels > 0] for part in passes], dim=1)
            masked = task.graph.without(positives) if entry.mask != "none" else task.graph
            losses: list[Tensor] = []
            for part in passes:
                only_negatives = entry.mask == "positives" and not part.labels.any()
                graph = task.graph if only_negatives else masked
                if entry.loss == "retrieval":
                    if part.labels.any():
                        retrieval: Any = model
                        losses.append(retrieval.retrieval_loss(part.pairs, graph))
                    continue
                scores = model(part.pairs, graph, **part.items)
                losses.append(loss_of(entry.loss, scores, part.labels, balanced=arm == "random"))
            torch.autograd.backward(torch.stack(losses).sum())
            optimizer.step()
            optimizer.zero_grad()
    return model


def audit_entry(entry: Entry, task: Task, model: nn.Module, seed: int, repeats: int = 16) -> AuditReport:
    """Audit a trained model on held-out and on training edges, with the batch size of its training.

    As in `audit_trained`, the audited training edges are removed from the edges that messages pass over.
    """
    size = min(entry.batch_size, MAX_AUDITED)
    examples = task.train
    number = torch.randperm(examples.positives.size(1), generator=torch.Generator().manual_seed(seed))[: max(size, 64)]
    without = task.graph.without(examples.positives[:, number])

    def score_heldout(pairs: Tensor, **items: Tensor) -> Tensor:
        return model(pairs, task.graph, **items)

    def score_train(pairs: Tensor, **items: Tensor) -> Tensor:
        return model(pairs, without, **items)

    heldout = EdgeSet(task.heldout.positives, task.heldout.negatives, score_heldout, items=task.heldout.items)
    of_train = EdgeSet(
        examples.positives[:, number],
        examples.negatives[:, number],
        score_train,
        items={name: (first[number], second[number]) for name, (first, second) in examples.items.items()},
    )
    sets = {"heldout": heldout, "train": of_train}
    return audit(score_heldout, sets, module=model, batch_size=size, seed=seed, repeats=repeats)


def run(entry: Entry, arm: str, seed: int) -> dict[str, Any]:
    """Train and audit an entry; return verdict, statistics and seconds of processor time."""
    task = load_task(entry.kind, seed)
    start = time.process_time()
    model = train(entry, task, seed, arm)
    trained = time.process_time()
    report = audit_entry(entry, task, model, seed)
    return {
        "entry": entry.name,
        "arm": arm,
        "seed": seed,
        "level": report.verdict.level,
        "why": report.verdict.why,
        "layers": [layer.name for layer in report.layers if layer.mixes_edges],
        "statistics": {
            name: {key: value.mean for key, value in part.statistics.items()} for name, part in report.parts.items()
        },
        "seconds": {"training": round(trained - start, 1), "audit": round(time.process_time() - trained, 1)},
    }
