"""Speed of training and audit in `suffice.link`, compared with a plain PyG loop.

    python benchmarks/link.py [--data Cora --models-data Photo --root DATA_FOLDER] [--rounds 4] [--json FILE]

The plain loop follows the link prediction examples of PyG: each step samples as many negatives as positives, embeds
the whole graph from dense features and scores both together. It keeps target edges among the message edges and
evaluates no validation metric. The training of this package removes target edges, evaluates after each epoch, and uses
`Random` composition with the balanced loss. Both alternate in one process, five epochs each.

The memory that an audit adds to training steps is measured on block models of increasing size, each in its own
process; `--monitor` measures only what a `CompositionMonitor` adds to plain epochs. The measurements of
`link_models.py` follow. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from torch_geometric.utils import negative_sampling

from link_models import measure_growth, measure_models, measure_once
from suffice.link.auditing.edge_set import EdgeSet
from suffice.link.auditing.encode_once import encode_once
from suffice.link.auditing.monitor import CompositionMonitor
from suffice.link.auditing.trained import audit_trained
from suffice.link.batches.composition import Random
from suffice.link.batches.sampler import EdgeBatches
from suffice.link.data.datasets import load_graph
from suffice.link.data.graph import Graph, Split, SplitConfig, split_edges
from suffice.link.data.synthetic import block_model
from suffice.link.metrics import compute_metrics
from suffice.link.models import EncoderDecoder, EncoderDecoderSettings
from suffice.link.sparse.adjacency import remove_edges
from suffice.link.train.config import TrainConfig
from suffice.link.train.evaluate import score_validation_edges
from suffice.link.train.inputs import node_features
from suffice.link.train.trainer import batch_loss, fit

BATCH = 512
EPOCHS = 5  # of each training
AUDIT_NODES = (2_000, 20_000, 200_000)


def plain_epoch(model: EncoderDecoder, graph: Graph, parts: Split, optimizer: torch.optim.Optimizer) -> int:
    """Train for an epoch in plain PyG and return the number of scored edges."""
    model.train()
    messages, edges = parts.message_edges(), 0
    for index in torch.randperm(parts.train.size(1)).split(BATCH // 2):
        positives = parts.train[:, index]
        negatives = negative_sampling(messages, graph.num_nodes, num_neg_samples=index.numel())
        pairs = torch.cat([positives, negatives], dim=1)
        labels = torch.cat([torch.ones(positives.size(1)), torch.zeros(negatives.size(1))])
        optimizer.zero_grad()
        scores = model(graph.x, messages, pairs)
        torch.nn.functional.binary_cross_entropy_with_logits(scores, labels).backward()
        optimizer.step()
        edges += pairs.size(1)
    return edges


def time_sampling(graph: Graph, parts: Split, seed: int) -> tuple[float, int]:
    """Return the seconds that sampling the batches of a training takes, and the number of edges in them."""
    start, edges = time.perf_counter(), 0
    batches = _batches(graph, parts, seed)
    for epoch in range(EPOCHS):
        batches.set_epoch(epoch)
        edges += sum(batch.labels.numel() for batch in batches)
    return time.perf_counter() - start, edges


def time_validation(model: EncoderDecoder, graph: Graph, parts: Split) -> float:
    """Return the seconds that one evaluation on the validation edges takes."""
    start = time.perf_counter()
    scores = score_validation_edges(model, node_features(graph, model, parts), parts.message_edges(), parts)
    compute_metrics(*scores)
    return time.perf_counter() - start


def time_monitor(graph: Graph, parts: Split, rounds: int) -> dict[str, float]:
    """Return the CPU seconds of an epoch in plain PyG and of a measurement of `CompositionMonitor`, and their ratio.

    Both alternate on one model, whose encoder runs twice in a measurement (`encode_once`). Every fifth epoch is
    followed by a measurement, so that the overhead is a fifth of the ratio.
    """
    model = EncoderDecoderSettings().build(graph.x.size(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    x, messages = node_features(graph, model, parts), parts.message_edges()
    score = encode_once(lambda: model.encode(x, messages), model.score)
    held_out = EdgeSet(parts.validation, parts.validation_negatives)
    monitor = CompositionMonitor(score, held_out, module=model, every=1, batch_size=BATCH)
    seconds: dict[str, list[float]] = {"epoch": [], "measurement": []}
    for number in range(rounds + 1):
        for name, call in (
            ("epoch", lambda: plain_epoch(model, graph, parts, optimizer)),
            ("measurement", lambda number=number: monitor.step(number)),
        ):
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    epoch, measurement = (statistics.median(seconds[name][1:]) for name in ("epoch", "measurement"))
    return {
        "plain_epoch_cpu_seconds": round(epoch, 4),
        "monitor_cpu_seconds": round(measurement, 4),
        "monitor_percent_of_epoch_at_5": round(100 * measurement / (5 * epoch), 2),
    }


def memory_added_by_audit(nodes: int) -> float:
    """Return how much an audit adds to the peak memory of training steps, in MiB."""
    graph = block_model(nodes)
    parts = split_edges(graph, SplitConfig(), 0)
    model = EncoderDecoderSettings().build(graph.x.size(1))
    # Some training steps first, so that the memory pools of the allocator are filled.
    for batch in islice(_batches(graph, parts, 0), 3):
        messages = remove_edges(parts.message_edges(), batch.pairs, graph.num_nodes)
        batch_loss(model(node_features(graph, model, parts), messages, batch.pairs), batch).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    audit_trained(model, graph, parts)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def _batches(graph: Graph, parts: Split, seed: int) -> EdgeBatches:
    return EdgeBatches(
        parts.message_edges(), graph.num_nodes, Random(), batch_size=BATCH, known=parts.known, balanced=True, seed=seed
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--root", default="data")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models-data", default="digits", help="data set for the models of `link_models.py`")
    parser.add_argument("--figure", type=Path, help="figure of how the time of each model grows with the graph")
    parser.add_argument("--audit-memory", type=int, help="measure only the memory of an audit, on a graph of N nodes")
    parser.add_argument("--monitor", action="store_true", help="measure only the overhead of a `CompositionMonitor`")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.audit_memory:
        print(memory_added_by_audit(options.audit_memory))
        return
    graph = load_graph(options.data, options.root)
    parts = split_edges(graph, SplitConfig(), 0)
    if options.monitor:
        print(
            json.dumps({"data": graph.name, "edges": parts.train.size(1), **time_monitor(graph, parts, options.rounds)})
        )
        return
    plain = EncoderDecoderSettings().build(graph.x.size(1))
    optimizer = torch.optim.Adam(plain.parameters(), lr=5e-3)
    seconds: dict[str, list[float]] = {"plain": [], "ours": [], "sampler": [], "validation": [], "audit": []}
    edges = {"plain": 0, "ours": 0}
    plain_epoch(plain, graph, parts, optimizer)  # warm-up
    for number in range(options.rounds):
        start = time.perf_counter()
        edges["plain"] += sum(plain_epoch(plain, graph, parts, optimizer) for _ in range(EPOCHS))
        seconds["plain"].append(time.perf_counter() - start)
        model = EncoderDecoderSettings().build(graph.x.size(1))
        settings = TrainConfig(Random(), balanced=True, epochs=EPOCHS, batch_size=BATCH, seed=number)
        start = time.perf_counter()
        fit(model, graph, parts, settings)
        seconds["ours"].append(time.perf_counter() - start)
        sampler_seconds, count = time_sampling(graph, parts, number)
        seconds["sampler"].append(sampler_seconds)
        edges["ours"] += count
        seconds["validation"].append(EPOCHS * time_validation(model, graph, parts))
        start = time.perf_counter()
        audit_trained(model, graph, parts)
        seconds["audit"].append(time.perf_counter() - start)
        print(f"round {number}: " + ", ".join(f"{name} {each[-1]:.3f} s" for name, each in seconds.items()), flush=True)
    step_seconds = sum(seconds["ours"]) - sum(seconds["validation"])
    added_mib: dict[int, float] = {}
    for nodes in AUDIT_NODES:
        command = [sys.executable, "-W", "ignore", __file__, "--threads", str(options.threads)]
        command += ["--audit-memory", str(nodes)]
        added_mib[nodes] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"audit of a block model of {nodes} nodes: {added_mib[nodes]:.1f} MiB above training steps", flush=True)
    epoch_seconds = statistics.median(seconds["ours"]) / EPOCHS
    result = {
        "data": graph.name,
        "threads": options.threads,
        "epochs": EPOCHS * options.rounds,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "train_edges_per_second": round(edges["ours"] / sum(seconds["ours"])),
        "plain_pyg_edges_per_second": round(edges["plain"] / sum(seconds["plain"])),
        "sampler_percent_of_step": round(100 * sum(seconds["sampler"]) / step_seconds, 2),
        "epoch_seconds": round(epoch_seconds, 3),
        "audit_seconds": round(statistics.median(seconds["audit"]), 3),
        "audit_epochs": round(statistics.median(seconds["audit"]) / epoch_seconds, 2),
        **time_monitor(graph, parts, options.rounds),
        "audit_added_mib": {str(nodes): round(value, 1) for nodes, value in added_mib.items()},
    }
    result |= measure_models(options.models_data, options.root, 6) | measure_once(options.models_data, options.root, 3)
    result |= measure_growth(options.threads, options.figure)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
