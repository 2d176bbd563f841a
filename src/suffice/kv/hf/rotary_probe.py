"""Find out how a model rotates the keys of each layer, by running it on single tokens at different positions.

A sequence of one token attends only to itself. Unless positions are added to the hidden states, these depend on the
token but not on its position, and the keys of one token at several positions are rotations of each other. Candidates
for the rotation of a layer are made from the frequencies that the model holds and the usual ways to pair dimensions.
The candidate that reproduces the measured keys is used.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from suffice.kv.attention.call import AttentionCall, run_attention
from suffice.kv.attention.hook import AttentionHook, attach_observer
from suffice.kv.hf.layers import attention_modules, find_decoder
from suffice.kv.hf.model_info import context_window
from suffice.kv.hf.offload import execution_device, materialized_weight
from suffice.kv.hf.rotary import Frequencies, RotaryEmbedding

_POSITIONS = (0, 1, 2, 5, 17, 64, 250)
_NUM_TOKENS = 3
# Largest relative error of a dimension of the keys. In half precision, models round cosines, sines and keys.
_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# Smallest scale of a dimension, relative to the scale of all dimensions, for which errors are relative. Smaller
# dimensions may have larger relative errors.
_SMALLEST_SCALE = 1e-3


@dataclass(frozen=True)
class PositionEncoding:
    """How the positions of tokens enter the keys of a model.

    Args:
        is_rotary: whether the model rotates keys in at least one layer.
        rotary: for each layer, its rotary embedding; None if its keys do not depend on the positions; a str with the
            reason if the rotary embedding is not known. Empty if the model is not rotary.
        error: why the measurement failed; None if it succeeded.

    """

    is_rotary: bool
    rotary: Mapping[int, RotaryEmbedding | str | None]
    error: str | None = None


# Results by decoder, because a measurement takes about as long as generating a token.
_encodings: weakref.WeakKeyDictionary[nn.Module, PositionEncoding] = weakref.WeakKeyDictionary()


def probe_positions(model: PreTrainedModel) -> PositionEncoding:
    """Return how the positions of tokens enter the keys of a model. The result is cached for each model.

    If the model is tensor-parallel, all processes must call this function.
    """
    decoder = find_decoder(model)
    found = _encodings.get(decoder)
    if found is None:
        found = _measure(model, decoder)
        if found.error is None:
            _encodings[decoder] = found
    return found


@dataclass
class _Recording:
    """Keys, values and queries of one layer, [tokens × positions, heads, 1, head_dim] each.

    The queries are None if the attention call was not recorded.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor | None = None

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Record the queries of an attention call and compute it."""
        self.queries = call.query
        return run_attention(call)


class _RecordingCache(DynamicCache):
    """The model's own cache, except that keys and values are recorded and not stored."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(config=model.config)
        self.recordings: dict[int, _Recording] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Record keys and values, and have the attention call that follows record its queries."""
        recording = self.recordings[layer_idx] = _Recording(key_states, value_states)
        return attach_observer(key_states, recording), value_states


def _measure(model: PreTrainedModel, decoder: Any) -> PositionEncoding:
    frequencies = _find_frequencies(decoder)
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        error = "its decoder has rotary frequencies, but does not accept `position_ids`" if frequencies else None
        return PositionEncoding(is_rotary=False, rotary={}, error=error)
    window = context_window(model)
    positions = [position for position in _POSITIONS if window is None or position < window]
    hook = AttentionHook(decoder)
    try:
        recordings = _record(model, decoder, positions)
    except Exception as error:  # the code of a model may raise any exception
        reason = f"its decoder failed on single tokens ({type(error).__name__}: {error})"
        return PositionEncoding(is_rotary=False, rotary={}, error=reason)
    finally:
        del hook  # restores the attention function of the model
    modules = attention_modules(decoder)
    # Made once, so that layers of one kind share the cached cosines and sines.
    candidates = [*_candidates(frequencies, {recording.keys.shape[-1] for recording in recordings.values()})]
    rotary = {
        index: _fit_layer(recording, torch.tensor(positions), candidates, modules.get(index))
        for index, recording in recordings.items()
    }
    for candidate in candidates:
        candidate.clear_cache()
    if any(isinstance(found, RotaryEmbedding) for found in rotary.values()):
        return PositionEncoding(is_rotary=True, rotary=rotary)
    if not frequencies:
        # Positions are added to the hidden states (GPT-2) or to the attention weights, or do not matter.
        return PositionEncoding(is_rotary=False, rotary={})
    reason = next(filter(None, rotary.values()), "keys do not depend on `position_ids`")
    return PositionEncoding(is_rotary=False, rotary={}, error=f"it has rotary frequencies, but {reason}")


def _record(model: PreTrainedModel, decoder: Any, positions: list[int]) -> dict[int, _Recording]:
    """Run the decoder on several tokens, each as a sequence of its own at each of the positions."""
    device = execution_device(decoder)
    vocabulary = decoder.get_input_embeddings().num_embeddings
    tokens = [vocabulary * (number + 1) // (_NUM_TOKENS + 1) for number in range(_NUM_TOKENS)]
    cache = _RecordingCache(model)
    training = decoder.training
    decoder.eval()
    try:
        with torch.no_grad():
            decoder(
                input_ids=torch.tensor(tokens, device=device).repeat_interleave(len(positions))[:, None],
                position_ids=torch.tensor(positions, device=device).repeat(_NUM_TOKENS)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
    finally:
        decoder.train(training)
    return cache.recordings


def _find_frequencies(decoder: nn.Module) -> list[Frequencies]:
    """Return the different frequencies that the modules of a decoder hold."""
    found: list[Frequencies] = []
    seen: list[Tensor] = []
    for module in decoder.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or "original" in name or buffer.dim() != 1 or buffer.device.type == "meta":
                continue
            frequencies, values = Frequencies(module, name), buffer.detach().cpu()
            if frequencies.depends_on_length or not any(torch.equal(values, other) for other in seen):
                found.append(frequencies)
                seen.append(values)
    return found


def _candidates(frequencies: Sequence[Frequencies], head_dims: Iterable[int]) -> Iterator[RotaryEmbedding]:
    """Yield the ways in which dimensions of heads can be paired and rotated."""
    for each in frequencies:
        rotary_dim = 2 * len(each)
        # The first or the last dimensions of a head.
        for start in sorted({0, *(head_dim - rotary_dim for head_dim in head_dims if head_dim > rotary_dim)}):
            middle, stop = start + len(each), start + rotary_dim
            for first, second in (
                (slice(start, middle), slice(middle, stop)),  # Llama
                (slice(start, stop, 2), slice(start + 1, stop, 2)),  # neighbours: GLM
            ):
                yield RotaryEmbedding(each, first, second)
                yield RotaryEmbedding(each, second, first)  # by negative angles


def _fit_layer(
    recording: _Recording, positions: Tensor, candidates: Sequence[RotaryEmbedding], module: nn.Module | None
) -> RotaryEmbedding | str | None:
    """Return the rotary embedding of a layer; None if its keys do not depend on positions; the reason if not known."""
    tolerance = _TOLERANCES.get(recording.keys.dtype, max(_TOLERANCES.values()))
    keys, values = _by_position(recording.keys), _by_position(recording.values)
    if keys is None or values is None:
        return "the model caches tensors that are not [batch, heads, tokens, dimensions]"
    if not _error(values[:1], values) <= tolerance:
        return "the tensors that the model caches as values depend on the positions"
    if _error(keys[:1], keys) <= tolerance:
        return None
    best = _best_fit(keys, positions, candidates, tolerance)
    if best is None:
        scaled = [each.with_factors(scale) for scale in _norm_scales(module, keys.shape[-1]) for each in candidates]
        best = _best_fit(keys, positions, scaled, tolerance)
    if best is None:
        return "keys depend on the positions, but not by a known rotary embedding"
    return best if _rotates_queries(best, recording.queries, positions, tolerance) else best.without_queries()


def _rotates_queries(rotary: RotaryEmbedding, queries: Tensor | None, positions: Tensor, tolerance: float) -> bool:
    x = None if queries is None else _by_position(queries)
    if x is None or x.shape[-1] < rotary.stop:
        return False
    return _error(rotary.rotate(x[:1].expand_as(x), positions[:, None, None]), x) <= tolerance


def _best_fit(
    keys: Tensor, positions: Tensor, candidates: Sequence[RotaryEmbedding], tolerance: float
) -> RotaryEmbedding | None:
    """Return the candidate that rotates the keys of the first position to all others best, if its error is tolerable.

    Args:
        keys: [positions, heads, 1, head_dim], float32.
        positions: long [positions]; the first is 0.
        candidates: rotary embeddings, also for other head dimensions.
        tolerance: largest error.

    """
    start = keys[:1].expand_as(keys)
    usable = [candidate for candidate in candidates if candidate.stop <= keys.shape[-1]]
    errors = [_error(candidate.rotate_keys(start, positions[:, None, None]), keys) for candidate in usable]
    if not errors or not min(errors) <= tolerance:
        return None
    return usable[errors.index(min(errors))]


def _norm_scales(module: nn.Module | None, head_dim: int) -> Iterator[Tensor]:
    """Yield the scales of the norms of an attention module, which may follow the rotary embedding."""
    for norm in () if module is None else module.children():
        weight = materialized_weight(norm, "weight")
        if weight is not None and weight.shape == (head_dim,):
            # The norm maps ones to its scale, also if the model stores the scale minus 1.
            ones = torch.ones(1, head_dim, dtype=weight.dtype, device=execution_device(norm))
            with torch.no_grad():
                yield norm(ones)[0].float().cpu()


def _by_position(x: Tensor) -> Tensor | None:
    """Return x [tokens × positions, heads, 1, dim] as float32 [positions, tokens × heads, 1, dim] on the CPU."""
    if x.dim() != 4 or x.shape[2] != 1:
        return None
    return x.detach().float().cpu().unflatten(0, (_NUM_TOKENS, -1)).transpose(0, 1).flatten(1, 2)


def _error(expected: Tensor, measured: Tensor) -> float:
    """Return the largest relative error of a dimension, over all positions and heads.

    Errors are relative to the scale of each dimension, because the keys of trained models have a few dimensions that
    are much larger than all others and often rotate very slowly.

    Args:
        expected: [1 or positions, heads, 1, dim].
        measured: [positions, heads, 1, dim].

    """
    scale = measured.square().flatten(0, -2).mean(0)
    error = (expected - measured).square().flatten(0, -2).mean(0)
    return float((error / scale.clamp_min(_SMALLEST_SCALE**2 * scale.mean())).amax().sqrt())
