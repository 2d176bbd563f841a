"""Program that `test_parallel.py` runs under torchrun; each process writes its results as JSON."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.distributed import DistributedConfig

from suffice.kv import CompressedCache
from suffice.kv.budget.calibration import calibrate
from suffice.kv.hf.fingerprint import fingerprint
from suffice.kv.hf.tensor_parallel import Sharding, topk_masks
from tests.kv.tiny import answer, left_padded, prompt

BUDGET, NEW = 18, 10
SETTINGS: dict[str, Any] = {"evict": "always", "interval": 4}
# Policy and allocation, including policies that need more than the tensors of a head.
CASES = [
    ("capkv", "equal"),
    ("expected-attention", "equal"),
    ("key-leverage", "equal"),
    ("criticalkv", "equal"),
    ("random", "equal"),
    ("tova", "equal"),
    ("tova", "adakv"),
    ("tova", "marginal"),
    ("capkv", "pyramid"),
    ("capkv", "adakv"),
    ("capkv", "profile"),
    ("capkv", "marginal"),
    ("h2o", "marginal"),
]
# With quantized entries, and a budget that exceeds the entries that stay exact: heads of unequal and of equal length.
QUANTIZED_CASES = [("capkv", "profile"), ("h2o", "equal")]
QUANTIZED_BUDGET, BITS = 44, 4


def inputs() -> dict[str, torch.Tensor]:
    """Return a batch of two prompts of unequal length."""
    return left_padded([prompt(61), prompt(45, seed=2)])


def run(model: PreTrainedModel, policy: str, allocation: str, bits: int | None = None) -> dict[str, Any]:
    """Generate an answer; return its tokens, and kept positions and quantization errors of the local heads."""
    # Policies that rotate keys back need the rotary embedding in any case.
    rerotate = policy in ("expected-attention", "key-leverage")
    budget = BUDGET if bits is None else QUANTIZED_BUDGET
    cache = CompressedCache(model, policy, budget, allocation=allocation, rerotate=rerotate, bits=bits, **SETTINGS)
    tokens = answer(model, inputs(), cache, NEW).tolist()
    heads = cache.report().heads
    errors = {f"{head.layer}.{head.head}": [head.key_error, head.value_error] for head in heads if head.bits}
    return {"tokens": tokens, "kept": kept(cache), "errors": errors}


def kept(cache: CompressedCache) -> dict[str, Any]:
    """Return the kept positions of each row by "layer.head"; the index of the head is that in the whole model."""
    names = [f"{head.layer}.{head.head}" for head in cache.report().heads]
    layers = [cache.kept_positions(layer.index).transpose(0, 1).tolist() for layer in cache.compressed_layers]
    heads = [[[p for p in row if p >= 0] for row in head] for layer in layers for head in layer]
    return dict(zip(names, heads, strict=True))


def load_tensor_parallel(path: Path) -> PreTrainedModel:
    """Load the model with its heads split over the processes by transformers."""
    options: dict[str, Any] = {"tp_plan": "auto"}
    if "tp_plan" in DistributedConfig.__dataclass_fields__:
        options = {"distributed_config": DistributedConfig(**options)}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


class CollectiveCounter:
    """Counts the calls of collective operations."""

    NAMES = ("all_reduce", "all_gather", "broadcast")

    def __init__(self) -> None:
        self.calls = 0
        for name in self.NAMES:
            setattr(dist, name, self._counting(getattr(dist, name)))

    def _counting(self, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            return function(*arguments, **options)

        return call


def check_selection(sharding: Sharding) -> bool:
    """Compare `topk_masks` with a sort of the values of all processes; they include ties, −inf and an empty part."""
    generator = torch.Generator().manual_seed(7)
    for count in (0, 1, 5, 40, 200):
        parts = torch.randn(sharding.world_size, 3, 30, generator=generator)
        parts[:, 1] = parts[:, 1].round()
        parts[:, 2] = parts[:, 2].where(parts[:, 2] > 0, float("-inf"))
        values = list(parts[sharding.rank])
        values.append(values[0][:0] if sharding.rank else values[0])
        masks = topk_masks(values, [count] * 4, sharding)
        for row, (own, mask) in enumerate(zip(values, masks, strict=True)):
            expected = parts[:, row].flatten() if row < 3 else parts[0, 0]
            expected = expected[expected > float("-inf")].sort(descending=True).values[:count]
            selected = torch.full((30,), float("inf"))
            selected[: int(mask.sum())] = own[mask]
            of_all = sharding.all_gather(selected[None], 0).flatten()
            of_all = of_all[of_all < float("inf")].sort(descending=True).values
            if not torch.equal(of_all, expected):
                return False
    return True


def main(path: Path, out: Path) -> None:
    """Run all cases in this process."""
    warnings.simplefilter("ignore")
    model = load_tensor_parallel(path)
    sharding = Sharding.from_model(model)
    assert sharding is not None
    counter = CollectiveCounter()
    answer(model, inputs(), DynamicCache(config=model.config), NEW)
    stock_calls = counter.calls
    results: dict[str, Any] = {"fingerprint": fingerprint(model), "collectives": {}, "cases": {}}
    for policy, allocation in CASES:
        CompressedCache(model, policy, BUDGET, allocation=allocation)  # so that its profile is known before counting
        before = counter.calls
        results["cases"][f"{policy}/{allocation}"] = run(model, policy, allocation)
        results["collectives"][f"{policy}/{allocation}"] = counter.calls - before - stock_calls
    for policy, allocation in QUANTIZED_CASES:
        results["cases"][f"{policy}/{allocation}/{BITS}"] = run(model, policy, allocation, BITS)
    results["selection"] = check_selection(sharding)
    results["profile"] = calibrate(model, tokens=64).attention
    cache = CompressedCache(model, "capkv", BUDGET, allocation="marginal", **SETTINGS)
    tokens = answer(model, inputs(), cache, NEW)
    file = cache.save(model, out / "cache.safetensors")
    loaded = CompressedCache.load(out / "cache.safetensors", model)
    answers = [answer(model, with_answer(tokens), each, 6).tolist() for each in (cache, loaded)]
    results["saved"] = {"file": file.name, "same answer": answers[0] == answers[1]}
    (out / f"{sharding.rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    # Exit at once, because threads of torch sometimes abort the interpreter while it shuts down.
    os._exit(0)


def with_answer(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the batch followed by an answer."""
    start = inputs()
    ids = torch.cat((start["input_ids"], tokens), 1)
    return {"input_ids": ids, "attention_mask": torch.cat((start["attention_mask"], torch.ones_like(tokens)), 1)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
