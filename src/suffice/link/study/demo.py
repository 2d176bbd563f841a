"""A small study on the two built-in graphs: how the composition of batches changes the same model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from suffice.link.data.datasets import load_graph
from suffice.link.study.arms import parse_arm
from suffice.link.study.correct import correct, load_edge_representations
from suffice.link.study.results import StudyResults
from suffice.link.train.config import TrainConfig

DEMO_GRAPHS = ("digits", "block-model")
DEMO_ARMS = ("fixed/batch", "random/batch", "separate/batch", "fixed/layer")


@dataclass(frozen=True)
class DemoResults:
    """Results on one graph.

    Args:
        results: results of the study.
        representations: edge representations and classes of the first two arms.

    """

    results: StudyResults
    representations: dict[str, tuple[Tensor, Tensor]]


def run_demo(*, epochs: int = 12, seed: int = 0, device: str = "cpu", log: Callable[[str], None]) -> list[DemoResults]:
    """Train four arms on the digits graph and on the block model, with one seed each.

    Args:
        epochs: number of epochs of every training.
        seed: seed of splits, models and batches.
        device: Torch device.
        log: called with a line for each finished run.

    """
    arms = [parse_arm(key) for key in DEMO_ARMS]
    demo: list[DemoResults] = []
    for name in DEMO_GRAPHS:
        graph = load_graph(name)
        with tempfile.TemporaryDirectory() as folder:
            results = correct(
                graph,
                arms=arms,
                train=TrainConfig(epochs=epochs),
                seeds=1,
                first_seed=seed,
                device=device,
                folder=folder,
                log=lambda line, name=name: log(f"{name}: {line}"),
            )
            demo.append(DemoResults(results, load_edge_representations(graph, arms[:2], folder, seed=seed)))
    return demo


def describe_results(demo: Sequence[DemoResults]) -> list[str]:
    """Return a sentence for each graph and arm, made from the numbers."""
    sentences: list[str] = []
    for example in demo:
        results = example.results
        for key, arm in results.arms.items():
            mean = {metric: results.mean(key, metric).mean for metric in arm.group.values}
            sentences.append(
                f"{results.graph}, {key}: {', '.join(arm.verdicts.values())}. Accuracy is "
                f"{mean['accuracy_balanced:heldout']:.2f} in batches with 50 % positives, "
                f"{mean['a_pure:heldout']:.2f} in pure batches and {mean['accuracy_eval:heldout']:.2f} in eval mode; "
                f"edge NMI is {mean['edge_nmi']:.2f}."
            )
    sentences.append(
        "One seed per graph shows the effect but does not prove a difference. `suffice link correct` repeats the study "
        "with several seeds."
    )
    return sentences
