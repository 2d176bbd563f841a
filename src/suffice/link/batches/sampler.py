"""Mini-batches of labeled edges with a given composition, for any training loop and for PyG's loaders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import Sampler

from suffice.arguments import check_flag, check_instance, check_int, shown
from suffice.link.batches.composition import BatchCounts, Composition, class_weights
from suffice.link.batches.negatives import NegativeSampler, TooFewNegativesError, check_num_nodes, check_pairs


@dataclass(frozen=True)
class EdgeBatch:
    """One mini-batch of edges, positives first.

    Args:
        pairs: positive and negative edges, long [2, edges].
        labels: 1 for positives, 0 for negatives, float32 [edges].
        weights: loss weights, float32 [edges]; None unless the loss is balanced.
        positive_index: indices of the positives within all positives, long [positives].

    """

    pairs: Tensor
    labels: Tensor
    weights: Tensor | None
    positive_index: Tensor

    @property
    def fraction(self) -> float:
        """Fraction of positives in the batch."""
        return self.positive_index.numel() / self.labels.numel()


class EdgeBatches:
    """Iterable over the mini-batches of one epoch.

    Every positive is used once. Negatives are sampled anew in each epoch and are never a known edge.

    Args:
        positives: edges to learn, each once, long [2, positives].
        num_nodes: number of nodes, or the numbers of both sides of a bipartite graph (see `NegativeSampler`).
        composition: how many positives a batch contains.
        batch_size: edges in a batch (of each rank).
        known: more edges that are never sampled as negatives, such as all edges of the graph and the negatives of
            validation and test, long [2, edges]. The positives are always excluded.
        balanced: whether batches have loss weights that give both classes the same total weight.
        seed: seed of all batches; must be the same on all ranks.
        rank: rank of this process.
        world_size: number of processes. Each gets its own edges; all draw the same fractions.

    Attributes:
        fractions: fraction of positives in each batch of the last iterated epoch.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, `positives` or `known` have another shape or node ids out of range, or
            a batch needs more negatives than the graph has.

    """

    def __init__(
        self,
        positives: Tensor,
        num_nodes: int | tuple[int, int],
        composition: Composition,
        *,
        batch_size: int = 512,
        known: Tensor | None = None,
        balanced: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        num_nodes = check_num_nodes(num_nodes)
        if not isinstance(cast(object, positives), Tensor):
            raise TypeError(f"positives must be a tensor of integers [2, edges], got {shown(positives)}")
        if positives.ndim != 2 or positives.size(0) != 2 or positives.size(1) < world_size:
            raise ValueError(
                f"positives must have shape [2, edges] with at least one edge per rank, got {tuple(positives.shape)}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to world_size - 1 = {world_size - 1}, got {rank}")
        self.positives = positives  # checked below
        self.composition = check_instance("composition", composition, Composition, "Random()")
        self.batch_size = batch_size
        self.balanced = check_flag("balanced", balanced)
        self.seed = check_int("seed", seed)
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.fractions: list[float] = []
        self._plan(_epoch_generator(seed, 0))  # raises if the batch size is impossible
        excluded = self.positives = check_pairs("positives", positives, num_nodes)
        if known is not None:
            excluded = torch.cat([excluded, check_pairs("known", known, num_nodes)], dim=1)
        self._negative_sampler = NegativeSampler(excluded, num_nodes)
        self.num_nodes = self._negative_sampler.num_nodes

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._plan(_epoch_generator(self.seed, self.epoch)))

    def __iter__(self) -> Iterator[EdgeBatch]:
        generator = _epoch_generator(self.seed, self.epoch)
        plan = self._plan(generator)
        device = self.positives.device
        order = torch.randperm(self.positives.size(1), generator=generator)
        # The negatives of all batches and ranks are sampled at once, so that they are distinct.
        negatives_seed = int(torch.randint(2**31, (), generator=generator))
        pool = self._sample_negatives(plan, negatives_seed)
        pool_order = torch.randperm(pool.size(1), generator=generator)
        order = order[self.rank :: self.world_size].to(device)
        pool = pool[:, pool_order[self.rank :: self.world_size]].to(device)
        self.fractions = []
        positives_used = negatives_used = 0
        for num_positives, num_negatives in plan:
            index = order[positives_used : positives_used + num_positives]
            if negatives_used + num_negatives > pool.size(1):
                # A dense graph has too few negatives for an epoch, so start over. The pool is large enough for any
                # single batch, which therefore contains no pair twice.
                negatives_used = 0
                pool = pool[:, torch.randperm(pool.size(1), generator=generator).to(device)]
            negatives = pool[:, negatives_used : negatives_used + num_negatives]
            positives_used += num_positives
            negatives_used += num_negatives
            batch = self._make_batch(index, negatives)
            self.fractions.append(batch.fraction)
            yield batch

    def _plan(self, generator: torch.Generator) -> list[BatchCounts]:
        # All ranks plan for the largest share of any rank, so that they take the same number of steps.
        positives_per_rank = -(-self.positives.size(1) // self.world_size)
        return self.composition.plan(positives_per_rank, self.batch_size, generator)

    def _sample_negatives(self, plan: list[BatchCounts], seed: int) -> Tensor:
        """Sample the negatives of an epoch, or all pairs without an edge if these are fewer, long [2, negatives]."""
        counts = [negatives * self.world_size for _, negatives in plan]
        if sum(counts) == 0:
            return self.positives.new_empty((2, 0))
        available = self._negative_sampler.num_available
        if available < max(counts):
            raise TooFewNegativesError(
                f"batch_size must be small enough that a step needs at most {available} negatives, the number of "
                f"pairs of {self.num_nodes} nodes without an edge, got {self.batch_size}, with which a step needs "
                f"{max(counts)}"
            )
        return self._negative_sampler.sample(min(sum(counts), available), seed)

    def _make_batch(self, positive_index: Tensor, negatives: Tensor) -> EdgeBatch:
        num_positives = positive_index.numel()
        pairs = torch.cat([self.positives[:, positive_index], negatives], dim=1)
        labels = torch.zeros(pairs.size(1), device=pairs.device)
        labels[:num_positives] = 1
        weights = None
        if self.balanced:
            positive_weight, negative_weight = class_weights(num_positives, negatives.size(1))
            weights = torch.full_like(labels, negative_weight)
            weights[:num_positives] = positive_weight
        return EdgeBatch(pairs, labels, weights, positive_index)


class CompositionBatchSampler(Sampler[list[int]]):
    """A `batch_sampler` over labeled edges for PyG's `LinkLoader` and `LinkNeighborLoader` and any `DataLoader`.

    Every positive is used exactly once per epoch. Negatives are those in `labels`; no batch contains one twice, and
    all are used once before any is used again.

    Args:
        labels: above 0 for positives, 0 for negatives, [edges].
        composition: how many positives a batch contains.
        batch_size: edges in a batch.
        seed: seed of all batches, together with the number of the epoch.

    Attributes:
        fractions: fraction of positives in each batch of the last iterated epoch.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `labels` are not one number of at least 0 for each edge, there is no positive, or a batch needs more
            negatives than there are.

    Example:
        >>> from suffice.link.batches.composition import Fixed
        >>> sampler = CompositionBatchSampler(torch.tensor([1, 1, 0, 0]), Fixed(0.5), batch_size=2)
        >>> sorted(len(batch) for batch in sampler), sampler.fractions
        ([2, 2], [0.5, 0.5])

    """

    def __init__(self, labels: Tensor, composition: Composition, *, batch_size: int = 512, seed: int = 0) -> None:
        _check_labels(labels)
        self.positives = (labels > 0).nonzero().flatten()
        self.negatives = (labels == 0).nonzero().flatten()
        self.composition = check_instance("composition", composition, Composition, "Random()")
        self.batch_size = batch_size
        self.seed = check_int("seed", seed)
        self.epoch = 0
        self.fractions: list[float] = []
        self._plan(_epoch_generator(seed, 0))  # raises if the batch size is impossible

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration. By default, each iteration is the next epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._plan(_epoch_generator(self.seed, self.epoch)))

    def __iter__(self) -> Iterator[list[int]]:
        generator = _epoch_generator(self.seed, self.epoch)
        plan = self._plan(generator)
        self.epoch += 1
        positives = self.positives[torch.randperm(self.positives.numel(), generator=generator)]
        queue = self.negatives.new_empty(0)
        self.fractions = []
        positives_used = 0
        for num_positives, num_negatives in plan:
            if queue.numel() < num_negatives:
                # Use the rest of the queue first; its negatives come last in the next round, outside of this batch.
                shuffled = self.negatives[torch.randperm(self.negatives.numel(), generator=generator)]
                is_queued = torch.isin(shuffled, queue)
                queue = torch.cat([queue, shuffled[~is_queued], shuffled[is_queued]])
            batch = torch.cat([positives[positives_used : positives_used + num_positives], queue[:num_negatives]])
            positives_used += num_positives
            queue = queue[num_negatives:]
            self.fractions.append(num_positives / batch.numel())
            yield batch.tolist()

    def _plan(self, generator: torch.Generator) -> list[BatchCounts]:
        plan = self.composition.plan(self.positives.numel(), self.batch_size, generator)
        needed = max(negatives for _, negatives in plan)
        if needed > self.negatives.numel():
            raise TooFewNegativesError(
                f"labels must contain at least {needed} negatives, the number in one batch, "
                f"got {self.negatives.numel()}"
            )
        return plan


def _check_labels(labels: object) -> None:
    accepted = "a tensor [edges] of numbers above 0 for positives and 0 for negatives"
    if not isinstance(labels, Tensor) or labels.is_complex():
        found = f"numbers of type {labels.dtype}" if isinstance(labels, Tensor) else shown(labels)
        raise TypeError(f"labels must be {accepted}, got {found}")
    if labels.ndim != 1:
        raise ValueError(f"labels must be {accepted}, got shape {tuple(labels.shape)}")
    is_wrong = ~(labels >= 0)  # negative or NaN
    if bool(is_wrong.any()):
        first = labels[is_wrong.nonzero()[0]].item()
        raise ValueError(f"labels must be {accepted}, got {int(is_wrong.sum())} others, the first is {first}")
    if not bool((labels > 0).any()):
        raise ValueError(f"labels must be above 0 for at least one edge, got {labels.numel()} negatives")


def _epoch_generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)
