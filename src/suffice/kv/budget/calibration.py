"""Measure the head profile of a model."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from suffice.arguments import check_int, check_optional_int, check_optional_text
from suffice.kv.attention.call import AttentionCall, run_attention
from suffice.kv.attention.hook import AttentionHook, attach_observer, expect_call
from suffice.kv.budget.profile import MIN_TOKENS, Profile, find_profile, write_profile
from suffice.kv.hf.fingerprint import fingerprint
from suffice.kv.hf.layers import caches_latents, compressed_layers, find_decoder
from suffice.kv.hf.model_info import context_window
from suffice.kv.hf.tensor_parallel import Sharding
from suffice.kv.hf.tokenization import check_tokenizer, tokenize, tokenize_continuation
from suffice.kv.hf.wrappers import unwrap_model
from suffice.kv.policy.attention_stats import AttentionStats

_DEFAULT_TOKENS = 700
_MAX_INSTRUCTION_TOKENS = 32
_MIN_CONTEXT_WINDOW = 2 * MIN_TOKENS + _MAX_INSTRUCTION_TOKENS
_INSTRUCTION = "\n\nRepeat the text above.\n\n"

_log = logging.getLogger("suffice.kv")


def calibrate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: str | None = None,
    *,
    tokens: int | None = None,
    seed: int = 0,
) -> Profile:
    """Measure how much of its cache each head of a model reads when it repeats a text.

    The model reads a text followed by the same text, in one forward pass. For each token of the first copy and each KV
    head, take the largest attention that the token receives from any query of the second copy and any query head of
    the GQA group. The number of the head is the mean over the tokens. KVzip (2505.23416) scores the tokens of each
    input by the same attention; here it is measured once for a model. The decoder of an encoder-decoder model runs
    alone.

    Args:
        model: the model to measure.
        tokenizer: encodes the text. None uses random tokens instead of a text, which give a similar profile.
        text: the text to repeat; its first `tokens` tokens are used. None uses the Python manual.
        tokens: length of the text in tokens; None means 700, or fewer if the model's context window is too short.
        seed: seed of the random tokens.

    Returns:
        The profile of the model's compressed layers.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a text is given without a tokenizer, has fewer than 32 tokens or does not fit twice into the
            context window; the model is not supported or does not run on tokens alone; or its attention is not
            finite.

    Example:
        >>> from suffice.kv import CompressedCache, calibrate  # doctest: +SKIP
        >>> from suffice.kv.budget.head_profile import HeadProfile  # doctest: +SKIP
        >>> profile = calibrate(model, tokenizer, open("prompts.txt").read())  # doctest: +SKIP
        >>> cache = CompressedCache(model, allocation=HeadProfile(profile))  # doctest: +SKIP

    """
    model = unwrap_model(model)
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    check_optional_text("text", text)
    tokens, seed = check_optional_int("tokens", tokens, MIN_TOKENS), check_int("seed", seed)
    measured_layers = compressed_layers(model)
    first, instruction, source = _text_tokens(model, tokenizer, text, tokens, seed)
    ids = torch.cat((first, instruction, first), dim=1).to(model.device)
    hook = AttentionHook(find_decoder(model))
    measurements = {
        index: _Measurement(first.shape[1], share_entries=caches_latents(module))
        for index, module in measured_layers.items()
    }
    cache = _MeasuringCache(model, measurements)
    network: Any = model
    decoder: Any = find_decoder(model)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                decoder(ids, past_key_values=cache, use_cache=True)  # without an input for the encoder
            else:
                network(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"model must run on tokens alone, so that its head profile can be measured, got {type(model).__name__}, "
            f"which raises {type(error).__name__}: {error}. Use allocation='equal'; the best policy is then 'capkv'"
        ) from error
    finally:
        model.train(training)
        del hook  # restores the attention function of the model
    attention = [measurement.attention for measurement in measurements.values()]
    if not all(math.isfinite(value) for layer in attention for value in layer):
        raise ValueError("model must have finite attention to measure a head profile, got NaN or infinite values")
    sharding = Sharding.from_model(model)
    if sharding is not None and sharding.is_split(len(attention[0])):
        attention = [sharding.all_gather(torch.tensor(layer, device=model.device), 0).tolist() for layer in attention]
    return Profile(tuple(map(tuple, attention)), fingerprint(model), source)


def get_profile(model: PreTrainedModel) -> Profile:
    """Return the head profile of a model.

    The profile is read from Suffice's cache folder or, if it is not there, from the package. If the package has none,
    it is measured on random tokens and written to the cache folder.

    Raises:
        ValueError: the context window of the model is too short to measure a profile, or its attention is not finite.

    """
    found = find_profile(fingerprint(model))
    sharding = Sharding.from_model(model)
    if sharding is not None:
        found = _profile_of_first_process(found, model, sharding)
    if found is not None:
        return found
    window = context_window(model)
    if window is not None and window < _MIN_CONTEXT_WINDOW:
        raise ValueError(
            f"context window of the model must be at least {_MIN_CONTEXT_WINDOW} tokens for the allocation 'profile', "
            f"got {window}. Use the allocation 'equal'"
        )
    _log.warning("measuring the head profile of this model, once (a forward pass over 1,400 tokens)")
    measured = calibrate(model)
    try:
        write_profile(measured)
    except OSError as error:
        _log.warning("cannot store the head profile of this model (%s); it will be measured again next time", error)
    # Rounded as in the file, so that the first cache has the same budgets as later ones.
    return measured.rounded()


class _Measurement:
    """Measures the attention to the keys of a layer, in one call or, if later layers read the keys too, in several.

    Args:
        num_first: number of first entries whose attention is measured.
        share_entries: whether all heads share their entries, so that they count as one head.

    """

    def __init__(self, num_first: int, *, share_entries: bool = False) -> None:
        self._num_first, self._share_entries = num_first, share_entries
        self._largest: Tensor | None = None

    @property
    def attention(self) -> list[float]:
        """One number for each KV head."""
        assert self._largest is not None
        return self._largest.mean((0, 2)).tolist()

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        output, weights = run_attention(call)
        stats = AttentionStats(
            call.query,
            call.key,
            call.value,
            scaling=call.scaling,
            softcap=call.softcap,
            sink_logits=call.sink_logits,
        )
        # Some models compute later layers for the last tokens only. Such calls are not measured.
        if call.query.shape[2] == call.key.shape[2]:
            largest = _largest_attention(stats, self._num_first)
            if self._share_entries:
                largest = largest.amax(1, keepdim=True)
            self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        return output, weights


class _MeasuringCache(DynamicCache):
    """The model's own cache, except that it does not store the keys and values of the measured layers.

    Args:
        model: the model.
        measurements: one measurement for each measured layer, by the index of the layer.

    """

    def __init__(self, model: PreTrainedModel, measurements: Mapping[int, _Measurement]) -> None:
        super().__init__(config=model.config)
        self._measurements = measurements
        self._modules = compressed_layers(model)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values to a layer, or have its measurement compute the attention call that follows."""
        if layer_idx in self._measurements:
            measurement, module = self._measurements[layer_idx], self._modules[layer_idx]
            if caches_latents(module):
                expect_call(module, measurement)
                return key_states, value_states
            return attach_observer(key_states, measurement), value_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _largest_attention(stats: AttentionStats, num_first: int, block_size: int = 128) -> Tensor:
    """Return the largest attention that each of the first `num_first` entries receives from the last queries.

    Args:
        stats: statistics of an attention call.
        num_first: number of first entries, and of last queries.
        block_size: number of queries whose attention is in memory at a time.

    Returns:
        [batch, num_key_value_heads, num_first], the largest over the heads of a GQA group.

    """
    largest = torch.zeros(stats.batch_size, stats.num_key_value_heads, num_first, device=stats.device)
    for start in range(stats.num_queries - num_first, stats.num_queries, block_size):
        query_range = slice(start, min(start + block_size, stats.num_queries))
        weights = stats.attention_weights(query_range, stats.num_entries)
        largest = torch.maximum(largest, weights[..., :num_first].amax((2, 3)))
    return largest


def _text_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text: str | None, tokens: int | None, seed: int
) -> tuple[Tensor, Tensor, str]:
    """Return the tokens of the text and of the instruction between its copies, long [1, any], and a description."""
    window = context_window(model)
    max_tokens = _DEFAULT_TOKENS if window is None else (window - _MAX_INSTRUCTION_TOKENS) // 2
    tokens = min(_DEFAULT_TOKENS, max_tokens) if tokens is None else tokens
    if tokens < MIN_TOKENS:
        raise ValueError(f"context window of the model must hold {MIN_TOKENS} tokens twice, got {window} tokens")
    if window is not None and tokens > max_tokens:
        raise ValueError(
            f"tokens must be at most {max_tokens} for this model, whose context window has to hold the text twice, got "
            f"{tokens!r}"
        )
    if tokenizer is None and text is not None:
        raise ValueError("tokenizer must be given with a text, got None. Without both, random tokens are used")
    if tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        vocabulary = model.config.get_text_config().vocab_size
        first = torch.randint(vocabulary, (1, tokens), generator=generator)
        return first, torch.empty(1, 0, dtype=torch.long), f"{tokens} random tokens, seed {seed}"
    first = tokenize(tokenizer, _python_manual() if text is None else text)[:, :tokens]
    if first.shape[1] < MIN_TOKENS:
        raise ValueError(f"text must have at least {MIN_TOKENS} tokens, got {first.shape[1]}")
    source = f"{first.shape[1]} tokens of {'the Python manual' if text is None else 'the text given'}"
    return first, tokenize_continuation(tokenizer, _INSTRUCTION), source


def _python_manual() -> str:
    """Return the long topics of Python's built-in help, a text that is on every machine."""
    import pydoc_data.topics

    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 1500)


def _profile_of_first_process(found: Profile | None, model: PreTrainedModel, sharding: Sharding) -> Profile | None:
    """Return the profile that the first process found. Other machines may have stored another profile, or none."""
    content = b"" if found is None else json.dumps(found.attention).encode()
    size = int(sharding.broadcast(torch.tensor(len(content), device=model.device)))
    if not size:
        return None
    own = torch.zeros(size, dtype=torch.uint8)
    if len(content) == size:
        own = torch.tensor(list(content), dtype=torch.uint8)
    content = bytes(sharding.broadcast(own.to(model.device)).tolist())
    source = "the first process" if found is None else found.source
    return Profile(tuple(map(tuple, json.loads(content))), fingerprint(model), source)
