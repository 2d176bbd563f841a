"""Edges to audit a model on, and how they are passed to a scoring function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from suffice.arguments import check_callable, shown
from suffice.link.auditing.loader_items import number_items

MIN_EDGES = 16

Score = Callable[..., Any]
"""Scoring function: pairs [2, edges], and items if the edges have any -> scores [edges]."""

Array = Tensor | np.ndarray[Any, Any]
Pairs = Array | tuple[Any, Any] | list[Any]
"""Pairs of nodes [2, edges]: a tensor, an array, or a tuple of source and target nodes."""


@dataclass(frozen=True, init=False, eq=False)
class EdgeSet:
    """Edges to audit a model on.

    Args:
        positives: edges of the graph, integers [2, positives]: a tensor, an array, or a tuple of source and target
            nodes; at least 16 edges.
        negatives: pairs of nodes without an edge, integers [2, negatives], in the same form; at least 16 pairs.
        score: scoring function for these edges; None for the scoring function of the audit. Training edges, for
            example, must be scored on a graph without them. It is called with pairs of the form of `positives`: with an
            array if that is an array, else with a tensor.
        items: what edges have in addition to their nodes, such as a time or a relation, by name: values of the
            positives and values of the negatives, each a tensor or an array [edges, …]. The values of the pairs of a
            batch are passed to `score` as a keyword argument of that name.

    Raises:
        TypeError: node ids are not integers, or items have another form.
        ValueError: a tensor has a wrong shape or too few edges.

    Example:
        >>> positives, negatives = torch.ones(2, 64).long(), torch.zeros(2, 64).long()
        >>> edges = EdgeSet(positives, negatives, items={"time": (torch.arange(64), torch.arange(64))})
        >>> edges.items["time"].shape
        torch.Size([128])

    """

    positives: Tensor
    negatives: Tensor
    score: Score | None
    items: dict[str, Array]
    is_numpy: bool

    def __init__(
        self,
        positives: Pairs,
        negatives: Pairs,
        score: Score | None = None,
        *,
        items: Mapping[str, tuple[Array, Array]] | None = None,
    ) -> None:
        if score is not None:
            check_callable("score", score)
        edges = {name: _as_pairs(name, given) for name, given in (("positives", positives), ("negatives", negatives))}
        sizes = [pairs.size(1) for pairs in edges.values()]
        both = {name: _join_items(name, values, sizes) for name, values in _check_items(items).items()}
        values = {**edges, "score": score, "items": both, "is_numpy": isinstance(positives, np.ndarray)}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_loader(cls, loader: Any, score: Callable[[Any], Any], labels: Any = None) -> EdgeSet:
        """Return the items of a loader as edges, for models that score a batch of a loader instead of pairs of nodes.

        Each batch of an audit consists of chosen items, which are collated as the loader does. Its order, batch size
        and sampler are not used. Items of a dataset, such as enclosing subgraphs, are read once. The set has its own
        scoring function, so pass the model as `score` of the audit: `audit(model, EdgeSet.from_loader(loader, model))`.

        Args:
            loader: a `DataLoader` of torch or PyG of which each item is one edge, or its enclosing subgraph; or PyG's
                `LinkNeighborLoader` with `edge_label` and without negative sampling.
            score: scoring function of a batch: the model, or a function such as `lambda batch: model(batch.x)`.
            labels: 1 for positives and 0 for negatives, [items]. By default, `edge_label` of PyG's link loaders, and
                else attribute `y` of each item, or its last part if it is a tuple.

        Raises:
            TypeError: `loader` is no such loader, or there are no labels.
            ValueError: labels are not 0 and 1, there are too few items, or the loader samples negatives itself.

        Example:
            >>> from torch.utils.data import DataLoader, TensorDataset
            >>> features, labels = torch.randn(40, 3), torch.arange(40) < 20
            >>> loader = DataLoader(TensorDataset(features, labels), batch_size=8)
            >>> edges = EdgeSet.from_loader(loader, lambda batch: batch[0].sum(1))
            >>> edges.positives.shape, edges.negatives.shape
            (torch.Size([2, 20]), torch.Size([2, 20]))

        """
        positives, negatives, score_items = number_items(loader, score, labels)
        if min(positives.size(1), negatives.size(1)) < MIN_EDGES:
            raise ValueError(
                f"loader must have at least {MIN_EDGES} positives and {MIN_EDGES} negatives, got {positives.size(1)} "
                f"and {negatives.size(1)}"
            )
        return cls(positives, negatives, score_items)

    def bind(self, score: Score) -> NumberedEdges:
        """Return the edges with their numbers, and with a function that calls the scoring function with their items.

        Args:
            score: scoring function for edges without one of their own.

        """
        own_score = self.score or score
        sizes = [self.positives.size(1), self.negatives.size(1)]
        of_positives, of_negatives = torch.arange(sum(sizes), device=self.positives.device).split(sizes)
        negatives = self.negatives.to(self.positives.device)

        def score_numbered(pairs: Tensor) -> Tensor:
            values = {name: _select(value, pairs[2]) for name, value in self.items.items()}
            given = pairs[:2].cpu().numpy() if self.is_numpy else pairs[:2]
            return _check_scores(own_score(given, **values), pairs.size(1))

        return NumberedEdges(
            torch.cat([self.positives, of_positives[None]]),
            torch.cat([negatives, of_negatives[None]]),
            score_numbered,
        )


@dataclass(frozen=True)
class NumberedEdges:
    """Edges with their numbers, and the function that scores them.

    Args:
        positives: source, target and number of each positive, long [3, positives].
        negatives: source, target and number of each negative, long [3, negatives].
        score: function of some of them, [3, edges] -> scores, float32 or float64 [edges] on the CPU.

    """

    positives: Tensor
    negatives: Tensor
    score: Callable[[Tensor], Tensor]


def _as_pairs(name: str, given: Pairs) -> Tensor:
    """Return pairs as a tensor, long [2, edges]."""
    accepted = f"integers of shape [2, edges] with at least {MIN_EDGES} edges"
    try:
        if isinstance(given, (tuple, list)) and len(given) == 2:
            sides = [side if isinstance(side, Tensor) else torch.as_tensor(np.asarray(side)) for side in given]
            pairs = torch.stack([side.to(sides[0].device) for side in sides])
        else:
            pairs = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be {accepted}, got {shown(given)}") from error
    if pairs.is_floating_point() or pairs.is_complex() or pairs.dtype == torch.bool:
        raise TypeError(f"{name} must be {accepted}, got numbers of type {pairs.dtype}")
    if pairs.ndim != 2 or pairs.size(0) != 2 or pairs.size(1) < MIN_EDGES:
        raise ValueError(f"{name} must have shape [2, edges] with at least {MIN_EDGES} edges, got {tuple(pairs.shape)}")
    return pairs.long()


def _check_items(items: Mapping[str, tuple[Array, Array]] | None) -> Mapping[str, tuple[Array, Array]]:
    if items is None:
        return {}
    checked: object = items
    if not isinstance(checked, Mapping) or not all(isinstance(name, str) for name in cast(Mapping[Any, Any], checked)):
        raise TypeError(
            f"items must be a mapping of names to values of positives and negatives, such as "
            f"{{'time': (positive_times, negative_times)}}, got {shown(items)}"
        )
    return items


def _join_items(name: str, values: object, sizes: list[int]) -> Array:
    """Return the values of positives and negatives as one tensor or array [positives + negatives, …]."""
    is_pair = isinstance(values, (tuple, list)) and len(cast(tuple[Any, ...], values)) == 2
    if not is_pair or not all(isinstance(value, (Tensor, np.ndarray)) for value in cast(tuple[Any, Any], values)):
        raise TypeError(
            f"items[{name!r}] must be a tuple of two tensors or arrays, of the positives and of the negatives, got "
            f"{shown(values)}"
        )
    of_positives, of_negatives = cast(tuple[Array, Array], values)
    shapes = [tuple(value.shape) for value in (of_positives, of_negatives)]
    if [shape[:1] for shape in shapes] != [(size,) for size in sizes] or shapes[0][1:] != shapes[1][1:]:
        raise ValueError(
            f"items[{name!r}] must have one value for each of {sizes[0]} positives and {sizes[1]} negatives, all of "
            f"one shape, got shapes {shapes[0]} and {shapes[1]}"
        )
    if isinstance(of_positives, Tensor) and isinstance(of_negatives, Tensor):
        return torch.cat([of_positives, of_negatives.to(of_positives.device)])
    return np.concatenate([np.asarray(of_positives), np.asarray(of_negatives)])


def _select(values: Array, numbers: Tensor) -> Array:
    return values[numbers.to(values.device)] if isinstance(values, Tensor) else values[numbers.cpu().numpy()]


def _check_scores(scores: object, num_pairs: int) -> Tensor:
    """Return scores as a tensor [edges] on the CPU: float32, or float64 if they are of that type or no floats."""
    found = scores
    if isinstance(found, (tuple, list)) and len(cast(tuple[Any, ...], found)) == 1 and num_pairs > 1:
        found = found[0]  # a function that returns (scores,)
    has_tensors = isinstance(found, (tuple, list)) and any(
        isinstance(value, Tensor) and value.ndim > 0 for value in cast(tuple[Any, ...], found)
    )
    if isinstance(found, (tuple, list, np.ndarray, float, int)) and not has_tensors:
        try:
            found = _as_floats(found)
        except (TypeError, ValueError, RuntimeError):
            found = scores
    if not isinstance(found, Tensor):
        raise TypeError(
            f"score must return a tensor of scores [edges], an array or a tuple of numbers, got {shown(scores)}"
        )
    is_single = found.is_floating_point() and found.dtype != torch.float64
    found = found.detach().to(torch.float32 if is_single else torch.float64).cpu().reshape(-1)
    if found.numel() != num_pairs:
        raise ValueError(f"score must return one score per pair, got {found.numel()} scores for {num_pairs} pairs")
    if not bool(found.isfinite().all()):
        raise ValueError(f"score must return finite scores, got {int((~found.isfinite()).sum())} NaN or infinite ones")
    return found


def _as_floats(numbers: object) -> Tensor:
    """Return numbers as float32 if they are of that type, or plain numbers that it holds exactly; else as float64."""
    array = np.asarray(numbers)
    values = array.astype(np.float64)
    is_single = array.dtype.kind == "f" and array.dtype.itemsize < 8
    if not isinstance(numbers, np.ndarray):
        is_single = bool((values.astype(np.float32) == values).all())
    return torch.as_tensor(values.astype(np.float32) if is_single else values)
