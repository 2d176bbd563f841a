"""Measure kernels and caches on a GPU in 8 minutes, after a comparison of every kernel with float64.

    python benchmarks/gpu.py [--json FILE] [--seconds 450] [--small]

Everything runs in one process. Times are device times: medians of several runs, each with cold caches and with launches
queued behind other work, as scoring runs in a prefill. They are compared with the bandwidth of a copy, and with

* the same policy in plain PyTorch;
* kvpress's formulation of CapKV, written from its mathematics: K and V expanded to query heads, Gram matrix in the
  model's dtype, LU decomposition;
* PyTorch's own attention.

`gpu_model.py` measures a model of Llama-3-8B's shape with random weights end to end, `gpu_quantized.py` decoding with
4 bits, and `gpu_link.py` link prediction.
Measurements that run out of memory or time are listed as skipped. The last line of the output is a JSON object.

`--small` runs the same code on tiny shapes on any machine, to test this script. Its numbers mean nothing. Without CUDA
and without `--small`, nothing is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import gpu_exact
from suffice.gpu import disable_kernels
from suffice.kv import DEFAULT_POLICY, get_policy
from suffice.kv.backend.triton_backend import choose_backend
from suffice.kv.kernels import usable
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.deferred_checks import DeferredChecks
from suffice.kv.storage.ragged import PackedEntries, RaggedStorage, Tail


@dataclass
class Run:
    """One run of the benchmark: its device and limits, its results, and the measurements that were skipped."""

    device: torch.device
    small: bool
    seconds: float
    start: float = field(default_factory=time.perf_counter)
    result: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def seconds_left(self) -> float:
        """Seconds until the time limit."""
        return self.seconds - (time.perf_counter() - self.start)

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return 4 * self.kv_heads

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return 2 if self.small else 8

    @property
    def dtype(self) -> torch.dtype:
        """Data type of keys and values."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def is_interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter."""
        return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None

    def random_tensor(self, *shape: int, seed: int = 0) -> Tensor:
        """Return a tensor of standard normal numbers."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, device=self.device, dtype=self.dtype, generator=generator)

    def time(self, name: str, function: Callable[[], Any], repeats: int = 7) -> float | None:
        """Return the median device time in seconds, or None if memory or time ran out, which is recorded."""
        if self.seconds_left < 5:
            self.skip(name, "no time left")
            return None
        try:
            if not self.small:
                function()  # compiles kernels
            if self.device.type != "cuda":
                return _wall_time(function)
            flush = torch.empty(64 * 2**20, dtype=torch.int32, device=self.device)
            times = []
            for _ in range(1 if self.small else repeats):
                flush.zero_()
                torch.cuda._sleep(2_000_000)  # about one millisecond, in which the launches are queued
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end) / 1000)
            return statistics.median(times)
        except torch.OutOfMemoryError:
            self.skip(name, "out of memory")
            return None
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def skip(self, name: str, reason: str) -> None:
        """Record that something was not measured."""
        self.skipped.append(f"{name}: {reason}")


def _wall_time(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def expanded_scores(queries: Tensor, keys: Tensor, values: Tensor, tau: float = 5.0) -> Tensor:
    """Score by CapKV as kvpress does: per query head, with A = I + Σ w v vᵀ in the model's dtype, solved by LU."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    mean = F.normalize(queries[:, :, -64:].mean(2, keepdim=True), dim=-1)
    weights = (tau * (F.normalize(keys, dim=-1) * mean).sum(-1, keepdim=True)).exp()
    gram = values.mT @ (values * weights)
    matrix = gram.float() + torch.eye(values.shape[-1], device=values.device)
    solved = torch.linalg.solve(matrix, values.float().mT).mT
    scores = (values.float() * solved).sum(-1) * weights.squeeze(-1)
    return scores.unflatten(1, (-1, group)).mean(2)


def own_scores(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Score by the default policy, with kernels where possible, and without waiting for the device, as a cache does."""
    stats = AttentionStats(queries, keys, values, checks=DeferredChecks())
    return get_policy(DEFAULT_POLICY).score(stats, choose_backend(queries, keys, values))


def copy_bandwidth(run: Run) -> float:
    """Return the bytes per second that a copy reads and writes."""
    source = torch.empty(2**24 if run.small else 2**29, dtype=torch.int32, device=run.device)
    target = torch.empty_like(source)
    seconds = run.time("copy", lambda: target.copy_(source))
    assert seconds is not None
    print(f"copy: {2 * source.nbytes / seconds / 1e9:.0f} GB/s")
    return 2 * source.nbytes / seconds


def score(run: Run, bandwidth: float) -> None:
    """Time scoring by kernels, by plain PyTorch and by kvpress's formulation; the bound is reading K and V twice."""
    sizes = (64,) if run.small else (4096, 32768, 131072)
    rows: list[dict[str, Any]] = []
    print(f"\n{'tokens':>7} {'batch':>5} {'dim':>4} {'ours ms':>9} {'torch ms':>9} {'kvpress ms':>10} {'of copy':>8}")
    for dim in (64,) if run.small else (128, 64):
        for tokens in sizes:
            for batch in (1, 2) if run.small else (1, 4, 16):
                keys, values = (run.random_tensor(batch, run.kv_heads, tokens, dim, seed=seed) for seed in (1, 2))
                queries = run.random_tensor(batch, run.heads, min(tokens, 512), dim, seed=3)
                name = f"score {tokens} x {batch}, dim {dim}"
                ours = partial(own_scores, queries, keys, values)
                row: dict[str, Any] = {"tokens": tokens, "batch": batch, "dim": dim}
                with torch.no_grad():
                    row["ours"] = run.time(name, ours) if usable(queries, keys, values) else None
                    with disable_kernels():
                        row["torch"] = run.time(f"{name}, plain torch", ours, 3)
                    kvpress = partial(expanded_scores, queries, keys, values)
                    row["kvpress"] = run.time(f"{name}, kvpress's formulation", kvpress, 3)
                if row["ours"]:
                    row["of_copy"] = 2 * (keys.nbytes + values.nbytes) / row["ours"] / bandwidth
                rows.append(row)
                times = " ".join(f"{_ms(row[column]):>9}" for column in ("ours", "torch", "kvpress"))
                print(f"{tokens:>7} {batch:>5} {dim:>4} {times}  {_percent(row.get('of_copy')):>8}", flush=True)
                if tokens == 32768 and batch == 1 and dim == 128:
                    run.result["score_of_copy_bandwidth"] = row.get("of_copy")
    run.result["score"] = rows


def compact(run: Run, bandwidth: float) -> None:
    """Time in-place compaction and a gather into a new buffer."""
    tokens, batch, dim = (256, 1, 64) if run.small else (32768, 4, 128)
    keys = run.random_tensor(batch, run.kv_heads, tokens, dim)
    kept = torch.randperm(tokens, device=run.device)[: tokens // 4].sort().values.expand(batch, run.kv_heads, -1)
    index = kept[..., None].expand(-1, -1, -1, dim)
    row: dict[str, Any] = {"gather": run.time("gather", lambda: keys.gather(2, index))}
    if usable(keys):
        from suffice.kv.kernels.compaction import move_to_front

        row["in_place"] = run.time("compaction", lambda: move_to_front(keys, kept))
        if row["in_place"]:
            row["of_copy"] = 2 * keys.nbytes / 4 / row["in_place"] / bandwidth
    else:
        run.skip("compaction", "no kernel for this device")
    print(f"\ncompaction to 25 %: in place {_ms(row.get('in_place'))} ms, gather {_ms(row['gather'])} ms, ", end="")
    print(f"in place at {_percent(row.get('of_copy'))} of copy bandwidth")
    run.result["compaction"] = row


def decoding(run: Run, bandwidth: float) -> None:
    """Time attention of one token: heads of equal length against sdpa, heads of unequal length against padded sdpa."""
    rows: list[dict[str, Any]] = []
    head = ("mean", "batch", "dim", "lengths", "ours ms", "sdpa ms", "sdpa/ours", "of copy")
    print("\n{:>7} {:>5} {:>4} {:>8} {:>9} {:>9} {:>9} {:>8}".format(*head))
    for dim in (64,) if run.small else (128, 64):
        for tokens in (64,) if run.small else (4096, 32768, 131072):
            for batch in (1, 2) if run.small else (1, 4, 16):
                for skewed in (False, True):
                    row = _measure_decoding(run, dim, tokens, batch, skewed, bandwidth)
                    rows.append(row)
                    ratio = "" if row.get("of_sdpa") is None else f"{row['of_sdpa']:.2f}"
                    print(
                        f"{tokens:>7} {batch:>5} {dim:>4} {'skewed' if skewed else 'equal':>8} {_ms(row['ours']):>9} "
                        f"{_ms(row['sdpa']):>9} {ratio:>9} {_percent(row.get('of_copy')):>8}",
                        flush=True,
                    )
                    if (tokens, batch, dim, skewed) == (32768, 4, 128, False):
                        run.result["ragged_of_flash"] = row.get("of_sdpa")
    run.result["decoding"] = rows


def _measure_decoding(run: Run, dim: int, tokens: int, batch: int, skewed: bool, bandwidth: float) -> dict[str, Any]:
    lengths = [[tokens] * run.kv_heads] * batch
    if skewed:  # like head profiles: most heads are short, a few are several times as long as the mean
        shares = torch.tensor([4.0, 1.5, 0.8, 0.6, 0.4, 0.3, 0.2, 0.2])[: run.kv_heads]
        lengths = [(shares * tokens).long().tolist()] * batch
    packed, width = batch * sum(lengths[0]), max(lengths[0])
    row: dict[str, Any] = {"tokens": tokens, "batch": batch, "dim": dim, "skewed": skewed, "ours": None, "sdpa": None}
    name = f"decoding {tokens} x {batch}, dim {dim}, {'skewed' if skewed else 'equal'}"
    query = run.random_tensor(batch, run.heads, 1, dim)
    try:
        keys, values = (run.random_tensor(packed, dim, seed=seed) for seed in (1, 2))
        positions = torch.zeros(packed, dtype=torch.int32, device=run.device)
        tail = run.random_tensor(batch, run.kv_heads, 1, dim)
        tail_positions = torch.zeros(batch, 1, dtype=torch.int32, device=run.device)
        storage = RaggedStorage(PackedEntries(keys, values, positions, lengths), Tail(tail, tail, tail_positions))
        backend = choose_backend(query, *storage.buffers)
        with torch.no_grad():
            row["ours"] = run.time(name, partial(backend.ragged_attention, query, storage, None, dim**-0.5))
        if row["ours"]:
            row["of_copy"] = (keys.nbytes + values.nbytes) / row["ours"] / bandwidth
        del storage, keys, values
        keys, values = (run.random_tensor(batch, run.kv_heads, width, dim, seed=seed) for seed in (1, 2))
        mask = None
        if skewed:
            ends = torch.tensor(lengths, device=run.device).repeat_interleave(run.heads // run.kv_heads, dim=1)
            mask = (torch.arange(width, device=run.device) < ends[..., None])[:, :, None]
        with torch.no_grad():
            row["sdpa"] = run.time(
                f"{name}, sdpa",
                lambda: F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True),
            )
    except torch.OutOfMemoryError:
        run.skip(name, "out of memory")
    if row["ours"] and row["sdpa"]:
        row["of_sdpa"] = row["sdpa"] / row["ours"]
    return row


def _ms(seconds: float | None) -> str:
    return "skipped" if seconds is None else f"{1000 * seconds:.3f}"


def _percent(share: float | None) -> str:
    return "skipped" if share is None else f"{100 * share:.0f} %"


def describe(device: torch.device) -> dict[str, Any]:
    """Return the versions and devices of the machine."""
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cpu": platform.machine()}
    if importlib.util.find_spec("triton") is not None:
        import triton

        machine["triton"] = triton.__version__
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        machine |= {"gpu": gpu.name, "gpu_gib": round(gpu.total_memory / 2**30), "cuda": torch.version.cuda}
    return machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--seconds", type=float, default=450, help="start no new measurement after this time")
    parser.add_argument("--small", action="store_true", help="use tiny shapes, on any machine, to test this script")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.small:
        print("No CUDA device was found, so nothing was measured. To test this script on tiny shapes, use --small.")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(device, options.small, options.seconds)
    keys = ("score_of_copy_bandwidth", "score_percent_of_prefill_32k", "ragged_of_flash", "quantized_of_ragged")
    run.result = {"machine": describe(device), "small": options.small, **dict.fromkeys((*keys, "largest_batch"))}
    gpu_exact.check(run)
    bandwidth = copy_bandwidth(run)
    run.result["copy_gb_per_second"] = bandwidth / 1e9
    compact(run, bandwidth)
    import gpu_model
    import gpu_quantized

    # Measure the model first, because its results are needed even if the time runs out.
    gpu_model.measure(run)
    decoding(run, bandwidth)
    gpu_quantized.measure(run, bandwidth)
    score(run, bandwidth)
    if importlib.util.find_spec("torch_geometric") is None:
        run.skip("link prediction", "torch-geometric is not installed")
    else:
        import gpu_link

        if not gpu_link.measure(run, bandwidth):
            run.result["wrong"].append("link kernels differ from plain PyTorch")
    scoring = next((row for row in run.result["score"] if row["tokens"] == 32768 and row["batch"] == 1), None)
    prefill = run.result.get("prefill_seconds_32k")
    if scoring and scoring["ours"] and prefill:
        run.result["score_percent_of_prefill_32k"] = 100 * gpu_model.LAYERS * scoring["ours"] / prefill
    prefills = {row["cache"]: row["prefill"] for row in run.result["end_to_end"] if row["tokens"] == 32768}
    full, evicted = prefills.get("full"), prefills.get("25% uniform")
    if full and evicted:
        run.result["eviction_percent_of_prefill_32k"] = 100 * (evicted / full - 1)
    run.result["skipped"] = run.skipped
    run.result["seconds"] = round(time.perf_counter() - run.start)
    print("\nskipped: " + ("; ".join(run.skipped) or "nothing"))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(run.result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(run.result))
    if run.result["wrong"]:
        sys.exit(f"wrong: {'; '.join(run.result['wrong'])}")


if __name__ == "__main__":
    main()
