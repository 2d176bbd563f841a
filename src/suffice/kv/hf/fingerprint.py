"""Identify a model by its configuration and weights."""

from __future__ import annotations

import hashlib
import json
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from suffice.kv.hf.offload import materialized_weight
from suffice.kv.hf.tensor_parallel import Sharding, gather_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Entries of the configuration that depend on how the model was loaded.
_LOADING_OPTIONS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "quantization_config")
_SAMPLE_SIZE = 64

# Results for sharded or offloaded models, where gathering the weights is expensive.
_fingerprints: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def fingerprint(model: PreTrainedModel) -> str:
    """Return 16 hexadecimal digits that identify a model's configuration and weights, for any dtype and device.

    The digest covers the configuration, the names and shapes of the decoder's weights, and the signs of 64 elements
    of each weight. If the model is tensor-parallel, the weights are gathered one at a time, once per model, and all
    processes must call this function. Offloaded weights are also read once per model.
    """
    sharded = Sharding.from_model(model) is not None
    if not sharded and all(weight.device.type != "meta" for weight in model.get_decoder().parameters()):
        return _digest(model, sharded)
    if model not in _fingerprints:
        _fingerprints[model] = _digest(model, sharded)
    return _fingerprints[model]


def _digest(model: PreTrainedModel, sharded: bool) -> str:
    config: Any = model.config
    options = {
        name: value for name, value in config.to_dict().items() if name not in _LOADING_OPTIONS and name[0] != "_"
    }
    digest = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    decoder = model.get_decoder()
    prefix = next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")
    shapes: list[str] = []
    signs: list[Tensor] = []
    with torch.no_grad():
        for name, weight in sorted(decoder.state_dict().items()):
            if sharded:
                weight = gather_weight(model, prefix + name, weight)
            elif weight.device.type == "meta":
                owner, _, own_name = name.rpartition(".")
                loaded = materialized_weight(decoder.get_submodule(owner), own_name)
                weight = weight if loaded is None else loaded
            shapes.append(f"{name}{tuple(weight.shape)}")
            sample = torch.empty(0, dtype=torch.bool)
            if weight.is_floating_point() and weight.device.type != "meta":
                flat = weight.reshape(-1)
                sample = flat[:: max(1, flat.numel() // _SAMPLE_SIZE)][:_SAMPLE_SIZE] > 0
            signs.append(sample)
    for shape, sample in zip(shapes, _to_lists(signs), strict=True):
        digest.update(shape.encode())
        digest.update(bytes(sample))
    return digest.hexdigest()[:16]


def _to_lists(samples: list[Tensor]) -> list[list[bool]]:
    """Return the values of one-dimensional tensors, with one synchronization per device."""
    values: list[list[bool]] = [[] for _ in samples]
    for device in {sample.device for sample in samples}:
        indices = [index for index, sample in enumerate(samples) if sample.device == device]
        joined = torch.cat([samples[index] for index in indices]).cpu()
        for index, part in zip(indices, joined.split([len(samples[index]) for index in indices]), strict=True):
            values[index] = part.tolist()
    return values
