"""Golden numbers of the library's link half and of its studies: proof that a change of the code changed no number.

    python benchmarks/golden_link.py --write FILE.json    # before the change
    python benchmarks/golden_link.py --check FILE.json    # after it; exits 1 where anything differs

Both take `--only PART` (several times) and `--quick`, which leaves out what takes long; a check then compares the items
that were computed. One thread, fixed seeds, no downloads: two runs of the same code on one machine agree to the last
bit. Floats are kept exactly, tensors as SHA-256 of their bytes with dtype, shape and first values.

Only the first section knows the library. Whoever renames something edits its imports and functions, and nothing below.
Names of settings and metrics, and texts among their values, go through `RENAMED` both ways.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, is_dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

# --- The library ------------------------------------------------------------------------------------------------------
# isort: split
import suffice as library
from suffice.information.alignment import class_information, cluster_nmi, linear_probe, trace_ratio
from suffice.link.auditing.audit import audit
from suffice.link.auditing.edge_set import EdgeSet
from suffice.link.auditing.trained import audit_trained
from suffice.link.auditing.verdict import judge
from suffice.link.batches.composition import Fixed, Random, Separate, balanced_weights
from suffice.link.batches.negatives import sample_negatives
from suffice.link.batches.sampler import CompositionBatchSampler, EdgeBatches
from suffice.link.corrections import freeze_statistics, replace_batch_norm, train_corrected
from suffice.link.data.datasets import load_graph
from suffice.link.data.files import read_graph, read_saved_graph, save_graph
from suffice.link.data.graph import Graph, Split, SplitConfig, prepare_graph, split_edges
from suffice.link.data.synthetic import block_model, digits
from suffice.link.metrics import compute_metrics, mean_reciprocal_rank
from suffice.link.models import (
    EncoderDecoderSettings,
    ModelSettings,
    PairScorer,
    get_model_settings,
    models,
    preset,
)
from suffice.link.sparse.adjacency import Adjacency, remove_edges
from suffice.link.sparse.count_cache import symmetrize
from suffice.link.sparse.distance_counts import count_by_distance
from suffice.link.sparse.neighbors import common_neighbors, pool, residual_neighbors, squared_rows
from suffice.link.sparse.overlap import EDGE_UNIT, dense_walks, overlap
from suffice.link.sparse.propagation import neighbor_mean, propagate, propagate_sparse, propagate_without_own_edge
from suffice.link.sparse.sketches import sketch
from suffice.link.study.arms import ARMS, COMPARISONS, parse_arm
from suffice.link.study.correct import correct, load_edge_representations
from suffice.link.study.figures import plot_audit, plot_embeddings, plot_response_curves
from suffice.link.study.findings import describe_claims, find_compared_arms, paired_interval, to_markdown
from suffice.link.study.published import HITS_AT_100, compare_to_published
from suffice.link.study.report_sections import audit_page, results_page
from suffice.link.study.reproduction import reproduce
from suffice.link.study.run_kinds import CORRECT, KINDS
from suffice.link.train.alignment import alignment, feature_alignment, representations
from suffice.link.train.checkpoint import load_trained
from suffice.link.train.config import TrainConfig
from suffice.link.train.evaluate import evaluate, score_edges
from suffice.link.train.trainer import fit
from suffice.study import RunKind, Spec, Store, run_study
from suffice.study.export import export_records
from suffice.study.report_page import study_report
from suffice.study.results import (
    Interval,
    bootstrap_interval,
    compare_groups,
    group_records,
    mean_interval,
    summarize,
)

# What a setting, a metric or a text among their values is called now: what it was called when the file was written.
# BUDDY has no norm over nodes; the file says that it has the default one.
RENAMED: dict[str, str] = {"encoder-decoder": "pair", "fixed own/none-batch": "fixed own/batch"}
WAYS = {  # keys of ways of training by our names
    "even": "fixed/batch",
    "drawn": "random/batch",
    "drawn balanced": "random+balanced/batch",
    "apart": "separate/batch",
    "even layer": "fixed/layer",
    "drawn layer": "random/layer",
    "drawn balanced layer": "random+balanced/layer",
    "even none": "fixed/none",
    "even mixed": "fixed/none-batch",
    "own": "fixed/own",
}
REFERENCES = {"untrained": "untrained", "features": "raw features"}
MIXES = {"even": Fixed(), "third": Fixed(0.3), "apart": Separate(), "drawn": Random(), "narrow": Random(0.3, 0.7)}
VERDICTS = ("unaffected", "affected", "dominated", "no skill", "undecided")
INPUT_ROWS = ("not called", "nodes", "edges")
_STABLE = {now: own for own, now in (WAYS | REFERENCES).items()} | RENAMED
_NOW = {then: now for now, then in RENAMED.items()}


def stable(name: object) -> str:
    """Return what the file calls something, part by part where a colon joins parts."""
    return _STABLE.get(str(name)) or ":".join(RENAMED.get(part, part) for part in str(name).split(":"))


def now(given: Any) -> Any:
    """Return what the library calls a setting or a text; of a mapping, its keys and values."""
    if isinstance(given, Mapping):
        return {now(key): now(value) for key, value in given.items()}
    return _NOW.get(given, given) if isinstance(given, str) else given


def make_graph(name: str) -> Graph:
    if name in ("digits", "blocks"):
        return load_graph({"digits": "digits", "blocks": "block-model"}[name])
    if name == "digits of 3":
        return digits(3)
    if name == "large":
        return block_model(9000, 3, 4.0, features=8, seed=2)
    if name == "dense":
        return block_model(40, 2, 16.0, features=4, seed=1)
    graph = block_model(300, 4, 8.0, edge_signal=0.9, features=24, seed=5)
    return replace(graph, x=(graph.x > 2.2).float()) if name == "sparse" else graph


def graph_parts(graph: Graph) -> dict[str, Any]:
    return {"features": graph.x, "edges": graph.edges, "classes": graph.y, "nodes": graph.num_nodes}


def read_graphs(graph: Graph, folder: Path, table: Path, *columns: Path) -> list[Graph]:
    return [read_saved_graph(folder / save_graph(graph, folder)), read_graph(table), read_graph(*columns)]


def protocol(kind: str = "usual") -> SplitConfig:
    if kind == "wide":
        return SplitConfig(0.1, 0.2, negatives=2.0)
    if kind == "largest":
        return SplitConfig(largest_component=True)
    return SplitConfig(validation_edges_at_test=True) if kind == "seen" else SplitConfig()


def make_split(graph: Graph, seed: int = 0, kind: str = "usual") -> Split:
    return split_edges(prepare_graph(graph, protocol(kind)), protocol(kind), seed)


def split_parts(parts: Split) -> dict[str, Tensor]:
    found = {"train": parts.train, "validation": parts.validation, "test": parts.test, "known": parts.known}
    found |= {"validation negatives": parts.validation_negatives, "test negatives": parts.test_negatives}
    return {**found, "messages": parts.message_edges(), "all messages": parts.message_edges(validation=True)}


def negatives(graph: Graph, count: int, seed: int) -> Tensor:
    return sample_negatives(graph.edges, graph.num_nodes, count, seed)


def batches(graph: Graph, parts: Split, mix: str, epochs: Iterable[int] = (0, 1), **more: Any) -> dict[str, Any]:
    known = parts.known
    made = EdgeBatches(parts.train, graph.num_nodes, MIXES[mix], batch_size=128, known=known, seed=3, **now(more))
    found: dict[str, Any] = {"steps": len(made)}
    for epoch in epochs:
        made.set_epoch(epoch)
        each = [(b.pairs, b.labels, b.labels * 0 if b.weights is None else b.weights, b.positive_index) for b in made]
        named = zip(("pairs", "labels", "weights", "index"), zip(*each, strict=True), strict=True)
        found |= {f"{epoch} {name}": torch.cat(parts, dim=-1) for name, parts in named}
        found[f"{epoch} fractions"] = torch.tensor(made.fractions)
    return found


def labelled_batches(labels: Tensor, mix: str) -> list[Tensor]:
    made = CompositionBatchSampler(labels, MIXES[mix], batch_size=32, seed=4)
    return [torch.tensor([i for batch in made for i in batch]) for _ in (0, 1)] + [torch.tensor(made.fractions)]


def make_model(graph: Graph, seed: int = 0, **spec: Any) -> Any:
    return model_settings(**now({"hidden": 16, **spec})).build(graph.x.size(1), seed)


COMPLETION = ("alpha", "scale", "offset", "prior")


def model_settings(model: str = "encoder-decoder", completion: Iterable[float] = (), **options: Any) -> ModelSettings:
    """Return settings; options that the model does not have are left out."""
    known = get_model_settings(model)
    options |= dict(zip(COMPLETION, completion, strict=False))
    return known(**{name: value for name, value in options.items() if name in known.option_names()})


def model_options(settings: ModelSettings, **others: Any) -> dict[str, Any]:
    """Return settings as the file holds them: the options of all models, in one mapping."""
    found = {name: value for kind in models().values() for name, value in kind().to_dict().items()}
    found |= others | settings.to_dict()
    name, completion = stable(found.pop("name")), [found.pop(name) for name in COMPLETION]
    return {**found, "model": name, "completion": completion}


def settings(mix: str = "even", **more: Any) -> TrainConfig:
    chosen = {"epochs": 2, "batch_size": 256, "metric": "hits@10", "seed": 1, **more}
    return TrainConfig(MIXES[mix], **now(chosen))


def train(model: Any, graph: Graph, parts: Split, mix: str = "even", **more: Any) -> dict[str, Any]:
    """Train in place and return what each epoch gave; `file` is a checkpoint, `stop` ends the first epoch."""
    file, stop = more.pop("file", None), more.pop("stop", None)
    return epochs_of(fit(model, graph, parts, settings(mix, **more), checkpoint=file, on_epoch=stop))


def train_balanced(model: Any, graph: Graph, parts: Split, **more: Any) -> list[Any]:
    done, changes = train_corrected(model, graph, parts, settings(**more))
    return [epochs_of(done), len(changes)]


def epochs_of(done: Any) -> dict[str, Any]:
    fractions = [torch.tensor(epoch.fractions) for epoch in done.epochs]
    loss, metric = ([getattr(epoch, now(name)) for epoch in done.epochs] for name in ("loss", "metric"))
    return {"loss": loss, "metric": metric, "fractions": fractions, "chosen": done.kept_epoch}


def outputs(model: Any, graph: Graph, parts: Split) -> dict[str, Any]:
    """Return scores, from edges and from compressed rows, embeddings, and metrics under both protocols."""
    messages, test = parts.message_edges(), (parts.test, parts.test_negatives)
    rows = Adjacency(messages, graph.num_nodes)
    scorer = PairScorer(model, graph.x, messages)
    found: dict[str, Any] = {kind: evaluate(model, graph, parts, protocol(kind), 10) for kind in ("usual", "seen")}
    found |= {"nodes": scorer.embed(), "pairs": model.edge_embedding(scorer.encode(), parts.test)}
    return found | {
        "scores": [*score_edges(model, graph.x, messages, *test), *score_edges(model, graph.x, rows, *test)]
    }


def presets() -> dict[str, Any]:
    kinds, data = ("neognn", "ncn", "ncnc", "elph", "buddy"), ("Cora", "CiteSeer", "PubMed", "other")
    found: dict[str, Any] = {}
    for kind, name in product(kinds, data):
        made, training = preset(now(kind), now(name))
        published = {name: value for name, value in asdict(training).items() if value is not None}
        # The file holds NCNC's weights for NCN too, and says of BUDDY that its encoder has no norm.
        others = preset("ncnc", name).model.to_dict() if kind == "ncn" else {"encoder_norm": "none"}
        found[f"{kind} {name}"] = [model_options(made, **others), published]
    return found


def defaults() -> list[Any]:
    return [
        model_options(EncoderDecoderSettings()),
        TrainConfig().to_dict(),
        asdict(SplitConfig()),
        MIXES["drawn"],
        MIXES["even"],
    ]


def audit_all(model: Any, graph: Graph, parts: Split) -> Any:
    return audit_trained(model, graph, parts, batch_size=128, seed=1)


def audit_short(model: Any, graph: Graph, parts: Split, score: Any = None, **more: Any) -> dict[str, Any]:
    positives = torch.cat([parts.validation, parts.test], dim=1)
    edges = EdgeSet(positives, torch.cat([parts.validation_negatives, parts.test_negatives], dim=1))
    scorer = score or PairScorer(model, graph.x, parts.message_edges())
    module = None if score else model
    return report_parts(audit(scorer, edges, module=module, batch_size=96, repeats=4, **now(more)))


def report_parts(report: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"verdict": VERDICTS.index(report.verdict.level)}
    for name, part in report.parts.items():
        found[name] = {key: numbers(value) for key, value in part.statistics.items()}
        curve = [[p.fraction, *numbers(p.predicted), *numbers(p.accuracy), *numbers(p.probe_score)] for p in part.curve]
        found[name]["curve"] = torch.tensor(curve, dtype=torch.float64)
    found["layers"] = [[INPUT_ROWS.index(layer.input_rows), layer.mixes_rows, layer.frozen] for layer in report.layers]
    return found


def verdict_of(values: Mapping[str, float]) -> int:
    return VERDICTS.index(judge({"heldout": {now(k): Interval(v, v, v) for k, v in values.items()}}, ()).level)


def numbers(interval: Interval) -> list[float]:
    return [interval.mean, interval.low, interval.high]


def bounds(values: list[float]) -> list[list[float]]:
    return [numbers(bootstrap_interval(values, seed=3)), numbers(mean_interval(values))]


def replace_norms(model: Any, norm: str) -> int:
    return len(replace_batch_norm(model, norm))


def freeze(model: Any, graph: Graph, parts: Split, mix: str | None) -> int:
    score = PairScorer(model, graph.x, remove_edges(parts.message_edges(), parts.train[:, ::2], graph.num_nodes))
    chosen = None if mix is None else MIXES[mix]
    more: dict[str, Any] = {"known": parts.known, "composition": chosen, "batch_size": 128, "seed": 2}
    return len(freeze_statistics(model, score, parts.train, graph.num_nodes, **more))


def aligned(model: Any, graph: Graph, parts: Split) -> list[Any]:
    return [alignment(model, graph, parts), {k: x for k, (x, _) in representations(model, graph, parts).items()}]


def aligned_features(graph: Graph) -> list[Any]:
    direct = (trace_ratio, cluster_nmi, linear_probe, class_information)
    return [
        {k.replace("feature", "raw"): v for k, v in feature_alignment(graph).items()},
        [measure(graph.x, graph.y) for measure in direct],
    ]


def views(graph: Graph) -> tuple[dict[str, Adjacency], Tensor]:
    """Return a graph's messages, two views of them that lack edges, and pairs of which some are edges."""
    known = graph.edges[:, :: max(1, graph.edges.size(1) // 150)]
    whole = Adjacency(graph.edges, graph.num_nodes)
    view = whole.without(known[:, ::2])
    pairs = torch.cat([known, negatives(graph, 100, 3)], dim=1)
    return {"whole": whole, "view": view, "view of view": view.without(known)}, pairs


def neighbours(view: Adjacency, pairs: Tensor, x: Tensor) -> dict[str, Any]:
    first, second = residual_neighbors(view, pairs)
    square, count = squared_rows(view, pairs[0])
    lists = {"common": common_neighbors(view, pairs), "first": first, "second": second, "square": square}
    found = {
        name: [one.node, one.owner, pool(x, one), pool(x, one, noise(one.node.numel()))] for name, one in lists.items()
    }
    return {**found, "more": [count, view.edge_index, view.degree, view.contains(pairs[0], pairs[1])]}


def overlaps(view: Adjacency, pairs: Tensor, x: Tensor) -> dict[str, Any]:
    found = with_gradient(lambda weight: overlap(view, pairs, weight, 0.3), x[:, 0])
    if view.num_nodes > 8192:
        return found
    with dense_walks(view.base).rows_of_view(view, pairs[0].unique()) as table:
        return {**found, "square": (table.index_select(0, pairs[0]) & (EDGE_UNIT - 1)).float()}


def propagations(view: Adjacency, pairs: Tensor, x: Tensor) -> dict[str, Any]:
    found = {"sum": with_gradient(lambda z: propagate(view, z), x)}
    found["mean"] = with_gradient(lambda z: neighbor_mean(view, z), x)
    sparse = torch.empty_like(x)
    propagate_sparse(view, x * (x > 1.5), sparse)
    return {
        **found,
        "without": propagate_without_own_edge(view, torch.cat([propagate(view, x), x]), pairs),
        "sparse": sparse,
    }


def sketches(view: Adjacency, pairs: Tensor, hops: int, **more: Any) -> dict[str, Any]:
    made = sketch(view, hops, **now(more))
    counts = count_by_distance(view, made, pairs)
    kept = {"minhash": made.minhash, "registers": made.registers, "sizes": made.sizes, "growth": made.increases}
    return {**kept, "counts": [counts, symmetrize(counts, hops)]}


def metrics(first: Tensor, second: Tensor) -> list[Any]:
    own = mean_reciprocal_rank(first, second.repeat(first.numel(), 1) + first[:, None] / 7)
    return [*(compute_metrics(first, second, k) for k in (1, 10, 100)), own]


def compared(graph: Graph, seeds: int, ways: Iterable[str]) -> dict[str, Any]:
    """Compare ways of training, and return all that the study says of them."""
    arms, wide = [parse_arm(WAYS[way]) for way in ways], protocol("wide")
    trained = settings(epochs=2, batch_size=128, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        small, more = model_settings(hidden=8), {"split": wide, "first_seed": 1, "folder": folder}
        made = correct(graph, arms=arms, model=small, train=trained, seeds=seeds, **more)
        maps = load_edge_representations(graph, arms[:2], folder, split=wide, seed=1)
        files = sorted(weights(load_trained(file)[0])["weights"] for file in Path(folder).glob("runs/*.safetensors"))
    found: dict[str, Any] = {"maps": list(maps.values()), "files": files, "rows": keyed(made.rows())}
    found |= {"references": keyed(made.reference_rows()), "differences": keyed(made.differences())}
    curves = {key: arm.response_curve() for key, arm in made.arms.items()}
    found["curves"] = {key: torch.tensor([[x, *numbers(y)] for x, y in c]) for key, c in curves.items()}
    found["verdicts"] = {key: [VERDICTS.index(v) for v in arm.verdicts.values()] for key, arm in made.arms.items()}
    found["figures"] = [drawn(plot_response_curves(curves)), drawn(plot_embeddings(maps, max_points=120))]
    return {**found, "page": page_numbers(results_page(made, "", maps))}


def reproduced(models: Iterable[str], ways: Iterable[str]) -> dict[str, Any]:
    """Train models on the built-in block model, and return what is found of them, numbers of texts included."""
    arms, short = [parse_arm(WAYS[way]) for way in ways], settings(epochs=1, batch_size=2048, metric="hits@100", seed=0)
    with tempfile.TemporaryDirectory() as folder:
        made = [now(name) for name in models]
        cells = reproduce(["block-model"], folder, models=made, arms=arms, seeds=2, hidden=8, train=short)
    found: dict[str, Any] = {}
    for cell in cells:
        values = {metric: list(each.values()) for metric, each in cell.group.values.items()}
        counts = [cell.verdict_counts().get(verdict, 0) for verdict in VERDICTS]
        found[f"{stable(cell.model)} {stable(cell.arm)}"] = {**values, "verdicts": counts}
    gaps = [paired_interval(a, b, now(m)) for a in cells for b in cells for m in ("hits@100", "edge_nmi") if a is not b]
    found["gaps"] = [numbers(gap) for gap in gaps if gap is not None]
    # As if it were a graph that the models' authors have printed numbers of.
    cora = [replace(cell, graph="Cora") for cell in cells]
    found["published"] = [list(asdict(row).values())[2:] for row in compare_to_published(cora)]
    lines = [line for line in to_markdown(cora).splitlines() if line.startswith("|")]
    found["tables"] = text_hash(number for line in lines for number in re.findall(r"[-+]?\d+\.\d+", line))
    said = "\n".join(describe_claims(cells))
    found["said"] = [text_hash(re.findall(r"\b\d+ of \d+", said)), len(find_compared_arms(cells))]
    return found


def ways_of_training() -> list[Any]:
    made = [*(parse_arm(key) for key in WAYS.values()), *ARMS]
    parts = [(w.key, str(w.composition), w.balanced, w.encoder_norm, w.decoder_norm, w.learning_rate) for w in made]
    return [
        parts,
        COMPARISONS,
        list(HITS_AT_100.values()),
        [float(stdtrit(n, p)) for p in (0.9, 0.975) for n in (1, 2, 9)],
    ]


def link_study(graph: Graph, ways: Iterable[str], seeds: list[int], workers: int) -> list[Any]:
    """Run a grid of trainings on a graph in a file, as a YAML file would ask for it."""
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "own.npz", edges=graph.edges.T.numpy(), x=graph.x.numpy(), y=graph.y.numpy())
        chosen = {"data": {"name": f"{folder}/own.npz"}, "model": {"hidden": 8}}
        chosen["train"] = {"epochs": 1, "batch_size": 128, "metric": "hits@10"}
        keys = [(WAYS | REFERENCES)[way] for way in ways]
        spec = Spec("own", CORRECT.name, now(chosen), {now("arm"): keys}, (), seeds)
        run_study(folder, CORRECT, spec, workers=workers, threads=1)
        return store_parts(Path(folder), "own", now("arm"))


# No name of the library's: a kind of run as a user would make it.
GOLDEN = RunKind(
    "golden", "golden_link:tiny_run", {"x": 1, "way": "", "rows": False, "scale": 0.5}, compared_setting="way"
)


def golden_study(text: str, workers: int) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tiny.yaml").write_text(text, encoding="utf-8")
        run_study(folder, GOLDEN, Spec.read(Path(folder) / "tiny.yaml"), workers=workers, threads=1)
        return store_parts(Path(folder), "tiny", "way")


def store_parts(folder: Path, name: str, setting: str) -> list[Any]:
    """Return what a store holds: values, means, paired differences, exported tables, numbers of the report."""
    with Store(folder, read_only=True) as store:
        records, counts = list(store.records(name)), store.counts(name)
    tables: list[Any] = []
    for ending in (".csv", ".jsonl", ".parquet"):
        export_records(folder / f"table{ending}", name, {}, records)
        rows = read_rows(folder / f"table{ending}")
        # The file knows settings of runs by the last part of their name.
        tables.append(columns([{key.rpartition(".")[2]: cell for key, cell in row.items()} for row in rows]))
    groups = group_records(records)
    found = [counts["done"], counts["failed"], [record.seed for record in records], tables]
    found += [[{stable(k): v for k, v in record.result.get("values", {}).items()} for record in records]]
    found += [keyed(summarize(groups)), keyed(compare_groups(groups, setting))]
    return [*found, page_numbers(study_report(folder, kinds=KINDS))]


def page_numbers(page: Any) -> list[Any]:
    """Return a hash of the decimals in all tables of a page, those behind figures too, and nothing of its words."""
    blocks = [block for heading, blocks in page.sections for block in blocks]
    tables = [block.numbers if hasattr(block, "numbers") else block for block in blocks]
    rows = [row for table in tables if hasattr(table, "rows") for row in table.rows]
    kept = [cell for row in rows for cell in map(str, row) if not re.search(r"[/\\]", cell)]
    return text_hash(number for cell in kept for number in re.findall(r"[-+]?\d+\.\d+", cell))


def audit_figures(report: Any) -> list[Any]:
    return [drawn(plot_audit(report)), page_numbers(audit_page(report, ""))]


# --- What the file holds, and how: nothing below knows the library ---------------------------------------------------
Items = dict[str, Callable[[], Any]]
KINDS_OF_MODELS = ("neognn", "ncn", "ncnc", "elph", "buddy")
NORMS = ("batch", "layer", "graph", "none")


def tiny_run(settings: Mapping[str, Any], seed: int, context: Any) -> dict[str, Any]:
    """Take no time, and give numbers of settings and seed."""
    base = settings["scale"] * settings["x"] ** 2 + float(np.sin(seed + len(settings["way"])))
    if settings["rows"]:
        return {"rows": [{"settings": {"part": part}, "values": {"y": part * base}} for part in (1, 2)]}
    return {"values": {"y": base, "z": base**2 / 3}, "curve": [[0.0, base]]}


def keyed(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the numbers of a summary's rows by the settings and names in them."""
    kinds, found = ("mean", "low", "high", "seeds"), dict[str, Any]()
    for row in rows:
        key = ", ".join(stable(value) for name, value in row.items() if name not in kinds)
        assert key not in found, f"two rows are named {key}"
        found[key] = [row[name] for name in kinds if name in row]
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pandas

        return pandas.read_parquet(path).to_dict("records")
    with path.open(encoding="utf-8", newline="") as file:
        return [json.loads(line) for line in file] if path.suffix == ".jsonl" else list(csv.DictReader(file))


def columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the columns of a table that are numbers; texts, times and paths are left out."""
    found: dict[str, Any] = {"rows": len(rows)}
    for name in dict.fromkeys(name for row in rows for name in row):
        with contextlib.suppress(ValueError, TypeError):
            cells = [float(np.nan if row.get(name) in (None, "") else row[name]) for row in rows]
            found[stable(name)] = torch.tensor(cells, dtype=torch.float64)
    return found


def drawn(figure: Any) -> list[Any]:
    """Return the points of a picture's lines and clouds."""
    lines = [line.get_xydata() for axes in figure.axes for line in axes.lines]
    clouds = [np.ma.filled(cloud.get_offsets(), np.nan) for axes in figure.axes for cloud in axes.collections]
    return [torch.tensor(np.asarray(points, np.float64)) for points in (*lines, *clouds)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Any]:
    x = x.clone().requires_grad_()
    value = function(x)
    (value * noise(*value.shape)).sum().backward()
    return {"value": value, "gradient": x.grad}


def text_hash(parts: Iterable[str]) -> list[Any]:
    kept = list(parts)
    return [hashlib.sha256("\n".join(kept).encode()).hexdigest()[:32], len(kept)]


def weights(model: torch.nn.Module) -> dict[str, Any]:
    """Return one hash of parameters and buffers that depends neither on their names nor on their order."""
    digest, count = text_hash(sorted(plain(value) for value in model.state_dict().values()))
    return {"weights": digest, "tensors": count}


def plain(value: Any) -> Any:
    """Return a value as the file holds it: numbers exactly; tensors as hash, dtype, shape, first values."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        data = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        shape, first = "x".join(map(str, value.shape)), " ".join(map(str, value.reshape(-1)[:3].tolist()))
        return f"{hashlib.sha256(data).hexdigest()} {str(value.dtype)[6:]}[{shape}] {first}".rstrip()
    if isinstance(value, str):
        return stable(value)
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool | int | float) or value is None:
        return value
    raise TypeError(f"{type(value).__name__} is no number")


def flat(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    """Take mappings, sequences and dataclasses apart."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from flat(f"{name}/{stable(key)}", inner)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from flat(f"{name}/{number}", inner)
    else:
        yield name, plain(value)


def data_items(quick: bool) -> Items:
    def mixes(name: str) -> Any:
        graph = make_graph(name)
        parts = make_split(graph)
        found = {f"{mix} {b}": batches(graph, parts, mix, balanced=b) for mix, b in product(MIXES, (False, True))}
        ranks = {f"rank {rank}": batches(graph, parts, "drawn", rank=rank, world_size=2) for rank in (0, 1)}
        return found | ranks

    def splits(name: str, kind: str) -> Any:
        return [split_parts(make_split(make_graph(name), seed, kind)) for seed in (0, 1)]

    def tables() -> Any:
        graph = make_graph("small")
        x, edges, classes = (graph_parts(graph)[name].numpy() for name in ("features", "edges", "classes"))
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            np.savez(home / "all.npz", edges=np.concatenate([edges, edges[::-1]], axis=1).T, x=x, y=classes)
            np.savetxt(home / "edges.csv", edges.T, "%d", ",", header="a,b", comments="")
            np.savetxt(home / "x.csv", x, "%.9g", ",")
            np.savetxt(home / "y.csv", classes, "%d", header="y", comments="")
            files = [home / name for name in ("all.npz", "edges.csv", "x.csv", "y.csv")]
            return [graph_parts(one) for one in read_graphs(graph, home, *files)]

    names = ("digits", "digits of 3", "blocks", "small", "sparse", "dense", "large")
    items: Items = {f"graph {name}": lambda name=name: graph_parts(make_graph(name)) for name in names}
    for name, kind in product(("digits", "blocks", "small"), ("usual", "wide", "largest")):
        items[f"split {name} {kind}"] = lambda name=name, kind=kind: splits(name, kind)
    items["negatives"] = lambda: [negatives(make_graph("small"), n, seed) for n in (9, 999) for seed in (0, 7)]
    items["negatives dense"] = lambda: negatives(make_graph("dense"), 150, 1)
    items |= {f"batches {name}": lambda name=name: mixes(name) for name in ("small", "digits", "dense")}
    labels = (torch.arange(400) % 5 < 2).long()
    items["labelled batches"] = lambda: {mix: labelled_batches(labels, mix) for mix in MIXES}
    items["class weights"] = lambda: [balanced_weights((torch.arange(50) < n).float()) for n in (0, 7, 25)]
    return items | {"tables": tables}


def model_items(quick: bool) -> Items:
    def trained(name: str = "small", mix: str = "even", options: Mapping[str, Any] | None = None, **spec: Any) -> Any:
        graph = make_graph(name)
        parts, model = make_split(graph, 1), make_model(graph, 2, **spec)
        found = {"start": weights(model), "training": train(model, graph, parts, mix, **(options or {}))}
        return {**found, "end": weights(model), **outputs(model, graph, parts)}

    def resumed() -> Any:
        def stop(epoch: Any) -> None:
            raise KeyboardInterrupt

        graph, spec = make_graph("small"), {"model": "ncn", "dropout": 0.3}
        parts, found = make_split(graph, 1), []
        for cut in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                more: dict[str, Any] = {"file": Path(folder) / "a.safetensors", "epochs": 3}
                with contextlib.suppress(KeyboardInterrupt):
                    if cut:
                        train(make_model(graph, **spec), graph, parts, "drawn", stop=stop, **more)
                model = make_model(graph, **spec)
                found.append([train(model, graph, parts, "drawn", **more), weights(model)])
        return found

    specs: dict[str, dict[str, Any]] = {}
    for encoder, decoder in product(("gcn", "sage", "pure"), ("dot", "hadamard", "concat")):
        specs[f"{encoder} {decoder}"] = {"encoder": encoder, "decoder": decoder}
    for nodes, pairs in product(NORMS, NORMS):
        specs[f"gcn hadamard {nodes} {pairs}"] = {"encoder_norm": nodes, "decoder_norm": pairs}
    for kind, norm in product(KINDS_OF_MODELS, NORMS):
        specs[f"{kind} {norm}"] = {"model": kind, "encoder_norm": norm, "decoder_norm": norm}
    for kind, encoder in product(("ncn", "ncnc", "neognn", "elph"), ("sage", "pure")):
        specs[f"{kind} on {encoder}"] = {"model": kind, "encoder": encoder}
    for kind, hops in product(("elph", "buddy"), (1, 3)):
        specs[f"{kind} {hops} hops"] = {"model": kind, "hops": hops}
    for kind in ("pair", *KINDS_OF_MODELS):
        specs[f"{kind} dropout"] = {"model": kind, "dropout": 0.3, "input_dropout": 0.2, "output_dropout": 0.1}
    specs["ncnc completion"] = {"model": "ncnc", "completion": (0.4, 6.5, 4.4, 0.75), "two_layers": True}
    specs["ncn two layers"] = {"model": "ncn", "two_layers": True, "encoder_dropout": 0.2}
    specs["linear"] = {"linear": True, "layers": 3}
    items: Items = {name: lambda spec=spec: trained(**spec) for name, spec in specs.items()}
    for kind in ("gcn", "sage", "pure"):
        items[f"sparse {kind}"] = lambda kind=kind: trained("sparse", encoder=kind, input_dropout=0.3)
    items["sparse buddy"] = lambda: trained("sparse", model="buddy")
    for mix in MIXES:
        items[f"mix {mix}"] = lambda mix=mix: trained("small", mix, {"balanced": True})
        items[f"mix {mix} ncn"] = lambda mix=mix: trained("small", mix, model="ncn")
    options: dict[str, dict[str, Any]] = {name: {"metric": name} for name in ("auc", "ap", "mrr", "hits@100")}
    options["patience"] = {"epochs": 8, "patience": 2, "learning_rate": 0.05}
    options["clip"] = {"clip": 0.1, "weight_decay": 0.01, "directions": 1}
    items |= {f"option {name}": lambda more=more: trained(options=more) for name, more in options.items()}
    if not quick:
        items |= {
            f"digits {k}": lambda k=k: trained("digits", options={"epochs": 1}, model=k) for k in ("pair", "buddy")
        }
    return items | {"resumed": resumed, "presets": presets, "defaults": defaults}


def biased(mix: str = "even", norm: str = "batch", epochs: int = 6, **spec: Any) -> Any:
    """Return a model trained on the small graph, with graph and split."""
    graph = make_graph("small")
    parts, model = make_split(graph, 1, "wide"), make_model(graph, 2, encoder_norm=norm, decoder_norm=norm, **spec)
    train(model, graph, parts, mix, epochs=epochs, learning_rate=0.01)
    return model, graph, parts


def audit_items(quick: bool) -> Items:
    def whole(*given: Any, **spec: Any) -> Any:
        return report_parts(audit_all(*biased(*given, **spec)))

    def swapped(norm: str) -> Any:
        model, graph, parts = biased()
        found = [replace_norms(model, norm), audit_short(model, graph, parts), train(model, graph, parts)]
        return [*found, weights(model), audit_short(model, graph, parts)]

    def frozen(mix: str | None) -> Any:
        model, graph, parts = biased()
        changes = freeze(model, graph, parts, mix)
        return [changes, weights(model), audit_short(model, graph, parts), outputs(model, graph, parts)]

    def corrected() -> Any:
        _, graph, parts = biased(epochs=1)
        model = make_model(graph, 2)
        return [train_balanced(model, graph, parts, epochs=4), weights(model), audit_short(model, graph, parts)]

    def other() -> Any:
        model, graph, parts = biased()
        x = graph_parts(graph)["features"]
        found = [audit_short(None, graph, parts, lambda pairs: (x[pairs[0]] * x[pairs[1]]).sum(1) - 0.1)]
        layer = next(name for name, part in model.named_modules() if type(part) is torch.nn.BatchNorm1d)
        found += [audit_short(model, graph, parts, **m) for m in ({"threshold": 0.5, "seed": 9}, {"frozen": (layer,)})]
        return [*found, weights(model)]

    def judged() -> Any:
        names = ("a_pure", "accuracy_balanced", "kappa", "rank_change", "auc_pure", "auc_eval")
        grid = product((0.5, 0.7, 0.9), (0.6, 0.9), (-1.2, -0.2, 0.0, 3.1), (0.0, 0.1), (0.6, 0.95), (0.55, 0.9))
        return torch.tensor([verdict_of({**dict(zip(names, case, strict=True)), "tau": 0.5}) for case in grid])

    items: Items = {f"{mix} batch": lambda mix=mix: whole(mix) for mix in ("even", "drawn", "apart")}
    items |= {norm: lambda norm=norm: whole("even", norm) for norm in ("layer", "none")}
    items |= {f"replaced by {norm}": lambda norm=norm: swapped(norm) for norm in ("layer", "none")}
    items |= {f"frozen {mix}": lambda mix=mix: frozen(mix) for mix in (None, "even", "drawn", "apart")}
    items["intervals"] = lambda: [bounds(noise(n, seed=n).tolist()) for n in (1, 2, 5, 16)]
    items["figure and page"] = lambda: audit_figures(audit_all(*biased()))
    if not quick:
        items |= {"graph": lambda: whole("even", "graph"), "drawn layer": lambda: whole("drawn", "layer")}
        items |= {kind: lambda kind=kind: whole(model=kind, epochs=2) for kind in KINDS_OF_MODELS}
    return items | {"corrected": corrected, "other": other, "verdicts": judged}


def alignment_items(quick: bool) -> Items:
    items: Items = {mix: lambda mix=mix: aligned(*biased(mix)) for mix in ("even", "drawn")}
    items |= {kind: lambda kind=kind: aligned(*biased(model=kind, epochs=1)) for kind in KINDS_OF_MODELS}
    names = ("small", "sparse") if quick else ("small", "sparse", "blocks", "digits")
    return items | {name: lambda name=name: aligned_features(make_graph(name)) for name in names}


def primitive_items(quick: bool) -> Items:
    def in_views(name: str, make: Callable[[Any, Tensor, Tensor], Any]) -> Any:
        graph = make_graph(name)
        made, pairs = views(graph)
        x = noise(graph_parts(graph)["nodes"], 5, seed=1)
        return {key: make(view, pairs, x) for key, view in made.items()}

    def sketched(name: str, hops: int, **more: Any) -> Any:
        made, pairs = views(make_graph(name))
        return sketches(made["whole"], pairs, hops, **more)

    first, second = noise(70, seed=1) + 0.7, noise(90, seed=2)
    items: Items = {"metrics": lambda: [metrics(first, second), metrics((first * 3).round(), (second * 3).round())]}
    for name in ("small", "dense", *(() if quick else ("digits", "large"))):
        for kind, make in (("neighbours", neighbours), ("overlap", overlaps), ("propagation", propagations)):
            items[f"{kind} {name}"] = lambda name=name, make=make: in_views(name, make)
        for hops in (1, 2) if name == "large" else (1, 2, 3):
            items[f"sketches {name} {hops}"] = lambda name=name, hops=hops: sketched(name, hops)
    return items | {"sketches seeded": lambda: sketched("small", 2, permutations=32, p=5, seed=9)}


def study_items(quick: bool) -> Items:
    grid = "{x: [1, 2, 3], way: [a, bb, ccc], rows: [false, true]}"
    text = f"kind: golden\nsettings: {{scale: 0.7}}\ngrid: {grid}\nseeds: 4\nexclude: [{{x: 2, way: bb}}]\n"
    graph, ways = make_graph("small"), ("even", "drawn layer", "untrained", "features")
    items: Items = {"golden": lambda: golden_study(text, 0), "ways": ways_of_training}
    items["link"] = lambda: link_study(graph, ways, [0, 1], 0)
    items["compared one seed"] = lambda: compared(graph, 1, ("even", "drawn"))
    if not quick:
        items["compared"] = lambda: compared(graph, 2, [way for way in WAYS if way != "own"])
        items["golden in workers"] = lambda: golden_study(text, 2)
        items["link in a worker"] = lambda: link_study(graph, ways[1:], [0], 1)
        items["reproduced"] = lambda: reproduced(("gcn", "buddy"), ("even", "drawn", "own"))
    return items


PARTS: dict[str, Callable[[bool], Items]] = {
    "data": data_items,
    "models": model_items,
    "audits": audit_items,
    "alignment": alignment_items,
    "primitives": primitive_items,
    "studies": study_items,
}


def compute(only: Iterable[str], quick: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Return values by name, and tracebacks by item."""
    values, broken = dict[str, Any](), dict[str, str]()
    for part in only:
        start, before = time.perf_counter(), len(values)
        for item, make in PARTS[part](quick).items():
            torch.manual_seed(0)
            try:
                values |= flat(f"{part}/{item}", make())
            except Exception:
                broken[f"{part}/{item}"] = traceback.format_exc()
        print(f"{part}: {len(values) - before} values, {time.perf_counter() - start:.1f} s", flush=True)
    return values, broken


def item_of(key: str) -> str:
    return "/".join(key.split("/")[:2])


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> int:
    """Print every difference, and return how many there are."""
    count = 0
    for key in dict.fromkeys([*old, *new]):
        before, after = (repr(side[key]) if key in side else "absent" for side in (old, new))
        if before != after:
            count += 1
            print(f"{key}\n  old {before}\n  new {after}")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FILE")
    what.add_argument("--check", type=Path, metavar="FILE")
    parser.add_argument("--only", action="append", choices=PARTS, help="a part; all without it")
    parser.add_argument("--quick", action="store_true", help="leave out what takes long")
    options = parser.parse_args()
    # Libraries read these when they are loaded.
    single = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    if any(os.environ.get(name) != value for name, value in single.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **single})
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"library: {Path(library.__file__).parent}, torch {torch.__version__}", flush=True)
    values, broken = compute(options.only or PARTS, options.quick)
    for item, why in broken.items():
        print(f"FAILED {item}\n{why}")
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(json.dumps(values, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{len(values)} values written to {options.write}, {len(broken)} items failed")
        sys.exit(bool(broken))
    old = json.loads(options.check.read_text(encoding="utf-8"))
    if options.only or options.quick:
        computed = {item_of(key) for key in values} | broken.keys()
        old = {key: value for key, value in old.items() if item_of(key) in computed}
    differ = compare(old, values)
    print(f"{len(old)} values compared, {differ} differ, {len(broken)} items failed")
    sys.exit(bool(differ or broken))


if __name__ == "__main__":
    main()
