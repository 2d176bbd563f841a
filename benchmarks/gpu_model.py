"""Measure time, peak memory and the largest batch of a model of Llama-3-8B's shape with random weights."""

from __future__ import annotations

import copy
import gc
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from suffice.kv import CompressedCache
from suffice.kv.budget.allocation import Allocation, BudgetRequest

if TYPE_CHECKING:
    from gpu import Run

LAYERS = 32


@dataclass(frozen=True)
class RandomBudgets(Allocation):
    """Random budgets of heads, as uneven as those of measured head profiles, and the same in every run."""

    @property
    def per_head(self) -> bool:
        """Whether the heads of one layer may keep different numbers of entries."""
        return True

    def entries_per_head(self, request: BudgetRequest) -> Tensor:
        """Return budgets whose mean is the requested budget, up to rounding."""
        heads = request.num_key_value_heads
        generator = torch.Generator().manual_seed(request.context.layer)
        shares = torch.randn(heads, generator=generator).exp()
        rows = []
        for budget, num_seen, minimum in zip(request.budget, request.num_seen, request.min_entries, strict=True):
            low, high = 0.0, float(heads * num_seen)
            for _ in range(40):  # bisect the factor for which the clipped budgets have the right mean
                middle = (low + high) / 2
                mean = (shares * middle).clamp(minimum, num_seen).mean()
                low, high = (middle, high) if mean < budget else (low, middle)
            rows.append((shares * low).clamp(minimum, num_seen).long())
        return torch.stack(rows)


def build(run: Run) -> Any:
    """Return the model with random weights."""
    config = LlamaConfig(
        hidden_size=256 if run.small else 4096,
        intermediate_size=256 if run.small else 14336,
        num_hidden_layers=2 if run.small else LAYERS,
        num_attention_heads=8 if run.small else 32,
        num_key_value_heads=2 if run.small else 8,
        vocab_size=512 if run.small else 128256,
        max_position_embeddings=2**17 + 2**10,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    with torch.device(run.device):
        return AutoModelForCausalLM.from_config(config, dtype=run.dtype, attn_implementation="sdpa").eval()


def caches(model: Any) -> dict[str, Any]:
    """Return a function for each cache that creates it."""
    factories: dict[str, Any] = {"full": lambda: DynamicCache(config=model.config)}
    for budget in (0.25, 0.1):
        for name, allocation in (("uniform", "equal"), ("ragged", RandomBudgets())):

            def make(budget: float = budget, allocation: Any = allocation) -> CompressedCache:
                return CompressedCache(model, budget=budget, allocation=allocation)

            factories[f"{budget:.0%} {name}"] = make
    return factories


def measure(run: Run) -> None:
    """Fill `run.result` with the times of prefill and decoding and the largest batches."""
    run.result["end_to_end"] = []
    with torch.no_grad():
        _measure_all(run)
    _release_memory(run)


def _measure_all(run: Run) -> None:
    try:
        model = build(run)
    except torch.OutOfMemoryError:
        run.skip("the model", "out of memory")
        return
    rows: list[dict[str, Any]] = run.result["end_to_end"]
    largest: dict[str, dict[str, int]] = {}
    print(f"\n{'tokens':>7} {'cache':>12} {'prefill s':>9} {'batch':>5} {'tokens/s':>9} {'peak GiB':>8}")
    for tokens, reserve in ((128, 0),) if run.small else ((32768, 150), (131072, 190)):
        ids = torch.randint(model.config.vocab_size, (1, tokens), device=run.device)
        # Compile kernels and reserve memory before anything is timed.
        for make in (*caches(model).values(),)[: 1 if run.small else 3]:
            _prefill(run, model, make(), ids[:, :2048])
        for name, make in caches(model).items():
            label = f"{tokens} tokens, {name}"
            if run.seconds_left < reserve:
                run.skip(label, "no time left")
                continue
            try:
                row = _measure_cache(run, model, make, ids)
            except torch.OutOfMemoryError:
                run.skip(label, "out of memory")
                _release_memory(run)
                continue
            row |= {"tokens": tokens, "cache": name}
            rows.append(row)
            largest.setdefault(str(tokens), {})[name] = row["largest_batch"]
            if name == "full":
                run.result["prefill_seconds_32k" if tokens == 32768 else f"prefill_seconds_{tokens}"] = row["prefill"]
            for batch, (speed, peak) in row["decoding"].items():
                print(
                    f"{tokens:>7} {name:>12} {row['prefill']:>9.2f} {batch:>5} {speed:>9.1f} {peak:>8.2f}", flush=True
                )
    run.result["largest_batch"] = largest


def _prefill(run: Run, model: Any, cache: Any, ids: Tensor) -> float:
    _synchronize(run)
    start = time.perf_counter()
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    _synchronize(run)
    return time.perf_counter() - start


def _measure_cache(run: Run, model: Any, make: Any, ids: Tensor) -> dict[str, Any]:
    """Prefill one row, decode it alone, and decode as many copies of it as fit into memory."""
    _release_memory(run)
    base = make()
    before = _allocated_bytes(run)
    row: dict[str, Any] = {"prefill": _prefill(run, model, base, ids), "prefill_peak_gib": _peak_gib(run)}
    _release_memory(run)
    row["cache_gib"] = (_allocated_bytes(run) - before) / 2**30
    decoding: dict[int, tuple[float, float]] = {}
    decoding[1] = _decode(run, model, base, 1)
    batch = 2 if run.small else int(0.97 * _free_bytes(run) / max(_allocated_bytes(run) - before, 1)) + 1
    while batch > 1:
        try:
            decoding[batch] = _decode(run, model, base, batch)
            break
        except torch.OutOfMemoryError:
            batch = min(batch - 1, int(0.93 * batch))
        _release_memory(run)
    row["largest_batch"] = max(batch, 1)
    row["decoding"] = decoding
    return row


def _decode(run: Run, model: Any, base: Any, batch: int) -> tuple[float, float]:
    """Return tokens per second and peak memory in GiB for a batch of copies of one row."""
    cache = base.copy() if isinstance(base, CompressedCache) else copy.deepcopy(base)
    if batch > 1:
        cache.batch_repeat_interleave(batch)
    _release_memory(run)
    ids = torch.zeros(batch, 1, dtype=torch.long, device=run.device)
    model(ids, past_key_values=cache, use_cache=True)
    _synchronize(run)
    start = time.perf_counter()
    num_steps = 2 if run.small else 8
    for _ in range(num_steps):
        model(ids, past_key_values=cache, use_cache=True)
    _synchronize(run)
    return num_steps * batch / (time.perf_counter() - start), _peak_gib(run)


def _release_memory(run: Run) -> None:
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _synchronize(run: Run) -> None:
    if run.device.type == "cuda":
        torch.cuda.synchronize()


def _allocated_bytes(run: Run) -> int:
    return torch.cuda.memory_allocated() if run.device.type == "cuda" else 0


def _peak_gib(run: Run) -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if run.device.type == "cuda" else 0.0


def _free_bytes(run: Run) -> int:
    return torch.cuda.mem_get_info()[0] if run.device.type == "cuda" else 0
