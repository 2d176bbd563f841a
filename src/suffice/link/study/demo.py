"""A small study on the two built-in graphs: what the composition of batches does to the same model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from suffice.link.data.datasets import load_graph
from suffice.link.study.arms import parse_arm
from suffice.link.study.correct import correct, edge_maps
from suffice.link.study.results import Study
from suffice.link.train.config import TrainConfig

GRAPHS = ("digits", "block-model")
ARMS = ("fixed/batch", "random/batch", "separate/batch", "fixed/layer")


@dataclass(frozen=True)
class Example:
    """A study on one graph, and incident-edge means and classes of its first two arms."""

    study: Study
    maps: dict[str, tuple[Tensor, Tensor]]


def run(*, epochs: int = 12, seed: int = 0, device: str = "cpu", say: Callable[[str], None]) -> list[Example]:
    """Train four arms on the digits graph and on the block model, one seed each.

    Args:
        epochs: of every training.
        seed: of splits, models and batches.
        device: where to train.
        say: called with a line for each finished run.

    """
    arms = [parse_arm(key) for key in ARMS]
    examples: list[Example] = []
    for name in GRAPHS:
        graph = load_graph(name)
        with tempfile.TemporaryDirectory() as folder:
            study = correct(
                graph,
                arms=arms,
                train=TrainConfig(epochs=epochs),
                seeds=1,
                seed=seed,
                device=device,
                folder=folder,
                progress=lambda line, name=name: say(f"{name}: {line}"),
            )
            examples.append(Example(study, edge_maps(graph, arms[:2], folder, seed=seed)))
    return examples


def conclusions(examples: list[Example]) -> list[str]:
    """Say what happened, in words made from the numbers."""
    said: list[str] = []
    for example in examples:
        study = example.study
        for key, runs in study.runs.items():
            values = runs[0]["values"]
            said.append(
                f"{study.graph}, {key}: {runs[0]['verdict']}. Accuracy {values['accuracy_balanced:heldout']:.2f} in "
                f"batches half positive, {values['a_pure:heldout']:.2f} in pure ones, "
                f"{values['accuracy_eval:heldout']:.2f} in eval mode; edge NMI {values['edge_nmi']:.2f}."
            )
    said.append("One seed a graph: enough to look at, not to claim a difference; `suffice link correct` repeats.")
    return said
