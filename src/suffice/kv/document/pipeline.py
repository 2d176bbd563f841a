"""A text generation pipeline of transformers whose cache is compressed."""

from __future__ import annotations

from typing import Any

from transformers import TextGenerationPipeline

from suffice.kv.cache.cache import CompressedCache
from suffice.kv.document.document import CacheOptions
from suffice.kv.eval.generation import fill_cache

_CACHE_OPTIONS = ("policy", "budget", "memory", *CacheOptions.__annotations__)


class CompressedTextGenerationPipeline(TextGenerationPipeline):
    """The pipeline `"text-generation"` with a new `CompressedCache` for each prompt or batch of prompts.

    It accepts all arguments of the stock pipeline and of `CompressedCache`, both in the constructor and in each call. A
    question in the prompt is seen before the eviction; for many questions about one text, use `suffice.kv.compress`.

    Raises:
        TypeError, ValueError: an argument of the cache is not accepted.

    Example:
        >>> from transformers import pipeline
        >>> pipe = pipeline(                                                               # doctest: +SKIP
        ...     "text-generation", model=model, tokenizer=tokenizer,
        ...     pipeline_class=CompressedTextGenerationPipeline, memory=0.1,
        ... )
        >>> pipe([{"role": "user", "content": text}], max_new_tokens=50)                   # doctest: +SKIP

    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._preprocess_params: dict[str, Any]
        self._forward_params: dict[str, Any]
        if self.tokenizer is not None:
            self.tokenizer.padding_side = "left"
        self._new_cache(self._forward_params)  # raises if an argument is not accepted

    def _sanitize_parameters(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, **parameters: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        own = {name: parameters.pop(name) for name in _CACHE_OPTIONS if name in parameters}
        stock: Any = super()._sanitize_parameters
        preprocess, forward, postprocess = stock(**parameters)
        return preprocess, {**forward, **own}, postprocess

    def _new_cache(self, parameters: dict[str, Any]) -> CompressedCache:
        """Return an empty cache, after removing its arguments from the parameters of a call."""
        options = {name: parameters[name] for name in _CACHE_OPTIONS if name in parameters}
        return CompressedCache(self.model, **options)

    def _forward(self, model_inputs: Any, **parameters: Any) -> Any:
        cache = self._new_cache(parameters)
        if cache.needs_replay:
            # The last token is fed by `generate`.
            ids, mask = model_inputs["input_ids"], model_inputs.get("attention_mask")
            mask = None if mask is None else mask[:, :-1]
            fill_cache(
                cache=cache, model=self.model, input_ids=ids[:, :-1], tokenizer=self.tokenizer, attention_mask=mask
            )
        rest = {name: value for name, value in parameters.items() if name not in _CACHE_OPTIONS}
        stock: Any = super()._forward
        return stock(model_inputs, past_key_values=cache, **rest)
