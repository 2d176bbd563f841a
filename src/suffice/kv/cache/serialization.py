"""Save a cache to a safetensors file, from which another process can continue."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

import suffice
from suffice.kv.budget.allocation import Allocation
from suffice.kv.budget.head_profile import HeadProfile
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.cache.linear_states import has_linear_states, restore_states, save_states
from suffice.kv.cache.recent_queries import RecentQueries
from suffice.kv.cache.settings import STORAGES, CacheSettings
from suffice.kv.cache.state import LayerState, RowState
from suffice.kv.hf.fingerprint import fingerprint
from suffice.kv.hf.offload import execution_device
from suffice.kv.hf.tensor_parallel import Sharding
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.registry import allocations, policies
from suffice.kv.policy.weight_state import QueryMoments, WeightState

_FORMAT = 3
_METADATA_KEY = "suffice"
_STORAGE_PREFIX = "storage."
_MOMENTS_PREFIX = "moments."
_TEXT, _INPUT_IDS = "text.utf8", "text.input_ids"


@dataclass(frozen=True)
class SavedCache:
    """Contents of the file of a saved cache.

    Args:
        policy: policy of the cache.
        budget: budget of the cache; None if its memory is limited.
        options: further arguments of `CompressedCache`, by name.
        tensors: tensors of all layers. Their names start with the index of the layer.
        layers: for each layer, the part of its state that is not a tensor.

    """

    policy: Policy
    budget: float | None
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    layers: list[dict[str, Any]]

    def restore(self, layers: Sequence[Any], device: torch.device) -> None:
        """Fill the empty layers of a cache that was made with these arguments, on the device of the model."""
        for number, (layer, state) in enumerate(zip(layers, self.layers, strict=True)):
            tensors = _with_prefix(self.tensors, f"{number}.")
            if isinstance(layer, CompressedLayer):
                _restore_compressed(layer, tensors, state)
            elif isinstance(layer, DynamicLayer):
                _restore_other(layer, tensors, state, device)
            if has_linear_states(layer):
                restore_states(layer, tensors, state["linear_states"], device)


@dataclass(frozen=True)
class SavedText:
    """The text of a cache, which a file can hold beside its entries.

    Args:
        text: the text.
        input_ids: the tokens that the cache has seen, long [1, tokens].
        tokenizer: fingerprint of the tokenizer.

    """

    text: str
    input_ids: Tensor
    tokenizer: str


def save_cache(
    layers: Sequence[Any],
    settings: CacheSettings,
    model: PreTrainedModel,
    path: str | Path,
    text: SavedText | None = None,
) -> Path:
    """Write the layers of a cache, and its text if it is given, to a safetensors file; see `CompressedCache.save`."""
    compressed = [layer for layer in layers if isinstance(layer, CompressedLayer)]
    modules = [layer.module for layer in compressed]
    if not set(map(id, modules)) <= set(map(id, model.modules())):
        raise ValueError("model must be the one that the CompressedCache was made for, got another model")
    if not compressed[0].state.num_seen:
        raise ValueError("the cache must hold tokens to be saved, got an empty cache")
    tensors: dict[str, Tensor] = {}
    layer_states: list[dict[str, Any]] = []
    for number, layer in enumerate(layers):
        layer_tensors, state = _layer_state(layer)
        tensors |= {f"{number}.{name}": value.contiguous() for name, value in layer_tensors.items()}
        layer_states.append(state)
    metadata = {
        "format": _FORMAT,
        "version": suffice.__version__,
        "transformers": transformers.__version__,
        "model": fingerprint(model, exact=True),
        "dtype": str(compressed[0].dtype),
        "process": _process(model),
        "policy": _policy_name(settings.policy),
        "allocation": _allocation_name(settings.policy.allocation),
        "policy_parts": settings.policy.describe(),
        "budget": settings.budget,
        "options": {
            "sinks": settings.protection.sinks,
            "window": settings.protection.window,
            "evict": "always" if settings.evict_always else "prefill",
            "interval": settings.interval if settings.memory is None else settings.memory.interval,
            "rerotate": settings.rerotate,
            "measure_capacity": settings.measure_capacity,
            **_memory_options(settings),
            **({"repair": True} if settings.repair else {}),
        },
        "layers": layer_states,
    }
    if text is not None:
        tensors |= {
            _TEXT: torch.frombuffer(bytearray(text.text.encode("utf-8", "surrogatepass")), dtype=torch.uint8),
            _INPUT_IDS: text.input_ids.to("cpu", torch.int32),
        }
        metadata["text"] = {"tokenizer": text.tokenizer}
    target = _file_of_process(path, model)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, partial, {_METADATA_KEY: json.dumps(metadata)})
        os.replace(partial, target)
    except SafetensorError as error:
        raise OSError(f"path must be a file that can be written, got {str(target)!r}: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return target


def _memory_options(settings: CacheSettings) -> dict[str, Any]:
    """Return the arguments `bits` and, if it was given, `memory` of a cache."""
    memory = settings.memory
    return {"bits": settings.storage.bits} if memory is None else {"bits": memory.bits, "memory": memory.limit}


def read_cache(path: str | Path, model: PreTrainedModel, policy: Policy | None = None) -> SavedCache:
    """Read a file that `save_cache` has written, and check that it fits the model; see `CompressedCache.load`."""
    file = _file_of_process(path, model)
    metadata, tensors = _read(_existing(file))
    _check_model(metadata, model, file)
    policy = _restore_policy(metadata, policy, file)
    return SavedCache(policy, metadata["budget"], metadata["options"], tensors, metadata["layers"])


def read_text(path: str | Path, model: PreTrainedModel) -> SavedText:
    """Read the text of a file that `save_cache` has written with a text.

    Raises:
        OSError: the file does not exist.
        ValueError: the file is not a saved cache, or has no text.

    """
    file = _file_of_process(path, model)
    metadata, tensors = _read(_existing(file), only=(_TEXT, _INPUT_IDS))
    if "text" not in metadata:
        raise ValueError(
            f"path must be a file that Document.save has written, got {str(file)!r}, a CompressedCache without its "
            "text. Read it with CompressedCache.load"
        )
    text = tensors[_TEXT].numpy().tobytes().decode("utf-8", "surrogatepass")
    return SavedText(text, tensors[_INPUT_IDS].long(), **metadata["text"])


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"path must be a file that `save` has written, got {str(file)!r}, which does not exist")
    return file


def _read(file: Path, only: Sequence[str] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the metadata and the tensors of a file; with `only`, those tensors of these names that it has."""
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            if _METADATA_KEY not in header:
                raise ValueError("it has no metadata of suffice, or was written by an early version")
            metadata = json.loads(header[_METADATA_KEY])
            names: list[str] = opened.keys()
            tensors = {name: opened.get_tensor(name) for name in names if only is None or name in only}
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"path must be a saved CompressedCache, got {str(file)!r} ({error}). Read the prompt again and save the "
            "new cache"
        ) from None
    if metadata["format"] != _FORMAT:
        remedy = "Update suffice" if metadata["format"] > _FORMAT else "Read the prompt again and save the new cache"
        raise ValueError(
            f"path must be a saved cache of format {_FORMAT}, got {str(file)!r} of format {metadata['format']}, "
            f"written by suffice {metadata['version']}. {remedy}"
        )
    return metadata, tensors


def _check_model(metadata: Mapping[str, Any], model: PreTrainedModel, file: Path) -> None:
    """Raise an error unless a saved cache belongs to a model, with the same sharding and dtype."""
    if metadata["process"] != (process := _process(model)):
        raise ValueError(
            f"model must be split as when the cache in {str(file)!r} was saved "
            f"({_describe_process(metadata['process'])}), got {_describe_process(process)}"
        )
    if metadata["dtype"] != str(model.dtype):
        raise ValueError(
            f"model must have the dtype of the cache in {str(file)!r} ({metadata['dtype']}), got {model.dtype}"
        )
    if metadata["model"] != (own := fingerprint(model, exact=True)):
        raise ValueError(
            f"model must be the one that the cache in {str(file)!r} was made with (fingerprint {metadata['model']}), "
            f"got one with fingerprint {own}"
        )


def _process(model: PreTrainedModel) -> list[int] | None:
    """Return the rank of this process and the number of processes that share the heads; None if they are not split."""
    sharding = Sharding.from_model(model)
    return None if sharding is None else [sharding.rank, sharding.world_size]


def _describe_process(process: list[int] | None) -> str:
    return "one process" if process is None else f"process {process[0] + 1} of {process[1]}"


def _file_of_process(path: str | Path, model: PreTrainedModel) -> Path:
    file, process = Path(path), _process(model)
    if process is None:
        return file
    return file.with_name(f"{file.stem}-{process[0] + 1}-of-{process[1]}{file.suffix}")


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose name has a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _compressed_state(layer: CompressedLayer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = layer.state
    assert state.storage is not None
    tensors = {f"{_STORAGE_PREFIX}{name}": x for name, x in state.storage.state_dict().items()}
    optional = {"capacity": state.capacity, "repair_errors": state.repair_errors}
    tensors |= {name: x for name, x in optional.items() if x is not None}
    if len(state.queries):
        tensors["queries"], tensors["query_positions"] = state.queries.join()
    for half_life, moments in state.weight_state.query_moments.items():
        names = moments.__dataclass_fields__
        tensors |= {f"{_MOMENTS_PREFIX}{half_life}/{name}": getattr(moments, name) for name in names}
    record = {
        "storage": state.storage.kind,
        "num_seen": state.num_seen,
        "num_appended": state.num_appended,
        "has_evicted": state.has_evicted,
        "has_holes": state.has_holes,
        "rows": [astuple(row) for row in state.rows],
    }
    return tensors, record


def _restore_compressed(layer: CompressedLayer, tensors: dict[str, Tensor], record: Mapping[str, Any]) -> None:
    module = layer.module
    assert module is not None
    device = execution_device(module)
    tensors = {name: value.to(device) for name, value in tensors.items()}
    storage = STORAGES[record["storage"]].from_state_dict(_with_prefix(tensors, _STORAGE_PREFIX))
    if layer.global_budget is not None:
        layer.global_budget.register(layer.order, storage)
    moments = _with_prefix(tensors, _MOMENTS_PREFIX)
    names = QueryMoments.__dataclass_fields__
    layer.state = LayerState(
        storage=storage,
        rows=tuple(RowState(*row) for row in record["rows"]),
        num_seen=record["num_seen"],
        num_appended=record["num_appended"],
        has_evicted=record["has_evicted"],
        capacity=tensors.get("capacity"),
        repair_errors=tensors.get("repair_errors"),
        queries=RecentQueries((tensors["queries"],), (tensors["query_positions"],))
        if "queries" in tensors
        else RecentQueries(),
        has_holes=record["has_holes"],
        weight_state=WeightState(
            query_moments={
                float(half_life): QueryMoments(*(moments[f"{half_life}/{name}"] for name in names))
                for half_life in {name.split("/")[0] for name in moments}
            }
        ),
    )
    keys = storage.buffers[0]
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.is_initialized = True


def _layer_state(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a layer by name, and the part of its state that is not a tensor."""
    tensors: dict[str, Tensor] = {}
    state: dict[str, Any] = {}
    if isinstance(layer, CompressedLayer):
        tensors, state = _compressed_state(layer)
    elif isinstance(layer, DynamicLayer):
        tensors, state = _other_state(layer)
    if has_linear_states(layer):
        states, state["linear_states"] = save_states(layer)
        tensors = {**tensors, **states}
    return tensors, state


def _other_state(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = {"storage": type(layer).__name__, "cumulative_length": getattr(layer, "cumulative_length", None)}
    return {"keys": layer.keys, "values": layer.values}, state


def _restore_other(layer: Any, tensors: dict[str, Tensor], state: Mapping[str, Any], device: torch.device) -> None:
    keys, values = tensors["keys"].to(device), tensors["values"].to(device)
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    if state["cumulative_length"] is not None:
        layer.cumulative_length = state["cumulative_length"]


def _without_profile(allocation: Allocation) -> Allocation:
    return replace(allocation, profile=None) if isinstance(allocation, HeadProfile) else allocation


def _allocation_name(allocation: Allocation) -> str | None:
    return next((name for name, known in allocations().items() if known == _without_profile(allocation)), None)


def _policy_name(policy: Policy) -> str | None:
    """Return the name of a named policy, with its own or another named allocation; None for any other policy."""
    known = policies().get(policy.name)
    if known is None or replace(policy, allocation=known.allocation) != known:
        return None
    # The allocation of policies with a replay has no name.
    is_own = _without_profile(policy.allocation) == known.allocation
    return policy.name if is_own or _allocation_name(policy.allocation) is not None else None


def _restore_policy(metadata: Mapping[str, Any], given: Policy | None, file: Path) -> Policy:
    """Return the policy of a saved cache."""
    if metadata["policy"] is not None:
        stored = named = policies()[metadata["policy"]]
        if metadata["allocation"] is not None:
            stored = replace(named, allocation=allocations()[metadata["allocation"]])
        if given is not None and given not in (stored, named):
            raise ValueError(f"policy must be None or {metadata['policy']!r} for {str(file)!r}, got {given.name!r}")
        return stored
    if given is None or given.describe() != metadata["policy_parts"]:
        parts = ", ".join(f"{name} {part}" for name, part in metadata["policy_parts"].items())
        raise ValueError(
            f"policy must be the custom policy that the cache in {str(file)!r} was made with ({parts}), got "
            f"{given if given is None else given.name!r}. A file does not contain custom policies"
        )
    return given
