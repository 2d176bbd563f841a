"""Why Hits@100 differs from the published numbers: variants of the published settings, each with one more change.

    python benchmarks/link_published.py --root DATA_FOLDER --folder runs [--write]

trains every variant on every split and prints a table. A second call with the same folder resumes. `--write` writes
the numbers to docs/results/link-published.json. For the unchanged published settings, run
`suffice link reproduce --preset --arms fixed/own`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from machine import machine
from suffice.link.data.datasets import load_graph
from suffice.link.data.graph import SplitConfig, prepare_graph, split_edges
from suffice.link.models import LinkPredictor
from suffice.link.study.published import HITS_AT_100
from suffice.link.study.reproduction import model_and_training
from suffice.link.train import trainer
from suffice.link.train.config import TrainConfig
from suffice.link.train.evaluate import evaluate
from suffice.link.train.trainer import fit

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "link-published.json"
# Settings under which the models are compared with the published numbers; a variant changes some of them.
SPLIT = {"validation": 0.1, "test": 0.2, "validation_edges_at_test": True}
TRAIN = {"epochs": 100, "patience": 20, "directions": 1}
NO_VALIDATION_EDGES = {"validation_edges_at_test": False}  # as the authors of NCN evaluate


@dataclass(frozen=True)
class Variant:
    """A training with settings other than the published ones.

    Args:
        model: name of the model.
        change: description of the changes.
        options: changed options of the model.
        train: changed settings of the training.
        split: changed settings of the split.
        keep_targets: whether the positives of a batch stay among the edges over which messages pass.
        modify: function that modifies the model before the training.

    """

    model: str
    change: str
    options: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    split: dict[str, Any] = field(default_factory=dict)
    keep_targets: bool = False
    modify: Callable[[LinkPredictor], None] | None = None


def add_norm_after_propagation(model: LinkPredictor) -> None:
    """Add a LayerNorm, which the authors do not use, to the encoder of NCN or NCNC."""
    encoder: Any = model.get_submodule("encoder")
    encoder.norms = nn.ModuleList(nn.LayerNorm(encoder.out_channels) for _ in encoder.norms)


def baseline_variants(model: str) -> list[Variant]:
    """Return the baseline, and step by step the changes that turn it into that of common example scripts."""
    wide = {"layers": 3, "hidden": 256}
    last = {"patience": None, "epochs": 40}
    return [
        Variant(model, "as here"),
        Variant(model, "target edges stay among the message edges", keep_targets=True),
        Variant(model, "also 3 layers with 256 channels", wide, keep_targets=True),
        Variant(model, "also the last of 40 epochs instead of the best", wide, last, keep_targets=True),
        Variant(model, "also no validation edges at test time", wide, last, NO_VALIDATION_EDGES, keep_targets=True),
    ]


VARIANTS = [
    *baseline_variants("gcn"),
    *baseline_variants("sage"),
    Variant("neognn", "2 layers (default)"),
    Variant("neognn", "3 layers, as the authors use on ogbl-collab", {"layers": 3}),
    Variant("elph", "a ReLU between the layers of the GNN", {"linear": False}),
    Variant("ncn", "validation edges at test time"),
    Variant("ncn", "no dropout after propagation", {"output_dropout": 0.0}, {}, NO_VALIDATION_EDGES),
    Variant("ncnc", "a norm after propagation", {}, {}, NO_VALIDATION_EDGES, modify=add_norm_after_propagation),
]


@contextmanager
def keep_target_edges(keep: bool) -> Iterator[None]:
    """Keep the positives of a batch among the message edges, as trainings do that leak them."""
    if not keep:
        yield
        return
    with mock.patch.object(trainer, "remove_edges", lambda edge_index, *_: edge_index):
        yield


def measure(variant: Variant, data: str, root: str, seed: int) -> dict[str, float]:
    """Return Hits@100 on the test and on the validation edges, in percent."""
    settings, training = model_and_training(variant.model, published_data=data)
    largest_component = variant.model not in ("ncn", "ncnc")
    config = SplitConfig(**{**SPLIT, "largest_component": largest_component, **variant.split})
    graph = prepare_graph(load_graph(data, root), config)
    split = split_edges(graph, config, seed)
    model = replace(settings, **variant.options).build(graph.x.size(1), seed)
    if variant.modify is not None:
        variant.modify(model)
    with keep_target_edges(variant.keep_targets):
        result = fit(model, graph, split, TrainConfig(**{**TRAIN, **training, **variant.train, "seed": seed}))
    test = evaluate(model, graph, split, config, 100)["hits@100"]
    return {"test": 100 * test, "validation": 100 * result.metric}


def rows(folder: Path, names: list[str], seeds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each data set and variant whose splits are all finished."""
    for data in names:
        for variant in VARIANTS:
            files = [_result_file(folder, variant, data, seed) for seed in range(seeds)]
            values = [json.loads(file.read_text()) for file in files if file.is_file()]
            if len(values) == seeds:
                test, validation = ([value[part] for value in values] for part in ("test", "validation"))
                deviation = stdev(test) if len(test) > 1 else 0.0
                published_mean, published_deviation = HITS_AT_100[data, variant.model]
                yield {
                    "data": data,
                    "model": variant.model,
                    "training": variant.change,
                    "splits": len(test),
                    "hits@100": round(fmean(test), 2),
                    "deviation": round(deviation, 2),
                    "validation": round(fmean(validation), 2),
                    "published": published_mean,
                    "gap_in_deviations": round((fmean(test) - published_mean) / published_deviation, 1),
                }


def _result_file(folder: Path, variant: Variant, data: str, seed: int) -> Path:
    name = f"{data}-{variant.model}-{variant.change}-{seed}".replace(" ", "_").replace(",", "")
    return folder / f"{name}.json"


def main() -> None:
    """Train the missing variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="Cora,CiteSeer", help="data sets, separated by commas")
    parser.add_argument("--root", default="data", help="folder of downloaded data sets")
    parser.add_argument("--folder", type=Path, default=Path("published"), help="folder of finished trainings")
    parser.add_argument("--models", help="train only these models, separated by commas")
    parser.add_argument("--seeds", type=int, default=5, help="number of splits")
    parser.add_argument("--write", action="store_true", help="write the numbers to docs/results/link-published.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.data.split(",")
    if unknown := [name for name in names if (name, "gcn") not in HITS_AT_100]:
        parser.error(f"--data must be among Cora, CiteSeer, got {', '.join(unknown)}")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=130)
    for data in names:
        for variant in VARIANTS:
            if arguments.models and variant.model not in arguments.models.split(","):
                continue
            for seed in range(arguments.seeds):
                file = _result_file(arguments.folder, variant, data, seed)
                if not file.is_file():
                    hits = measure(variant, data, arguments.root, seed)
                    file.write_text(json.dumps(hits))
                    console.print(f"{data} {variant.model} {variant.change} split {seed}: {hits['test']:.1f}")
    finished = list(rows(arguments.folder, names, arguments.seeds))
    table = Table("data", "model", "training", "Hits@100", "validation", "published", "gap in deviations")
    for row in finished:
        here = f"{row['hits@100']:.1f} ± {row['deviation']:.1f}"
        known, gap = f"{row['published']:.1f}", f"{row['gap_in_deviations']:+.1f}"
        table.add_row(row["data"], row["model"], row["training"], here, f"{row['validation']:.1f}", known, gap)
    console.print(table)
    if arguments.write:
        RESULTS.write_text(json.dumps({"machine": machine(), "rows": finished}, indent=1) + "\n")
    print(json.dumps({"rows": finished}))


if __name__ == "__main__":
    main()
