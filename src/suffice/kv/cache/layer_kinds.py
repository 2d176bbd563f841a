"""The kinds of compressed layers: which one takes the place of a layer of the model, and what it does not support."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from suffice.kv.cache.global_budget import GlobalBudget
from suffice.kv.cache.latent_layer import LatentLayer
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.cache.positions import find_rotary_embeddings
from suffice.kv.cache.settings import CacheSettings
from suffice.kv.cache.sliding_layer import SlidingLayer
from suffice.kv.cache.source_layer import SourceLayer
from suffice.kv.hf.layers import (
    HYBRID_LAYER,
    caches_latents,
    compressed_layers,
    sliding_window,
    source_layers,
    stock_layers,
)
from suffice.kv.hf.rotary import RotaryEmbedding
from suffice.kv.hf.tensor_parallel import Sharding
from suffice.kv.policy.policy import Policy


def make_layers(model: PreTrainedModel, settings: CacheSettings) -> list[Any]:
    """Return the layers of a compressed cache: those of the model's own cache, or compressed layers in their place.

    Args:
        model: the model.
        settings: settings of the cache.

    """
    layers, modules, sources = stock_layers(model), compressed_layers(model), source_layers(model)
    indices = list(modules)
    rotaries = find_rotary_embeddings(
        model, indices, settings.policy, rerotate=settings.rerotate, repair=settings.repair
    )
    used = [rotary for rotary in rotaries.values() if isinstance(rotary, RotaryEmbedding)]
    window = sliding_window(layers[indices[0]], model)
    global_budget = GlobalBudget(len(modules)) if settings.policy.allocation.is_global else None
    for order, index in enumerate(indices):
        layers[index] = _make_layer(
            layers[index],
            has_readers=index in sources,
            window=window,
            settings=settings,
            module=modules[index],
            rotary=rotaries[index],
            index=index,
            order=order,
            global_budget=global_budget,
            rotaries_to_clear=used if index == indices[-1] else (),
        )
    return layers


def _make_layer(stock: Any, *, has_readers: bool, window: int | None, **arguments: Any) -> CompressedLayer:
    """Return the compressed layer that takes the place of a layer of the model's own cache.

    Args:
        stock: the layer of the model's own cache.
        has_readers: whether later layers read its keys and values.
        window: length of its sliding window in tokens; None if it has full attention.
        arguments: see `CompressedLayer`.

    """
    if has_readers:
        return SourceLayer(**arguments)
    if window is not None:
        return SlidingLayer(window, **arguments)
    if caches_latents(arguments["module"]):
        return LatentLayer(**arguments)
    if type(stock) is not HYBRID_LAYER:
        return CompressedLayer(**arguments)
    # Early versions of transformers do not have the base class of this layer.
    from suffice.kv.cache.hybrid_layer import HybridCompressedLayer

    return HybridCompressedLayer(stock.number_of_states, **arguments)


def check_latents(model: PreTrainedModel, policy: Policy, *, repair: bool) -> None:
    """Raise an error if a cache of latents, which all heads share, does not support a setting.

    Raises:
        ValueError: the setting is not supported.

    """
    name = type(model).__name__
    if policy.allocation.is_global:
        raise ValueError(
            f"allocation must give each layer a budget of its own for {name}, which caches latents that all heads "
            f"share, got {policy.allocation}. Use 'profile' or 'equal'"
        )
    if repair:
        raise ValueError(f"repair must be False for {name}, whose heads share cached latents, got True")
    if Sharding.from_model(model) is not None:
        raise ValueError(f"{name} must not be tensor-parallel, because its heads share cached latents, got one that is")


def check_repair(policy: Policy, *, rerotate: bool) -> None:
    """Raise an error if the kept entries cannot be repaired with some settings.

    Raises:
        ValueError: the policy keeps all entries, or it drops entries of a layer after the eviction in that layer; or
            the keys are rotated.

    """
    if policy.keep_all:
        raise ValueError(f"repair must be False with policy {policy.name!r}, which keeps all entries, got True")
    if policy.allocation.is_global and not policy.replay_kinds:
        raise ValueError(
            f"repair must be False with allocation {policy.allocation}, which drops entries of a layer after it was "
            "repaired, got True. Use allocation 'profile', or a policy with a replay"
        )
    if rerotate:
        raise ValueError("repair must be False with rerotate=True, which changes the keys after the repair, got True")


def check_sliding(model: PreTrainedModel, policy: Policy, *, rerotate: bool, repair: bool) -> None:
    """Raise an error if a setting is not supported for layers with a sliding window.

    Raises:
        ValueError: the setting is not supported.

    """
    where = f"for {type(model).__name__}, all of whose layers have a sliding window"
    if policy.allocation.is_global:
        raise ValueError(
            f"allocation must give each layer a budget of its own {where}, got {policy.allocation}. Use 'profile' or "
            "'equal'"
        )
    if repair:
        raise ValueError(f"repair must be False {where}, got True: the entries that it replaces leave the window")
    if rerotate:
        raise ValueError(f"rerotate must be False {where}, got True: the window refers to the original positions")
