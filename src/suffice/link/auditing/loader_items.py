"""Score chosen items of a DataLoader: the edges of code that scores batches of a loader instead of pairs of nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from suffice.arguments import check_callable, shown


class LoaderItems:
    """The items of a loader, collated as the loader does.

    Args:
        loader: a `DataLoader` of torch or PyG, or a link loader of PyG, of which each item is one edge.

    Raises:
        TypeError: `loader` is something else, or has no numbered items.
        ValueError: a link loader adds negatives of its own to each batch, or items are not collated.

    """

    def __init__(self, loader: Any) -> None:
        dataset: Any = getattr(loader, "dataset", None)
        collate: Any = getattr(loader, "collate_fn", None)
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and callable(collate)):
            raise TypeError(f"loader must be a DataLoader whose dataset has numbered items, got {shown(loader)}")
        if all(getattr(loader, name, "none") is None for name in ("batch_size", "batch_sampler")):
            raise ValueError("loader must collate items into batches, got batch_size=None")
        if getattr(loader, "neg_sampling", None) is not None:
            raise ValueError(
                f"loader must hold positives and negatives with edge_label, and sample no negatives itself, got "
                f"neg_sampling={loader.neg_sampling}"
            )
        self._loader, self._dataset, self._collate = loader, dataset, collate
        self._items: dict[int, Any] = {}

    def batch(self, numbers: Tensor) -> Any:
        """Return items as one batch. Items of a dataset are read once; a link loader samples neighbors each time."""
        if callable(self._loader):
            return self._loader(numbers)
        return self._collate([self._item(number) for number in numbers.tolist()])

    def labels(self, given: object) -> Tensor:
        """Return the labels of all items, bool [items].

        Args:
            given: labels of the user, or None for those of the loader.

        Raises:
            TypeError: there are no labels.
            ValueError: labels are not one of 0 and 1 for each item.

        """
        found = self._own_labels() if given is None else given
        try:
            labels = torch.as_tensor(found).reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"labels must be 0 and 1, one for each item, got {shown(given)}") from None
        if labels.numel() != len(self._dataset) or not bool(((labels == 0) | (labels == 1)).all()):
            values = sorted(set(labels.tolist()))[:5]
            raise ValueError(
                f"labels must be 0 and 1, one for each of {len(self._dataset)} items, got {labels.numel()} labels with "
                f"values {shown(values)}"
            )
        return labels.bool()

    def _own_labels(self) -> Any:
        if callable(self._loader):
            found = getattr(getattr(self._loader, "input_data", None), "label", None)
        else:
            found = [_label(self._item(number)) for number in range(len(self._dataset))]
            found = None if any(label is None for label in found) else found
        if found is None:
            raise TypeError(
                "labels must be given, because the items of the loader have none (edge_label or y), got None"
            )
        return found

    def _item(self, number: int) -> Any:
        if number not in self._items:
            self._items[number] = self._dataset[number]
        return self._items[number]


def number_items(loader: Any, score: Callable[[Any], Any], labels: object) -> tuple[Tensor, Tensor, Any]:
    """Return the numbers of positive items, those of negative ones (each [2, items], two equal rows), and their score.

    Args:
        loader: see `LoaderItems`.
        score: scoring function of a batch.
        labels: labels of all items, or None for those of the loader.

    """
    check_callable("score", score)
    items = LoaderItems(loader)
    is_positive = items.labels(labels)
    numbers = torch.arange(is_positive.numel())
    return (
        numbers[is_positive].expand(2, -1),
        numbers[~is_positive].expand(2, -1),
        lambda pairs: score(items.batch(pairs[0])),  # pyright: ignore[reportUnknownLambdaType]
    )


def _label(item: Any) -> float | None:
    """Return the label of an item: its attribute `y`, or the last of several parts; None if there is none."""
    label = item[-1] if isinstance(item, (tuple, list)) else getattr(item, "y", None)
    try:
        return None if label is None else float(label)
    except (TypeError, ValueError):
        return None
