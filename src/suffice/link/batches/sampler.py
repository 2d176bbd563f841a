"""Batches of labelled edges with a given composition, for any loop and for PyG's loaders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from suffice.link.batches.composition import Composition, class_weights
from suffice.link.batches.negatives import NegativeSampler, TooFewNegativesError


@dataclass(frozen=True)
class EdgeBatch:
    """One mini-batch: positives first.

    Args:
        pairs: long [2, edges].
        labels: 1 for positives, 0 for negatives, float32 [edges].
        weights: loss weights, float32 [edges]; None unless balanced.
        index: which of the positives it holds, long [positives].

    """

    pairs: Tensor
    labels: Tensor
    weights: Tensor | None
    index: Tensor

    @property
    def fraction(self) -> float:
        """Realised fraction of positives."""
        return self.index.numel() / self.labels.numel()


class EdgeBatches:
    """Iterable over the mini-batches of an epoch: every positive once, negatives fresh and checked.

    Args:
        positives: edges to learn, each once, long [2, positives].
        num_nodes: nodes of the graph.
        composition: how many positives a batch holds.
        batch_size: edges in a batch.
        known: edges that are never drawn as negatives (all edges of the graph, and the negatives of other
            splits), long [2, edges]; the positives are always known.
        balanced: give each batch weights under which both classes count the same.
        seed: with the epoch, decides everything; equal on all ranks of a distributed run.
        rank: this process.
        world_size: number of processes; each sees its own edges at the shared fractions.

    `fractions` holds the realised fraction of every batch of the epoch that was iterated last.

    Raises:
        ValueError: an argument is out of range, or a batch needs more negatives than there are.

    """

    def __init__(
        self,
        positives: Tensor,
        num_nodes: int,
        composition: Composition,
        *,
        batch_size: int = 512,
        known: Tensor | None = None,
        balanced: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if positives.ndim != 2 or positives.size(0) != 2 or positives.size(1) < world_size:
            raise ValueError(f"positives has shape {tuple(positives.shape)}; accepted: [2, edges] with an edge a rank")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; accepted: 0 to world_size - 1, {world_size - 1}")
        self.positives = positives
        self.num_nodes = num_nodes
        self.composition = composition
        self.batch_size = batch_size
        never = positives if known is None else torch.cat([positives, known], dim=1)
        self.sampler = NegativeSampler(never, num_nodes)
        self.balanced = balanced
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.fractions: list[float] = []
        self._plan(self._generator())  # so that a batch size that can't work fails before the first epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws."""
        self.epoch = epoch

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)

    def _plan(self, generator: torch.Generator) -> list[tuple[int, int]]:
        # The largest share of any rank: with the same plan, all ranks take the same number of steps.
        return self.composition.plan(-(-self.positives.size(1) // self.world_size), self.batch_size, generator)

    def __len__(self) -> int:
        return len(self._plan(self._generator()))

    def __iter__(self) -> Iterator[EdgeBatch]:
        generator = self._generator()
        plan = self._plan(generator)
        device = self.positives.device
        order = torch.randperm(self.positives.size(1), generator=generator)
        # All negatives of an epoch in one draw, distinct, dealt out to the ranks.
        needed = sum(negatives for _, negatives in plan) * self.world_size
        most = max(negatives for _, negatives in plan) * self.world_size
        draw = int(torch.randint(2**31, (), generator=generator))
        pool = self._negatives(needed, most, draw)
        spare = torch.randperm(pool.size(1), generator=generator)
        order, pool = order[self.rank :: self.world_size], pool[:, spare[self.rank :: self.world_size]]
        order, pool = order.to(device), pool.to(device)
        self.fractions = []
        start = used = 0
        for positives, negatives in plan:
            index = order[start : start + positives]
            if used + negatives > pool.size(1):
                # A dense graph: start over; the pool covers any single batch, so that none repeats a pair.
                used = 0
                pool = pool[:, torch.randperm(pool.size(1), generator=generator).to(device)]
            chosen = pool[:, used : used + negatives]
            start, used = start + positives, used + negatives
            pairs = torch.cat([self.positives[:, index], chosen], dim=1)
            labels = torch.zeros(pairs.size(1), device=device)
            labels[: index.numel()] = 1
            weights = None
            if self.balanced:
                ones, zeros = class_weights(index.numel(), negatives)
                weights = torch.full_like(labels, zeros)
                weights[: index.numel()] = ones
            batch = EdgeBatch(pairs, labels, weights, index)
            self.fractions.append(batch.fraction)
            yield batch

    def _negatives(self, needed: int, most: int, seed: int) -> Tensor:
        if needed == 0:
            return self.positives.new_empty((2, 0))
        free = self.sampler.free
        if free < most:
            raise TooFewNegativesError(
                f"batch_size is {self.batch_size}: a step needs {most} negatives; accepted: "
                f"at most the {free} pairs of {self.num_nodes} nodes without edge"
            )
        return self.sampler.draw(min(needed, free), seed)


class LabelledBatches(Sampler[list[int]]):
    """A `batch_sampler` over labelled edges, as PyG's `LinkNeighborLoader` and any `DataLoader` take it.

    Every positive comes exactly once an epoch. Negatives come from those in `labels`, none twice in a batch,
    all of them once before any comes again.

    Args:
        labels: above 0 for positives, 0 for negatives, [edges].
        composition: how many positives a batch holds.
        batch_size: edges in a batch.
        seed: with the number of the epoch, decides every batch.

    Raises:
        ValueError: there is no positive, or fewer negatives than a batch needs.

    Example:
        >>> from suffice.link.batches.composition import Fixed
        >>> sampler = LabelledBatches(torch.tensor([1, 1, 0, 0]), Fixed(0.5), batch_size=2)
        >>> sorted(len(batch) for batch in sampler), sampler.fractions
        ([2, 2], [0.5, 0.5])

    """

    def __init__(self, labels: Tensor, composition: Composition, *, batch_size: int = 512, seed: int = 0) -> None:
        self.positives = (labels > 0).nonzero().flatten()
        self.negatives = (labels == 0).nonzero().flatten()
        self.composition = composition
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.fractions: list[float] = []
        self._plan(self._generator())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws; without it, epochs count themselves."""
        self.epoch = epoch

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)

    def _plan(self, generator: torch.Generator) -> list[tuple[int, int]]:
        plan = self.composition.plan(self.positives.numel(), self.batch_size, generator)
        most = max(negatives for _, negatives in plan)
        if most > self.negatives.numel():
            raise TooFewNegativesError(
                f"labels hold {self.negatives.numel()} negatives; accepted: at least the {most} of a batch"
            )
        return plan

    def __len__(self) -> int:
        return len(self._plan(self._generator()))

    def __iter__(self) -> Iterator[list[int]]:
        generator = self._generator()
        plan = self._plan(generator)
        self.epoch += 1
        order = self.positives[torch.randperm(self.positives.numel(), generator=generator)]
        queue = self.negatives.new_empty(0)
        self.fractions = []
        start = 0
        for positives, negatives in plan:
            if queue.numel() < negatives:
                # What is left of the last round goes first and is kept out of the rest of this batch.
                fresh = self.negatives[torch.randperm(self.negatives.numel(), generator=generator)]
                again = torch.isin(fresh, queue)
                queue = torch.cat([queue, fresh[~again], fresh[again]])
            batch = torch.cat([order[start : start + positives], queue[:negatives]])
            start, queue = start + positives, queue[negatives:]
            self.fractions.append(positives / batch.numel())
            yield batch.tolist()
