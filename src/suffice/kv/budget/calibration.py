"""Measure the head profile of a model, once, and keep it."""

from __future__ import annotations

import importlib.resources
import json
import logging
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from suffice.folders import cache_folder
from suffice.kv.attention.hook import Attachment, Call, mark
from suffice.kv.budget.head_profile import Profile
from suffice.kv.hf.fingerprint import fingerprint
from suffice.kv.hf.model_info import context_window, full_attention_layers
from suffice.kv.hf.tensor_parallel import Sharding
from suffice.kv.policy.attention_stats import Signals

_TOKENS = 700
_LEAST, _ROOM = 32, 32  # tokens that tell something, and room for what stands between the two readings
_SHORTEST = 2 * _LEAST + _ROOM
_AGAIN = "\n\nRepeat the text above.\n\n"
_log = logging.getLogger("suffice.kv")


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: str | None = None,
    *,
    tokens: int | None = None,
    seed: int = 0,
) -> Profile:
    """Measure how much of its cache each head of a model reads when it says back what it has read.

    One forward pass over a text followed by the same text. For every cached token of the first, the most attention
    that it gets from any query of the second, over the GQA group; the mean over tokens is the head's number. The
    quantity is the one that KVzip scores tokens by (2505.23416), taken once for the model instead of for each input.

    Args:
        model: the model.
        tokenizer: reads the text; None takes random tokens, whose profile differs little.
        text: what to read, its first `tokens` tokens; Python's own manual without it.
        tokens: length of what is read; None takes 700, fewer if the model's window is too short.
        seed: of random tokens.

    Raises:
        ValueError: fewer than 32 tokens, or twice as many do not fit into the model's window; attention that is
            not finite.

    """
    window = context_window(model)
    most = _TOKENS if window is None else (window - _ROOM) // 2
    tokens = min(_TOKENS, most) if tokens is None else tokens
    if tokens < _LEAST:
        raise ValueError(f"tokens is {tokens}; accepted: at least {_LEAST}")
    if window is not None and tokens > most:
        raise ValueError(f"tokens is {tokens}, read twice; accepted: at most {most} for this model")
    between = torch.empty(1, 0, dtype=torch.long)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        vocabulary = model.config.get_text_config().vocab_size
        first = torch.randint(vocabulary, (1, tokens), generator=generator)
        source = f"{tokens} random tokens, seed {seed}"
    else:
        first = _ids(tokenizer, text or _manual())[:, :tokens]
        between = _ids(tokenizer, _AGAIN)
        source = f"{first.shape[1]} tokens of {'the text given' if text else 'the Python manual'}"
        if first.shape[1] < _LEAST:
            raise ValueError(f"text has {first.shape[1]} tokens; accepted: at least {_LEAST}")
    ids = torch.cat((first, between, first), dim=1).to(model.device)
    decoder = model.get_decoder()
    attachment = Attachment(decoder)
    layers = [_Watch(first.shape[1]) for _ in range(model.config.get_text_config().num_hidden_layers)]
    network: Any = model
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            network(ids, past_key_values=Cache(layers=list(layers)), use_cache=True, logits_to_keep=1)
    finally:
        model.train(training)
        del attachment
    attention = [layers[index].attention for index in full_attention_layers(model)]
    if not all(math.isfinite(value) for layer in attention for value in layer):
        raise ValueError("the model's attention is NaN or infinite: no head profile can be measured")
    sharding = Sharding.from_model(model)
    if sharding is not None and sharding.is_split(len(attention[0])):
        attention = sharding.all_gather(torch.tensor(attention, device=model.device), 1).tolist()
    return Profile(tuple(map(tuple, attention)), fingerprint(model), source)


class _Watch(DynamicLayer):
    """Measures one attention call and keeps nothing."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self._first = first
        self.attention: list[float] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return mark(key_states, self), value_states

    def before(self, call: Call) -> Call | None:
        return call

    def attend(self, call: Call) -> Tensor:
        raise AssertionError("the call is over the new tokens only")

    def after(self, call: Call, attention: Tensor | None) -> None:
        signals = Signals(call.query, call.key, call.value, scaling=call.scaling)
        self.attention = _most_attention(signals, self._first).mean((0, 2)).tolist()


def profile_of(model: PreTrainedModel) -> Profile:
    """Return a model's head profile: measured earlier, shipped, or measured now on random tokens and kept."""
    name = fingerprint(model)
    found = _find(name)
    sharding = Sharding.from_model(model)
    if sharding is not None:
        found = _agreed(found, model, sharding)
    if found is not None:
        return found
    window = context_window(model)
    if window is not None and window < _SHORTEST:
        raise ValueError(
            f"allocation is 'profile', which needs a model with a window of {_SHORTEST} tokens, this one has {window}; "
            "accepted: 'equal'"
        )
    _log.warning("measuring the head profile of this model, once (a forward pass over 1,400 tokens)")
    measured = calibrate(model)
    try:
        write_profile(measured)
    except OSError as error:
        _log.warning("the head profile of this model can't be kept (%s): it is measured again next time", error)
    # As the file has it, so that the first use gives the same budgets as all later ones.
    return replace(measured, attention=_rounded(measured.attention))


def _find(name: str) -> Profile | None:
    shipped = importlib.resources.files("suffice.kv.budget") / "profiles" / f"{name}.json"
    for place in (_folder() / f"{name}.json", shipped):
        if place.is_file():
            return _read(place.read_text(encoding="utf-8"), str(place))
    return None


def _agreed(found: Profile | None, model: PreTrainedModel, sharding: Sharding) -> Profile | None:
    """Return what the first process has found: on several machines, others may have found something else."""
    heads = (len(full_attention_layers(model)), sharding.num_kv_heads)
    numbers = torch.zeros(heads) if found is None else torch.tensor(found.attention, dtype=torch.float64)
    numbers = sharding.broadcast(numbers.to(model.device, torch.float64))
    if not bool(numbers.any()):
        return None
    source = "the first process" if found is None else found.source
    return Profile(tuple(map(tuple, numbers.tolist())), fingerprint(model), source)


def write_profile(profile: Profile, path: Path | None = None) -> Path:
    """Write a profile as JSON of five digits, atomically; to Suffice's cache folder without a path."""
    path = path or _folder() / f"{profile.model}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"model": profile.model, "source": profile.source, "attention": _rounded(profile.attention)}
    half = path.with_suffix(f".{os.getpid()}.part")
    half.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(half, path)
    return path


def read_profile(path: Path) -> Profile:
    """Read a profile that `write_profile` wrote.

    Raises:
        ValueError: the file holds none.

    """
    return _read(path.read_text(encoding="utf-8"), str(path))


def _read(text: str, place: str) -> Profile:
    try:
        facts = json.loads(text)
        attention = tuple(tuple(float(value) for value in layer) for layer in facts["attention"])
        return Profile(attention, str(facts["model"]), str(facts["source"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{place} holds no head profile ({error}); remove it, and it is measured again") from None


def _rounded(attention: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(f"{value:.5g}") for value in layer) for layer in attention)


def _folder() -> Path:
    return cache_folder() / "profiles"


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    encoded: Any = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)
    return encoded.input_ids


def _manual() -> str:
    import pydoc_data.topics

    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 1500)


def _most_attention(signals: Signals, first: int, block: int = 128) -> Tensor:
    """Return the most attention that each of the first entries gets from any of as many last queries.

    Args:
        signals: of a layer.
        first: number of entries, and of queries.
        block: queries that are worked on at a time.

    Returns:
        [batch, kv_heads, first], the most over the GQA group too.

    """
    most = torch.zeros(signals.batch, signals.kv_heads, first, device=signals.device)
    total = signals.queries.shape[2]
    for start in range(total - first, total, block):
        weights = signals.attention_of(slice(start, min(start + block, total)), signals.tokens)
        most = torch.maximum(most, weights[..., :first].amax((2, 3)))
    return most
