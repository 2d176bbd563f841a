"""Caches on disk: safetensors with all that is needed to go on, in another process or with a later version."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import suffice
from suffice.kv.budget.allocation import Allocation
from suffice.kv.budget.head_profile import HeadProfile
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.hf.fingerprint import fingerprint
from suffice.kv.hf.offload import execution_device
from suffice.kv.hf.tensor_parallel import Sharding
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.query_moments import Moments
from suffice.kv.policy.registry import allocations, policies
from suffice.kv.storage.ragged import RaggedStorage
from suffice.kv.storage.uniform import UniformStorage

_FORMAT = 1
_COUNTS = ("seen", "appended", "held", "evicted")


def save_cache(cache: CompressedCache, model: PreTrainedModel, path: str | Path) -> Path:
    """Write a cache as one safetensors file, atomically; of a tensor-parallel model, one for each process.

    Args:
        cache: what to write; it stays as it is.
        model: the model that it is of.
        path: where to. Processes of a tensor-parallel model, all of which must save, add their number to it.

    Returns:
        The file.

    Raises:
        ValueError: the cache is of another model, or has seen nothing.

    """
    own = [layer._module() for layer in cache.compressed_layers]  # pyright: ignore[reportPrivateUsage]
    if not set(map(id, own)) <= set(map(id, model.modules())):
        raise ValueError(
            "model is not the one that the cache is of; accepted: the model that CompressedCache was given"
        )
    if not cache.get_seq_length():
        raise ValueError("the cache has seen nothing; accepted: one that holds something")
    if cache.settings.quantization is not None:
        raise ValueError("a cache with quantized entries is not saved; accepted: one with quantized=None")
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    for number, layer in enumerate(cache.layers):
        found, facts = _retained(layer) if isinstance(layer, CompressedLayer) else _stock(layer)
        tensors |= {f"{number}.{name}": value.contiguous() for name, value in found.items()}
        layers.append(facts)
    settings = cache.settings
    facts = {
        "format": _FORMAT,
        "suffice": suffice.__version__,
        "transformers": transformers.__version__,
        "model": fingerprint(model),
        "dtype": str(cache.compressed_layers[0].dtype),
        "process": _process(model),
        "policy": _policy_name(settings.policy),
        "allocation": _allocation_name(settings.policy.allocation),
        "described": settings.policy.describe(),
        "budget": cache.budget,
        "sinks": settings.protection.sinks,
        "window": settings.protection.window,
        "evict": "always" if settings.always else "prefill",
        "interval": settings.interval,
        "positions": "compact" if settings.compact else "original",
        "measure_capacity": settings.measure_capacity,
        "layers": layers,
    }
    target = _place(path, model)
    half = target.with_name(f"{target.name}.{os.getpid()}.part")
    save_file(tensors, half, {"suffice": json.dumps(facts)})
    os.replace(half, target)
    return target


def load_cache(path: str | Path, model: PreTrainedModel, policy: Policy | None = None) -> CompressedCache:
    """Read a cache that `save_cache` wrote.

    Args:
        path: the file.
        model: the model that it was made with.
        policy: the cache's policy, if it is not one of the named ones: policies are code and not stored.

    Raises:
        OSError: there is no such file.
        ValueError: the file is no saved cache, of a newer version, of another model or dtype; or the policy is
            missing or another.

    """
    place = _place(path, model)
    if not place.is_file():
        raise FileNotFoundError(f"path is {str(place)!r}; accepted: a file that `save` wrote")
    try:
        with safe_open(place, "pt") as file:
            facts = json.loads((file.metadata() or {})["suffice"])
        tensors = load_file(place)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{place} is no saved CompressedCache ({error})") from None
    if facts["format"] > _FORMAT:
        raise ValueError(
            f"{place} has format {facts['format']}, written by suffice {facts['suffice']}; this version reads up to "
            f"{_FORMAT}. Update suffice"
        )
    if facts["model"] != (own := fingerprint(model)):
        raise ValueError(
            f"{place} holds a cache of model {facts['model']}, this model is {own}; accepted: the model that it was "
            "made with"
        )
    if facts.get("process") != (process := _process(model)):
        raise ValueError(
            f"{place} holds a cache of {_words(facts.get('process'))}, this is {_words(process)}; accepted: the same "
            "tensor parallelism"
        )
    if facts["dtype"] != str(model.dtype):
        raise ValueError(
            f"{place} holds a cache in {facts['dtype']}, this model is in {model.dtype}; accepted: the same dtype"
        )
    cache = CompressedCache(
        model,
        _policy(facts, policy, place),
        facts["budget"],
        sinks=facts["sinks"],
        window=facts["window"],
        evict=facts["evict"],
        interval=facts["interval"],
        positions=facts["positions"],
        measure_capacity=facts["measure_capacity"],
    )
    for number, (layer, own) in enumerate(zip(cache.layers, facts["layers"], strict=True)):
        prefix = f"{number}."
        found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if isinstance(layer, CompressedLayer):
            _restore(layer, found, own)
        else:
            _restore_stock(layer, found, own, model.device)
    return cache


def _process(model: PreTrainedModel) -> list[int] | None:
    """Return which of how many processes holds its part of the heads here; None for one that holds all."""
    sharding = Sharding.from_model(model)
    return None if sharding is None else [sharding.rank, sharding.world_size]


def _words(process: list[int] | None) -> str:
    return "one process" if process is None else f"process {process[0] + 1} of {process[1]}"


def _place(path: str | Path, model: PreTrainedModel) -> Path:
    place, process = Path(path), _process(model)
    if process is None:
        return place
    return place.with_name(f"{place.stem}-{process[0] + 1}-of-{process[1]}{place.suffix}")


def _retained(layer: CompressedLayer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    storage = layer.storage
    assert storage is not None
    tensors = {"padding": torch.tensor(layer.padding), **{f"columns.{name}": x for name, x in storage.columns.items()}}
    if isinstance(storage, RaggedStorage):
        kind = "ragged"
        tensors |= {
            "keys": storage.packed_keys,
            "values": storage.packed_values,
            "positions": storage.packed_positions,
            "lengths": torch.tensor(storage.lengths),
            "tail_keys": storage.tail_keys,
            "tail_values": storage.tail_values,
            "tail_positions": storage.tail_positions,
        }
        places = storage.packed_places
    else:
        kind = "uniform"
        tensors |= {"keys": storage.keys, "values": storage.values, "positions": storage.positions}
        places = storage.places
    if places is not None:
        tensors["places"] = places
    if layer.capacity is not None:
        tensors["capacity"] = layer.capacity
    if layer.queries:
        tensors["queries"] = torch.cat(layer.queries, dim=2)
    for half_life, moments in layer.moments.items():
        tensors |= {f"moments.{half_life}.{name}": getattr(moments, name) for name in moments.__dataclass_fields__}
    return tensors, {"kind": kind, **{name: getattr(layer, name) for name in _COUNTS}}


def _restore(layer: CompressedLayer, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    module = layer._module()  # pyright: ignore[reportPrivateUsage]
    assert module is not None
    device = execution_device(module)
    tensors = {name: value.to(device) for name, value in tensors.items()}
    columns = {name.removeprefix("columns."): x for name, x in tensors.items() if name.startswith("columns.")}
    keys, values, positions = tensors["keys"], tensors["values"], tensors["positions"]
    if facts["kind"] == "ragged":
        tail = (tensors["tail_keys"], tensors["tail_values"], tensors["tail_positions"])
        lengths = tensors["lengths"].tolist()
        layer.storage = RaggedStorage(keys, values, positions, lengths, tail, tensors.get("places"), columns)
        if layer.pool is not None:
            layer.pool.settle(layer.layer, layer.storage)
    else:
        layer.storage = UniformStorage(keys, values, positions, tensors.get("places"), columns)
    for name in _COUNTS:
        setattr(layer, name, facts[name])
    layer.padding, layer.capacity = tensors["padding"].tolist(), tensors.get("capacity")
    layer.queries = (tensors["queries"],) if "queries" in tensors else ()
    known = {name.split(".", 1)[1].rsplit(".", 1)[0] for name in tensors if name.startswith("moments.")}
    layer.moments = {
        float(half_life): Moments(*(tensors[f"moments.{half_life}.{name}"] for name in Moments.__dataclass_fields__))
        for half_life in known
    }
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.is_initialized = True


def _stock(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    facts = {"kind": type(layer).__name__, "cumulative_length": getattr(layer, "cumulative_length", None)}
    return {"keys": layer.keys, "values": layer.values}, facts


def _restore_stock(layer: Any, tensors: dict[str, Tensor], facts: dict[str, Any], device: torch.device) -> None:
    keys, values = tensors["keys"].to(device), tensors["values"].to(device)
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if facts["cumulative_length"] is not None:
        layer.cumulative_length = facts["cumulative_length"]


def _unbound(allocation: Allocation) -> Allocation:
    return replace(allocation, profile=None) if isinstance(allocation, HeadProfile) else allocation


def _allocation_name(allocation: Allocation) -> str | None:
    return next((name for name, known in allocations().items() if known == _unbound(allocation)), None)


def _policy_name(policy: Policy) -> str | None:
    known = policies().get(policy.name)
    same = known is not None and replace(policy, allocation=known.allocation) == known
    return policy.name if same and _allocation_name(policy.allocation) is not None else None


def _policy(facts: dict[str, Any], given: Policy | None, place: Path) -> Policy:
    """Return the policy of a saved cache."""
    if facts["policy"] is not None:
        named = policies()[facts["policy"]]
        stored = replace(named, allocation=allocations()[facts["allocation"]])
        if given is not None and given != stored and given != named:
            raise ValueError(f"policy is {given.name!r}, but {place} was made with {facts['policy']!r}; accepted: None")
        return stored
    if given is None or given.describe() != facts["described"]:
        parts = ", ".join(f"{name} {part}" for name, part in facts["described"].items())
        raise ValueError(
            f"policy is {given if given is None else given.name!r}, but {place} was made with a policy of its own "
            f"({parts}), which a file can't hold; accepted: that Policy"
        )
    return given
