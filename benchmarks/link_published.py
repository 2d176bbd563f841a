"""Why Hits@100 here differs from what is printed: the models' own protocol, with one thing changed after another.

What the models' own settings give is told by `suffice link reproduce --preset --arms fixed/own`.
`python benchmarks/link_published.py --root DATA_FOLDER --folder runs` trains every variant on every split, goes on
where it was stopped, and prints the table; `--write` keeps the numbers in docs/results/link-published.json.
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
from suffice.link.train import trainer as training
from suffice.link.train.config import TrainConfig
from suffice.link.train.evaluate import evaluate
from suffice.link.train.trainer import fit

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "link-published.json"
# What the other variants change: the protocol under which the models are compared with what is printed.
PROTOCOL = {"validation": 0.1, "test": 0.2, "validation_edges_at_test": True}
TRAIN = {"epochs": 100, "patience": 20, "directions": 1}
HIDDEN = {"validation_edges_at_test": False}  # as NCN's authors have it


@dataclass(frozen=True)
class Variant:
    """A training that differs from a model's own settings.

    Args:
        model: name of the model.
        says: what is changed.
        settings: of the model.
        train: of the training.
        protocol: of the split and of what is seen at test.
        targets: whether the pairs of a batch stay among the edges that messages pass over.
        change: done to the model before it is trained.

    """

    model: str
    says: str
    settings: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    targets: bool = False
    change: Callable[[LinkPredictor], None] | None = None


def norm_behind_propagation(model: LinkPredictor) -> None:
    """Give the encoder of NCN or NCNC a LayerNorm that its authors don't have."""
    encoder: Any = model.get_submodule("encoder")
    encoder.norms = nn.ModuleList(nn.LayerNorm(encoder.out_channels) for _ in encoder.norms)


def baseline(model: str) -> list[Variant]:
    """Return the way from our baseline to one as example scripts train it, a step after another."""
    wide = {"layers": 3, "hidden": 256}
    last = {"patience": None, "epochs": 40}
    return [
        Variant(model, "as here"),
        Variant(model, "targets of a batch stay in its messages", targets=True),
        Variant(model, "and 3 layers of 256 channels", wide, targets=True),
        Variant(model, "and the last of 40 epochs, not the best", wide, last, targets=True),
        Variant(
            model,
            "and no validation edges at test",
            wide,
            last,
            HIDDEN,
            targets=True,
        ),
    ]


VARIANTS = [
    *baseline("gcn"),
    *baseline("sage"),
    Variant("neognn", "2 layers, as here"),
    Variant("neognn", "3 layers, as its authors on ogbl-collab", {"layers": 3}),
    Variant("elph", "a ReLU between its GNN's layers", {"linear": False}),
    Variant("ncn", "validation edges at test"),
    Variant("ncn", "no dropout after propagation", {"output_dropout": 0.0}, {}, HIDDEN),
    Variant("ncnc", "a norm behind propagation", {}, {}, HIDDEN, change=norm_behind_propagation),
]


@contextmanager
def unmasked(targets: bool) -> Iterator[None]:
    """Let a batch's own edges stay in its messages, as in trainings that leak them."""
    if not targets:
        yield
        return
    with mock.patch.object(training, "remove_edges", lambda edge_index, *_: edge_index):
        yield


def measure(variant: Variant, data: str, root: str, seed: int) -> dict[str, float]:
    """Return Hits@100 of the test and the validation, in percent."""
    made, own = model_and_training(variant.model, published=data)
    component = variant.model not in ("ncn", "ncnc")
    protocol = SplitConfig(**{**PROTOCOL, "largest_component": component, **variant.protocol})
    graph = prepare_graph(load_graph(data, root), protocol)
    edges = split_edges(graph, protocol, seed)
    model = replace(made, **variant.settings).build(graph.x.size(1), seed)
    if variant.change is not None:
        variant.change(model)
    with unmasked(variant.targets):
        done = fit(model, graph, edges, TrainConfig(**{**TRAIN, **own, **variant.train, "seed": seed}))
    test = evaluate(model, graph, edges, protocol, 100)["hits@100"]
    return {"test": 100 * test, "validation": 100 * done.metric}


def rows(folder: Path, names: list[str], seeds: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each data set and variant of which all splits are finished."""
    for data in names:
        for variant in VARIANTS:
            found = [_file(folder, variant, data, seed) for seed in range(seeds)]
            values = [json.loads(file.read_text()) for file in found if file.is_file()]
            if len(values) == seeds:
                test, seen = ([value[part] for value in values] for part in ("test", "validation"))
                spread = stdev(test) if len(test) > 1 else 0.0
                known, deviation = HITS_AT_100[data, variant.model]
                yield {
                    "data": data,
                    "model": variant.model,
                    "training": variant.says,
                    "splits": len(test),
                    "hits@100": round(fmean(test), 2),
                    "deviation": round(spread, 2),
                    "validation": round(fmean(seen), 2),
                    "published": known,
                    "gap_in_deviations": round((fmean(test) - known) / deviation, 1),
                }


def _file(folder: Path, variant: Variant, data: str, seed: int) -> Path:
    name = f"{data}-{variant.model}-{variant.says}-{seed}".replace(" ", "_").replace(",", "")
    return folder / f"{name}.json"


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="Cora,CiteSeer", help="data sets, with commas")
    parser.add_argument("--root", default="data", help="folder of downloaded data sets")
    parser.add_argument("--folder", type=Path, default=Path("published"), help="folder of finished trainings")
    parser.add_argument("--models", help="train these alone, with commas; the table has all that is finished")
    parser.add_argument("--seeds", type=int, default=5, help="splits")
    parser.add_argument("--write", action="store_true", help="keep the numbers in docs/results/link-published.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.data.split(",")
    if unknown := [name for name in names if (name, "gcn") not in HITS_AT_100]:
        parser.error(f"--data holds {', '.join(unknown)}; accepted: Cora, CiteSeer")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=130)
    for data in names:
        for variant in VARIANTS:
            if arguments.models and variant.model not in arguments.models.split(","):
                continue
            for seed in range(arguments.seeds):
                file = _file(arguments.folder, variant, data, seed)
                if not file.is_file():
                    found = measure(variant, data, arguments.root, seed)
                    file.write_text(json.dumps(found))
                    console.print(f"{data} {variant.model} {variant.says} split {seed}: {found['test']:.1f}")
    finished = list(rows(arguments.folder, names, arguments.seeds))
    table = Table("data", "model", "training", "Hits@100", "validation", "published", "in deviations")
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
