"""Which model this is: a short name that its weights and configuration decide."""

from __future__ import annotations

import hashlib
import json
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from suffice.kv.hf.offload import fetched
from suffice.kv.hf.tensor_parallel import Sharding, gathered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What loading changes without changing the model.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "quantization_config")
_SAMPLE = 64

# Of models whose weights are not all here: to fetch them is dear.
_known: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def fingerprint(model: PreTrainedModel) -> str:
    """Return 16 hexadecimal digits that stand for a model's configuration and weights, whatever its dtype and device.

    Of the weights it takes the names, the shapes and the signs of a few numbers of each. Weights that are split over
    processes are put together for it, one at a time, once for each model; all processes must ask. Those that wait on
    another device or on a disk are read once.
    """
    sharded = Sharding.of(model) is not None
    if not sharded and all(weight.device.type != "meta" for weight in model.get_decoder().parameters()):
        return _digest(model, sharded)
    if model not in _known:
        _known[model] = _digest(model, sharded)
    return _known[model]


def _digest(model: PreTrainedModel, sharded: bool) -> str:
    config: Any = model.config
    facts = {name: value for name, value in config.to_dict().items() if name not in _VOLATILE and name[0] != "_"}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    decoder = model.get_decoder()
    prefix = next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")
    named: list[str] = []
    signs: list[Tensor] = []
    with torch.no_grad():
        for name, weight in sorted(decoder.state_dict().items()):
            if sharded:
                weight = gathered(model, prefix + name, weight)
            elif weight.device.type == "meta":
                owner, _, own = name.rpartition(".")
                found = fetched(decoder.get_submodule(owner), own)
                weight = weight if found is None else found
            named.append(f"{name}{tuple(weight.shape)}")
            sample = torch.empty(0, dtype=torch.bool)
            if weight.is_floating_point() and weight.device.type != "meta":
                flat = weight.reshape(-1)
                sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE] > 0
            signs.append(sample)
    for name, own in zip(named, _fetched_together(signs), strict=True):
        digest.update(name.encode())
        digest.update(bytes(own))
    return digest.hexdigest()[:16]


def _fetched_together(parts: list[Tensor]) -> list[list[bool]]:
    """Return what tensors of one dimension hold, each device asked once: every answer makes the program wait for it."""
    found: list[list[bool]] = [[] for _ in parts]
    for device in {part.device for part in parts}:
        here = [number for number, part in enumerate(parts) if part.device == device]
        together = torch.cat([parts[number] for number in here]).cpu()
        for number, own in zip(here, together.split([len(parts[number]) for number in here]), strict=True):
            found[number] = own.tolist()
    return found
