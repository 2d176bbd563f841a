"""Kernels and caches on a GPU: correct against float64, then measured against the bandwidth of a copy. 8 minutes.

    python benchmarks/gpu.py [--json FILE] [--seconds 450] [--small]

One process. Times are of the device, medians of several runs, each with cold caches and queued behind other work, as
scoring is in a prefill. Peers: the same policy in plain torch; kvpress's formulation of CapKV (written from its
mathematics: K and V expanded to query heads, Gram matrix in the model's dtype, LU); torch's own attention. End to end:
a model of Llama-3-8B's shape with random weights (`gpu_model.py`); and link prediction (`gpu_link.py`). What does not
fit, or has no time left, is named as skipped. Last line: one JSON object. `--small` runs the same code on tiny shapes
anywhere, for a test of this script: its numbers mean nothing. Without CUDA nothing else runs.
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
from suffice.kv.storage.ragged_attention import attend
from torch import Tensor
from torch.nn import functional as F

import gpu_exact
from suffice.gpu import disable_kernels
from suffice.kv import DEFAULT_POLICY, Signals, get_policy
from suffice.kv.kernels import usable
from suffice.kv.policy.attention_stats import Verdicts
from suffice.kv.storage.ragged import RaggedStorage

HEADS, KV_HEADS = 32, 8


@dataclass
class Run:
    """One run of this script: where, how large, what was found and what was skipped."""

    device: torch.device
    small: bool
    seconds: float
    start: float = field(default_factory=time.perf_counter)
    result: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.seconds - (time.perf_counter() - self.start)

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def interpreted(self) -> bool:
        """Whether kernels run through Triton's interpreter."""
        return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None

    def tensor(self, *shape: int, seed: int = 0) -> Tensor:
        """Draw one."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, device=self.device, dtype=self.dtype, generator=generator)

    def time(self, what: str, work: Callable[[], Any], repeats: int = 7) -> float | None:
        """Median seconds on the device; None if memory or time ran out, which is noted."""
        if self.left < 5:
            self.skip(what, "no time left")
            return None
        try:
            work()
            if self.device.type != "cuda":
                return statistics.median(_wall(work) for _ in range(2))
            flush = torch.empty(64 * 2**20, dtype=torch.int32, device=self.device)
            taken = []
            for _ in range(1 if self.small else repeats):
                flush.zero_()
                torch.cuda._sleep(2_000_000)  # about a millisecond, in which the launches queue up
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                work()
                end.record()
                torch.cuda.synchronize()
                taken.append(begin.elapsed_time(end) / 1000)
            return statistics.median(taken)
        except torch.OutOfMemoryError:
            self.skip(what, "out of memory")
            return None
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def skip(self, what: str, why: str) -> None:
        """Note that something was not measured."""
        self.skipped.append(f"{what}: {why}")


def _wall(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def expanded_scores(queries: Tensor, keys: Tensor, values: Tensor, tau: float = 5.0) -> Tensor:
    """CapKV as kvpress forms it: everything at query heads, A = I + Σ w v vᵀ in the model's dtype, solved by LU."""
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
    """Scores of the default policy, by kernels where they can be used; nothing is waited for, as in a cache."""
    return get_policy(DEFAULT_POLICY).score(Signals(queries, keys, values, verdicts=Verdicts()))


def copy_bandwidth(run: Run) -> float:
    """Bytes read and written a second by a copy."""
    source = torch.empty(2**24 if run.small else 2**29, dtype=torch.int32, device=run.device)
    target = torch.empty_like(source)
    seconds = run.time("copy", lambda: target.copy_(source))
    assert seconds is not None
    print(f"copy: {2 * source.nbytes / seconds / 1e9:.0f} GB/s")
    return 2 * source.nbytes / seconds


def score(run: Run, bandwidth: float) -> None:
    """Time scoring: ours, plain torch, kvpress's formulation, and the bound of reading K and V twice."""
    sizes = (64,) if run.small else (4096, 32768, 131072)
    rows: list[dict[str, Any]] = []
    print(f"\n{'tokens':>7} {'batch':>5} {'dim':>4} {'ours ms':>9} {'torch ms':>9} {'kvpress ms':>10} {'of copy':>8}")
    for dim in (64,) if run.small else (128, 64):
        for tokens in sizes:
            for batch in (1, 2) if run.small else (1, 4, 16):
                keys, values = (run.tensor(batch, KV_HEADS, tokens, dim, seed=seed) for seed in (1, 2))
                queries = run.tensor(batch, HEADS, min(tokens, 512), dim, seed=3)
                what = f"score {tokens} x {batch}, dim {dim}"

                ours = partial(own_scores, queries, keys, values)
                row: dict[str, Any] = {"tokens": tokens, "batch": batch, "dim": dim}
                with torch.no_grad():
                    row["ours"] = run.time(what, ours) if usable(queries, keys, values) else None
                    with disable_kernels():
                        row["torch"] = run.time(f"{what}, plain torch", ours, 3)
                    theirs = partial(expanded_scores, queries, keys, values)
                    row["kvpress"] = run.time(f"{what}, kvpress's formulation", theirs, 3)
                if row["ours"]:
                    row["of_copy"] = 2 * (keys.nbytes + values.nbytes) / row["ours"] / bandwidth
                rows.append(row)
                times = " ".join(f"{_ms(row[name]):>9}" for name in ("ours", "torch", "kvpress"))
                print(f"{tokens:>7} {batch:>5} {dim:>4} {times}  {_percent(row.get('of_copy')):>8}", flush=True)
                if tokens == 32768 and batch == 1 and dim == 128:
                    run.result["score_of_copy_bandwidth"] = row.get("of_copy")
    run.result["score"] = rows


def compact(run: Run, bandwidth: float) -> None:
    """Time compaction in place against a gather into a new buffer."""
    tokens, batch, dim = (256, 1, 64) if run.small else (32768, 4, 128)
    keys = run.tensor(batch, KV_HEADS, tokens, dim)
    kept = torch.randperm(tokens, device=run.device)[: tokens // 4].sort().values.expand(batch, KV_HEADS, -1)
    index = kept[..., None].expand(-1, -1, -1, dim)
    row: dict[str, Any] = {"gather": run.time("gather", lambda: keys.gather(2, index))}
    if usable(keys):
        from suffice.kv.kernels.compaction import move_to_front

        row["in_place"] = run.time("compaction", lambda: move_to_front(keys, kept))
        if row["in_place"]:
            row["of_copy"] = 2 * keys.nbytes / 4 / row["in_place"] / bandwidth
    else:
        run.skip("compaction", "no kernel here")
    print(f"\ncompaction to 25 %: in place {_ms(row.get('in_place'))} ms, gather {_ms(row['gather'])} ms, ", end="")
    print(f"in place at {_percent(row.get('of_copy'))} of copy bandwidth")
    run.result["compaction"] = row


def decoding(run: Run, bandwidth: float) -> None:
    """Time attention of one token: heads of equal length against sdpa, skewed ones against padded sdpa."""
    rows: list[dict[str, Any]] = []
    head = ("mean", "batch", "dim", "lengths", "ours ms", "sdpa ms", "sdpa/ours", "of copy")
    print("\n{:>7} {:>5} {:>4} {:>8} {:>9} {:>9} {:>9} {:>8}".format(*head))
    for dim in (64,) if run.small else (128, 64):
        for tokens in (64,) if run.small else (4096, 32768, 131072):
            for batch in (1, 2) if run.small else (1, 4, 16):
                for skewed in (False, True):
                    row = _decoding(run, dim, tokens, batch, skewed, bandwidth)
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


def _decoding(run: Run, dim: int, tokens: int, batch: int, skewed: bool, bandwidth: float) -> dict[str, Any]:
    lengths = [[tokens] * KV_HEADS] * batch
    if skewed:  # as head profiles are: most heads short, a few eight times the mean
        shares = torch.tensor([4.0, 1.5, 0.8, 0.6, 0.4, 0.3, 0.2, 0.2])
        lengths = [(shares * tokens).long().tolist()] * batch
    packed, width = batch * sum(lengths[0]), max(lengths[0])
    row: dict[str, Any] = {"tokens": tokens, "batch": batch, "dim": dim, "skewed": skewed, "ours": None, "sdpa": None}
    what = f"decoding {tokens} x {batch}, dim {dim}, {'skewed' if skewed else 'equal'}"
    query = run.tensor(batch, HEADS, 1, dim)
    try:
        keys, values = (run.tensor(packed, dim, seed=seed) for seed in (1, 2))
        positions = torch.zeros(packed, dtype=torch.int32, device=run.device)
        tail = run.tensor(batch, KV_HEADS, 1, dim)
        newest = torch.zeros(batch, 1, dtype=torch.int32, device=run.device)
        storage = RaggedStorage(keys, values, positions, lengths, (tail, tail, newest))
        with torch.no_grad():
            row["ours"] = run.time(what, partial(attend, query, storage, None, dim**-0.5))
        if row["ours"]:
            row["of_copy"] = (keys.nbytes + values.nbytes) / row["ours"] / bandwidth
        del storage, keys, values
        keys, values = (run.tensor(batch, KV_HEADS, width, dim, seed=seed) for seed in (1, 2))
        mask = None
        if skewed:
            ends = torch.tensor(lengths, device=run.device).repeat_interleave(HEADS // KV_HEADS, dim=1)
            mask = (torch.arange(width, device=run.device) < ends[..., None])[:, :, None]
        with torch.no_grad():
            row["sdpa"] = run.time(
                f"{what}, sdpa",
                lambda: F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True),
            )
    except torch.OutOfMemoryError:
        run.skip(what, "out of memory")
    if row["ours"] and row["sdpa"]:
        row["of_sdpa"] = row["sdpa"] / row["ours"]
    return row


def _ms(seconds: float | None) -> str:
    return "skipped" if seconds is None else f"{1000 * seconds:.3f}"


def _percent(share: float | None) -> str:
    return "skipped" if share is None else f"{100 * share:.0f} %"


def describe(device: torch.device) -> dict[str, Any]:
    """Describe the machine."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cpu": platform.machine()}
    if importlib.util.find_spec("triton") is not None:
        import triton

        found["triton"] = triton.__version__
    if device.type == "cuda":
        own = torch.cuda.get_device_properties(device)
        found |= {"gpu": own.name, "gpu_gib": round(own.total_memory / 2**30), "cuda": torch.version.cuda}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result there")
    parser.add_argument("--seconds", type=float, default=450, help="measure nothing new after this long")
    parser.add_argument("--small", action="store_true", help="tiny shapes, on any machine: tests this script only")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.small:
        print("no CUDA device: nothing was measured (--small runs this script on tiny shapes on the CPU)")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(device, options.small, options.seconds)
    keys = ("score_of_copy_bandwidth", "score_percent_of_prefill_32k", "ragged_of_flash", "largest_batch")
    run.result = {"machine": describe(device), "small": options.small, **dict.fromkeys(keys)}
    gpu_exact.check(run)
    bandwidth = copy_bandwidth(run)
    run.result["copy_gb_per_second"] = bandwidth / 1e9
    compact(run, bandwidth)
    import gpu_model

    # The model first: its figures are the ones that a lack of time must not cost.
    gpu_model.measure(run)
    decoding(run, bandwidth)
    score(run, bandwidth)
    if importlib.util.find_spec("torch_geometric") is None:
        run.skip("link prediction", "torch-geometric is missing")
    else:
        import gpu_link

        if not gpu_link.measure(run, bandwidth):
            run.result["wrong"].append("link kernels differ from plain torch")
    own = next((row for row in run.result["score"] if row["tokens"] == 32768 and row["batch"] == 1), None)
    prefill = run.result.get("prefill_seconds_32k")
    if own and own["ours"] and prefill:
        run.result["score_percent_of_prefill_32k"] = 100 * gpu_model.LAYERS * own["ours"] / prefill
    full, evicted = (
        next((x["prefill"] for x in run.result["end_to_end"] if (x["tokens"], x["cache"]) == (32768, name)), None)
        for name in ("full", "25% uniform")
    )
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
