"""A tiny model of a family with its inputs, and the oracle whose results its compressed cache must reproduce."""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from suffice.kv import CompressedCache
from suffice.kv.hf.layers import find_decoder
from tests.kv.families import VOCABULARY, WINDOW, build

LENGTH = 40  # tokens of the prompt
NEW = 6  # tokens that are generated


# ---- Models and inputs -----------------------------------------------------------------------------------------------


@dataclass
class EncoderOutput(ModelOutput):
    """What decoders read from an encoder."""

    last_hidden_state: Tensor | None = None
    hidden_states: Any = None
    attentions: Any = None
    attention_mask: Any = None
    router_logits: Any = None


class Generated(NamedTuple):
    """Generated tokens, [rows, new], their logits, [rows, new, vocabulary], and the cache."""

    tokens: Tensor
    logits: Tensor
    cache: Any


@dataclass
class Case:
    """A model of one family and its inputs."""

    family: str
    model: PreTrainedModel = field(repr=False)
    _cross_attention: weakref.WeakKeyDictionary[Any, Any] = field(
        default_factory=weakref.WeakKeyDictionary, init=False, repr=False
    )

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @property
    def has_windows(self) -> bool:
        """Whether the model has layers with a sliding window."""
        try:
            layers = DynamicCache(config=self.model.config).layers
        except (AttributeError, KeyError, ValueError):
            return False
        return any("SlidingWindow" in type(layer).__name__ for layer in layers)

    @functools.cached_property
    def tokens(self) -> Tensor:
        """Tokens without a special meaning, long [any]."""
        special = set(_token_ids(self.model.config.to_dict()))
        vocabulary = getattr(self.model.config.get_text_config(decoder=True), "vocab_size", VOCABULARY)
        return torch.tensor([token for token in range(3, min(vocabulary, VOCABULARY)) if token not in special])

    def prompt(self, length: int = LENGTH, seed: int = 0) -> Tensor:
        """Return random tokens, long [1, length]; no token occurs twice."""
        generator = torch.Generator().manual_seed(1000 * seed + length)
        return self.tokens[torch.randperm(len(self.tokens), generator=generator)[:length]][None]

    def other_inputs(self, rows: int = 1) -> dict[str, Any]:
        """Return the inputs besides the tokens of the text."""
        if not self.is_encoder_decoder:
            return {}
        states = torch.randn(1, 24, _hidden_size(self.model), generator=torch.Generator().manual_seed(1))
        return {"encoder_outputs": EncoderOutput(last_hidden_state=states.repeat(rows, 1, 1))}

    def text_inputs(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        """Return tokens and their mask under the names of the model."""
        if self.is_encoder_decoder:
            return {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        return {"input_ids": ids, "attention_mask": mask}

    def generate(self, ids: Tensor, mask: Tensor | None = None, cache: Any = None) -> Generated:
        """Generate `NEW` tokens greedily."""
        mask = torch.ones_like(ids) if mask is None else mask
        cache = self._with_cross_attention(cache)
        with torch.no_grad():
            # Speech models have a `generate` of their own that needs audio.
            generate = GenerationMixin.generate if self.is_encoder_decoder else type(self.model).generate
            out = generate(
                self.model,
                **self.text_inputs(ids, mask),
                **self.other_inputs(len(ids)),
                **({"decoder_start_token_id": 1} if self.is_encoder_decoder else {}),
                past_key_values=cache,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                num_beams=1,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
                use_cache=True,
            )
        return Generated(out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1), out.past_key_values)

    def _with_cross_attention(self, cache: Any) -> Any:
        """Return a compressed cache together with the cache of the cross-attention, if the model has an encoder."""
        if not self.is_encoder_decoder or not isinstance(cache, CompressedCache):
            return cache
        if cache not in self._cross_attention:
            self._cross_attention[cache] = DynamicCache()
        return EncoderDecoderCache(cache, self._cross_attention[cache])

    def forward(self, ids: Tensor, cache: Any) -> Any:
        """Continue from a cache with more tokens; return the output of the model."""
        inputs = {"decoder_input_ids" if self.is_encoder_decoder else "input_ids": ids}
        own = self._with_cross_attention(cache)
        with torch.no_grad():
            out = self.model(**inputs, **self.other_inputs(len(ids)), past_key_values=own, use_cache=True)
        if cache is None and getattr(out, "past_key_values", None) is None:
            # The model returns no cache of its own, but may fill one that it gets.
            cache = DynamicCache(config=self.model.config)
            return self.forward(ids, cache)
        if cache is not None:
            out["past_key_values"] = cache
        return out


def _token_ids(config: dict[str, Any]) -> Iterator[int]:
    """Yield all token ids to which a configuration gives a special meaning."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _token_ids(value)
        elif str(name).endswith(("_id", "_index", "_ids")) and value is not None:
            yield from value if isinstance(value, (list, tuple)) else (value,)


def _hidden_size(model: PreTrainedModel) -> int:
    """Return the width of the encoder's output."""
    config = model.config
    encoder = next((getattr(config, name) for name in ("encoder", "encoder_config") if hasattr(config, name)), config)
    encoder = encoder if not hasattr(encoder, "text_config") else encoder.text_config
    return getattr(encoder, "d_model", None) or encoder.hidden_size


@functools.lru_cache(maxsize=2)
def get_case(family: str, window: int = WINDOW) -> Case:
    """Return the case of a family. The two most recent cases are cached."""
    return Case(family, build(family, window=window))


# ---- The oracle: the model's own cache and attention, with the evicted entries masked --------------------------------


class MaskedOracle:
    """Runs a model with its own cache and attention, in which evicted entries are masked.

    Args:
        case: the model and its inputs.

    """

    _current: MaskedOracle | None = None  # read by the registered attention function

    def __init__(self, case: Case) -> None:
        self._case = case
        self._cache: Any = None
        self._num_seen = 0  # number of tokens, including those of the current call
        self._kept: Mapping[int, Tensor] = {}
        self._kept_of_keys: dict[int, Tensor] = {}  # by the address of the keys, which several modules may read

    def forward(self, ids: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
        """Return the logits of new tokens, which read the kept entries and one another.

        Args:
            ids: the new tokens, [rows, new].
            kept: positions of kept entries, [rows, num_key_value_heads, any], by the id of the attention module. Other
                modules read all entries.

        """
        self._kept, self._kept_of_keys = kept, {}
        self._num_seen += ids.shape[1]
        MaskedOracle._current = self
        try:
            with _masked_attention_of(self._case.model):
                out = self._case.forward(ids, self._cache)
        finally:
            MaskedOracle._current = None
        self._cache = out.past_key_values
        return out.logits

    def mask(self, module: torch.nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
        """Return the mask of an attention call, without the evicted entries."""
        kept = self._kept.get(id(module), self._kept_of_keys.get(key.data_ptr()))
        new, total = query.shape[2], key.shape[2]
        if kept is None or total <= new:
            return mask
        self._kept_of_keys[key.data_ptr()] = kept
        kept = kept.long() - (self._num_seen - total)  # a sliding window has dropped earlier keys
        readable = torch.zeros(*kept.shape[:2], total + 1, dtype=torch.bool)
        readable.scatter_(2, torch.where(kept >= 0, kept, total), True)
        readable = torch.cat((readable[..., : total - new], torch.ones(*kept.shape[:2], new, dtype=torch.bool)), -1)
        readable = readable.repeat_interleave(query.shape[1] // kept.shape[1], 1)[:, :, None]
        if mask is None:
            readable = readable & torch.ones(new, total, dtype=torch.bool).tril(total - new)
        elif mask.dtype == torch.bool:
            return mask[..., :total] & readable
        bias = torch.zeros(readable.shape).masked_fill_(~readable, torch.finfo(torch.float32).min / 4)
        return bias if mask is None else mask[..., :total] + bias


@contextlib.contextmanager
def _masked_attention_of(model: PreTrainedModel) -> Iterator[None]:
    decoder = find_decoder(model)
    selected = decoder.config._attn_implementation
    name = f"masked_{selected}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, functools.partial(_masked_attention, selected))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[selected])
    decoder.set_attn_implementation(name)
    try:
        yield
    finally:
        decoder.set_attn_implementation(selected)


def _masked_attention(
    implementation: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> Any:
    if MaskedOracle._current is not None:
        attention_mask = MaskedOracle._current.mask(module, query, key, attention_mask)
    if implementation == "eager":
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[implementation]
    return function(module, query, key, value, attention_mask, **options)
