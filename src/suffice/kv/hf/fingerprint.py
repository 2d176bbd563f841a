"""Identify a model by its configuration and weights."""

from __future__ import annotations

import hashlib
import json
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from suffice.kv.hf.layers import find_decoder
from suffice.kv.hf.offload import materialized_weight
from suffice.kv.hf.tensor_parallel import Sharding, gather_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Entries of the configuration that depend on how the model was loaded.
_LOADING_OPTIONS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "quantization_config")
_SAMPLE_SIZE = 64
# A bfloat16 has 7 bits of mantissa. If the last 6 are dropped, the remaining bits of a positive number are the index of
# a range: from a power of two to 1.5 times this power, or from there to the next power of two.
_DROPPED_BITS = 6

# Results for sharded or offloaded models, where gathering the weights is expensive.
_fingerprints: weakref.WeakKeyDictionary[nn.Module, dict[bool, str]] = weakref.WeakKeyDictionary()


def fingerprint(model: PreTrainedModel, *, exact: bool = False) -> str:
    """Return 16 hexadecimal digits that identify a model's configuration and weights.

    The digest covers the configuration, the names and shapes of the decoder's weights, and a sample of 64 elements of
    each weight. If the model is tensor-parallel, the weights are gathered one at a time, once per model and value of
    `exact`, and all processes must call this function. Offloaded weights are also read only once.

    Args:
        model: the model.
        exact: cover the values of the sampled elements. Every change of a value, including a change of the dtype, then
            changes the result. By default, the digest covers the signs of the elements and, for each weight, the
            magnitude of the largest one up to a factor of 1.5. Loading the model in another dtype then does not change
            the result, except in rare cases where float16 rounds a float32 weight onto the boundary between two
            magnitudes.

    """
    sharded = Sharding.from_model(model) is not None
    if not sharded and all(weight.device.type != "meta" for weight in find_decoder(model).parameters()):
        return _digest(model, sharded, exact)
    known = _fingerprints.setdefault(model, {})
    if exact not in known:
        known[exact] = _digest(model, sharded, exact)
    return known[exact]


def _digest(model: PreTrainedModel, sharded: bool, exact: bool) -> str:
    config: Any = model.config
    options = {
        name: value for name, value in config.to_dict().items() if name not in _LOADING_OPTIONS and name[0] != "_"
    }
    digest = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    decoder = find_decoder(model)
    if adapters := _adapters(decoder):
        digest.update(json.dumps(adapters, sort_keys=True, default=str).encode())
    prefix = next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")
    shapes: list[str] = []
    samples: list[Tensor] = []
    with torch.no_grad():
        for name, weight in sorted(decoder.state_dict().items()):
            if sharded:
                weight = gather_weight(model, prefix + name, weight)
            elif weight.device.type == "meta":
                owner, _, own_name = name.rpartition(".")
                loaded = materialized_weight(decoder.get_submodule(owner), own_name)
                weight = weight if loaded is None else loaded
            shapes.append(f"{name}{tuple(weight.shape)}")
            samples.append(_sample(weight, exact))
    for shape, sample in zip(shapes, _to_bytes(samples), strict=True):
        digest.update(shape.encode())
        digest.update(sample)
    return digest.hexdigest()[:16]


def _adapters(decoder: nn.Module) -> list[Any]:
    """Return which PEFT adapters are active in each module, and their scales, which the weights do not show."""
    found: list[Any] = []
    for name, module in decoder.named_modules():
        active = getattr(module, "active_adapters", None)
        if isinstance(active, (list, tuple)):
            found.append([name, active, getattr(module, "disable_adapters", None), getattr(module, "scaling", None)])
    return found


def _sample(weight: Tensor, exact: bool) -> Tensor:
    """Return the data of a weight that a fingerprint covers, int32 [any]; empty if the weight is on the meta device."""
    if weight.device.type == "meta" or not weight.numel():
        return torch.empty(0, dtype=torch.int32)
    if weight.is_complex():
        weight = torch.view_as_real(weight)
    flat = weight.reshape(-1)
    # With an odd step, the elements are from different columns of a matrix.
    sample = flat[:: max(1, (flat.numel() // _SAMPLE_SIZE - 1) | 1)][:_SAMPLE_SIZE]
    if not weight.is_floating_point():
        return sample.to(torch.int32)  # packed quantized weights, which do not depend on the dtype of the model
    sample = sample.float()
    if exact:
        return sample.view(torch.int32)
    # Rounded to bfloat16, the largest element is the same in float32 and in bfloat16.
    magnitude = sample.abs().amax().bfloat16().view(torch.int16) >> _DROPPED_BITS
    return torch.cat(((sample > 0).int(), magnitude.int()[None]))


def _to_bytes(samples: list[Tensor]) -> list[bytes]:
    """Return the values of one-dimensional int32 tensors, with one synchronization per device."""
    values = [b""] * len(samples)
    for device in {sample.device for sample in samples}:
        indices = [index for index, sample in enumerate(samples) if sample.device == device]
        joined = torch.cat([samples[index] for index in indices]).cpu()
        for index, part in zip(indices, joined.split([len(samples[index]) for index in indices]), strict=True):
            values[index] = part.numpy().astype("<i4").tobytes()
    return values
