"""What an audit does before it scores: check the edges, find the modules behind `score`, and keep their state."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from suffice.arguments import check_names, shown
from suffice.link.auditing.edge_set import MIN_EDGES, EdgeSet, NumberedEdges, Score
from suffice.link.auditing.encode_once import keep_encodings
from suffice.link.auditing.module_state import (
    Modes,
    WithoutDropout,
    check_module,
    find_modules,
    join_modules,
    layers_kept_in_eval_mode,
)
from suffice.link.auditing.norm_layers import batch_norms, check_batch_norms
from suffice.link.auditing.snapshot import State, preserve_state


def check_score(score: object) -> None:
    """Check that a scoring function can be called.

    Raises:
        TypeError: it cannot.

    """
    if not callable(score):
        raise TypeError(f"score must be a function or module that scores pairs, got {type(score).__name__}")


def check_edges(edges: object) -> dict[str, EdgeSet]:
    """Return sets of edges by name.

    Raises:
        TypeError: `edges` are neither an `EdgeSet` nor a mapping of names to such sets.
        ValueError: the mapping is empty.

    """
    if isinstance(edges, EdgeSet):
        return {"heldout": edges}
    sets = dict(cast(Mapping[str, EdgeSet], edges)) if isinstance(edges, Mapping) else None
    if sets is None or not all(
        isinstance(name, str) and isinstance(edge_set, EdgeSet) for name, edge_set in cast(dict[Any, Any], sets).items()
    ):
        raise TypeError(f"edges must be an EdgeSet or a mapping of names to EdgeSets, got {shown(edges)}")
    if not sets:
        raise ValueError("edges must contain at least one EdgeSet, got an empty mapping")
    return sets


@dataclass(frozen=True)
class Prepared:
    """A scoring function that can be called in training and in eval mode.

    Args:
        edges: numbered edges by the name of the set, with the function that scores them.
        modes: how the module behind the scoring function is run in training and in eval mode.
        restore: restores the state of the module and of the scoring function.

    """

    edges: dict[str, NumberedEdges]
    modes: Modes
    restore: State


@contextmanager
def prepare(
    score: Score | nn.Module,
    edge_sets: Mapping[str, EdgeSet],
    *,
    module: nn.Module | Sequence[nn.Module] | None,
    frozen: Sequence[str],
    seed: int,
) -> Generator[Prepared]:
    """Turn off gradients and dropout, seed torch, and let functions of `encode_once` keep their encodings until exit.

    On exit, the state of modules, scoring functions and random generators is as before.

    Args:
        score: scoring function.
        edge_sets: sets of edges by name.
        module: module behind `score`, several, or None to find them.
        frozen: names of BatchNorm layers that kept their running statistics in training.
        seed: seed of the generators of torch.

    """
    module, frozen = check_module(module), check_names("frozen", frozen, "names of layers", "['decoder.norm']")
    scores = [score, *(edge_set.score for edge_set in edge_sets.values() if edge_set.score)]
    bound = {name: edge_set.bind(score) for name, edge_set in edge_sets.items()}
    if module is not None and not isinstance(module, nn.Module):
        module = join_modules(module)
    elif module is None:
        module = _find_module(scores, bound.values())
    with preserve_state(module, scores) as restore, WithoutDropout(), keep_encodings():
        torch.manual_seed(seed)
        yield Prepared(bound, Modes(module, _frozen_layers(module, frozen)), restore)


def _find_module(scores: Sequence[Score], edge_sets: Iterable[NumberedEdges]) -> nn.Module | None:
    """Return the modules behind the scoring functions, which score a few pairs for it."""
    if isinstance(scores[0], nn.Module):
        return scores[0]

    def call() -> None:
        for edge_set in edge_sets:
            edge_set.score(edge_set.positives[:, :MIN_EDGES])

    with preserve_state(find_modules(scores), scores):
        return find_modules(scores, call)


def _frozen_layers(module: nn.Module | None, names: Sequence[str]) -> set[str]:
    """Return the names of the layers that keep their statistics in training."""
    if module is None:
        if names:
            raise ValueError(
                f"frozen must contain names of BatchNorm layers of the module, but no module was found behind score: "
                f"pass it as module, got {sorted(names)}"
            )
        return set()
    return check_batch_norms(module, names) | (layers_kept_in_eval_mode(module) & batch_norms(module).keys())
