"""What each of several processes does in `test_parallel.py`: run under torchrun, writes what it saw as JSON."""

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
# Policy and allocation; the policies that need more than a head's own tensors are among them.
CASES = [
    ("capkv", "equal"),
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


def inputs() -> dict[str, torch.Tensor]:
    """A batch of two prompts of unequal length."""
    return left_padded([prompt(61), prompt(45, seed=2)])


def run(model: PreTrainedModel, policy: str, allocation: str) -> dict[str, Any]:
    """Tokens of an answer, and what the heads that are here then hold."""
    cache = CompressedCache(model, policy, BUDGET, allocation=allocation, **SETTINGS)
    return {"tokens": answer(model, inputs(), cache, NEW).tolist(), "kept": kept(cache)}


def kept(cache: CompressedCache) -> dict[str, Any]:
    """Positions held by layer and head, the head's number that of the whole model."""
    numbers = [(head.layer, head.head) for head in cache.report().heads]
    rows = [cache.kept_positions(layer.index).transpose(0, 1).tolist() for layer in cache.compressed_layers]
    heads = [[[p for p in row if p >= 0] for row in head] for layer in rows for head in layer]
    return {f"{layer}.{head}": own for (layer, head), own in zip(numbers, heads, strict=True)}


def split(path: Path) -> PreTrainedModel:
    """The model, its heads split over the processes by transformers."""
    options: dict[str, Any] = {"tp_plan": "auto"}
    if "tp_plan" in DistributedConfig.__dataclass_fields__:
        options = {"distributed_config": DistributedConfig(**options)}
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


class Counted:
    """Counts calls of the collectives, which go on as they are."""

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


def selection(sharding: Sharding) -> bool:
    """The largest of all processes, beside a sort of all of them; with ties, −inf and an empty part."""
    generator = torch.Generator().manual_seed(7)
    for count in (0, 1, 5, 40, 200):
        parts = torch.randn(sharding.world_size, 3, 30, generator=generator)
        parts[:, 1] = parts[:, 1].round()
        parts[:, 2] = parts[:, 2].where(parts[:, 2] > 0, float("-inf"))
        values = list(parts[sharding.rank])
        values.append(values[0][:0] if sharding.rank else values[0])
        chosen = topk_masks(values, [count] * 4, sharding)
        for row, (own, stay) in enumerate(zip(values, chosen, strict=True)):
            together = parts[:, row].flatten() if row < 3 else parts[0, 0]
            together = together[together > float("-inf")].sort(descending=True).values[:count]
            here = torch.full((30,), float("inf"))
            here[: int(stay.sum())] = own[stay]
            both = sharding.all_gather(here[None], 0).flatten()
            both = both[both < float("inf")].sort(descending=True).values
            if not torch.equal(both, together):
                return False
    return True


def main(path: Path, out: Path) -> None:
    """Run all cases; called in each process."""
    warnings.simplefilter("ignore")
    model = split(path)
    sharding = Sharding.from_model(model)
    assert sharding is not None
    counted = Counted()
    answer(model, inputs(), DynamicCache(config=model.config), NEW)
    stock = counted.calls
    found: dict[str, Any] = {"fingerprint": fingerprint(model), "exchanged": {}, "cases": {}}
    for policy, allocation in CASES:
        CompressedCache(model, policy, BUDGET, allocation=allocation)  # a profile is looked up here
        before = counted.calls
        found["cases"][f"{policy}/{allocation}"] = run(model, policy, allocation)
        found["exchanged"][f"{policy}/{allocation}"] = counted.calls - before - stock
    found["selection"] = selection(sharding)
    found["profile"] = calibrate(model, tokens=64).attention
    cache = CompressedCache(model, "capkv", BUDGET, allocation="marginal", **SETTINGS)
    tokens = answer(model, inputs(), cache, NEW)
    file = cache.save(model, out / "cache.safetensors")
    again = CompressedCache.load(out / "cache.safetensors", model)
    more = [answer(model, follow(tokens), each, 6).tolist() for each in (cache, again)]
    found["saved"] = {"file": file.name, "goes on": more[0] == more[1]}
    (out / f"{sharding.rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    # All is written. Once in dozens of runs threads of torch's that still live abort the interpreter as it ends.
    os._exit(0)


def follow(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The batch and its answer, to be continued."""
    start = inputs()
    ids = torch.cat((start["input_ids"], tokens), 1)
    return {"input_ids": ids, "attention_mask": torch.cat((start["attention_mask"], torch.ones_like(tokens)), 1)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
