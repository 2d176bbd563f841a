"""Run tasks of the LM Evaluation Harness on a compressed cache.

In Python: `lm_eval.simple_evaluate(model=CompressedLM(policy="capkv", budget=0.25), tasks=[…])`. On the command line,
use this module in place of `lm_eval`, with the same arguments. The module registers `suffice`:

    python -m suffice.kv.eval.lm_eval --model suffice --model_args policy=capkv,budget=0.25 --tasks longbench
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from suffice.arguments import shown
from suffice.kv.budget.allocation import Allocation
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.eval.fidelity import CacheConfig
from suffice.kv.eval.generation import fill_cache
from suffice.kv.hf.loading import ModelSource, load_model
from suffice.kv.hf.tokenization import check_tokenizer
from suffice.kv.hf.wrappers import unwrap_model
from suffice.kv.policy.names import DEFAULT_POLICY
from suffice.kv.policy.policy import Policy
from suffice.kv.storage.quantization import Bits
from suffice.study.run_kind import check_names

try:
    # The harness is an optional dependency, which the type checker may not find.
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
        get_rolling_token_windows,
        make_disjoint_window,
    )
except ImportError as error:
    raise ImportError("the LM Evaluation Harness is not installed: pip install 'suffice[lm-eval]'") from error

# Options of the harness's model `hf` that also have an effect if the model has already been loaded.
_OPTIONS = (
    "peft",
    "max_length",
    "truncation",
    "add_bos_token",
    "prefix_token_id",
    "think_end_token",
    "enable_thinking",
    "chat_template_args",
    "batch_size",
    "max_batch_size",
)
_ROLLING_CHUNK = 256  # tokens between evictions while a whole text is scored

Request = tuple[Any, list[int], list[int]]
"""The harness's own key of a request, and the token ids of its context and of its continuation."""


class CompressedLM(HFLM):  # pyright: ignore[reportUntypedBaseClass]
    """A language model of the harness whose cache is compressed right after the prompt.

    Tasks of the type `generate_until` generate from the compressed cache; tasks that compare continuations score each
    of them from it. The prompt includes the question, so eviction is "aware" of it. Tasks that score whole texts
    (`loglikelihood_rolling`, perplexity) read them in chunks of 256 tokens: the tokens of a chunk are predicted from
    the chunk itself and from the entries that the cache kept of earlier chunks, and then the cache evicts down to the
    budget. At a budget of 1.0, all
    results equal those of the harness's own model `hf`.

    Args:
        pretrained: a name that `load_model` accepts, or a model, also a `PeftModel`; None is the default model.
        policy: which entries to keep.
        budget: number of tokens of each prompt to keep, or a fraction; None means a quarter of the tokens, or as many
            as `memory` allows.
        allocation: how the budget is split over heads; None uses the policy's own allocation.
        bits: number of bits of quantized entries, or a pair (bits of keys, bits of values); None does not quantize, or
            uses the bits that follow from `memory`.
        memory: limit on the bytes of the compressed prompts, instead of `budget`: a fraction of those of the full
            cache, or a number of bytes for all prompts of a batch; see `CompressedCache`. In tasks that score whole
            texts, it holds after every chunk.
        repair: repair the kept entries, so that they reproduce the attention over all entries; see `CompressedCache`.
            Contexts must then have at least 9 tokens, unless all of their entries are kept.
        tokenizer: a tokenizer, or the id or folder of one; None loads that of `pretrained`, which must then be a name.
        device: device of a model that is loaded; by default the first CUDA device, or the CPU if there is none.
        dtype: dtype of a model that is loaded: `"auto"`, `"float32"`, `"bfloat16"` or `"float16"`.
        attn_implementation: see `load_model`; for a model that is loaded.
        options: further arguments of the harness's model `hf`: `peft` (id or folder of an adapter), `max_length`,
            `truncation`, `add_bos_token`, `prefix_token_id`, `think_end_token`, `enable_thinking`,
            `chat_template_args`, `batch_size` and `max_batch_size`. The batch size is used by tasks that generate;
            `"auto"` finds the largest one at which the longest prompt fits into memory.

    Raises:
        TypeError, ValueError: `load_model` or `CompressedCache` rejects an argument, a model has no tokenizer, or an
            option would not have an effect.

    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | nn.Module | None = None,
        *,
        policy: str | Policy = DEFAULT_POLICY,
        budget: float | None = None,
        allocation: str | Allocation | None = None,
        bits: Bits | None = None,
        memory: float | str | None = None,
        repair: bool = False,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        **options: Any,
    ) -> None:
        # The harness ignores other options if the model has already been loaded.
        check_names(options, _OPTIONS, "options")
        # The harness has an attribute `_config` of its own.
        self._cache_config = CacheConfig(policy, budget, allocation, bits, memory, repair)
        self._cache_config.check()
        if not (pretrained is None or isinstance(pretrained, (str, os.PathLike, nn.Module))):
            raise TypeError(f"pretrained must be a name, a folder, a model or None, got {shown(pretrained)}")
        if isinstance(pretrained, nn.Module) and tokenizer is None:
            raise ValueError("tokenizer must be given if pretrained is a model, got None")
        if not (tokenizer is None or isinstance(tokenizer, str)):
            check_tokenizer(tokenizer)
        if not (device is None or isinstance(device, str)):
            raise TypeError(f"device must be a name such as 'cpu' or 'cuda:0', or None, got {shown(device)}")
        ModelSource(dtype=dtype, attn_implementation=attn_implementation)  # raises if one of them is not accepted
        if isinstance(tokenizer, str):
            auto_tokenizer: Any = AutoTokenizer
            tokenizer = auto_tokenizer.from_pretrained(tokenizer)
        if isinstance(pretrained, nn.Module):
            model = unwrap_model(pretrained)
        else:
            # The harness's command line asks for CUDA by default, also where there is none.
            has_cuda = torch.cuda.is_available()
            if not device or (device.startswith("cuda") and not has_cuda):
                device = "cuda:0" if has_cuda else "cpu"
            model, own_tokenizer = load_model(
                pretrained, device=device, dtype=dtype, attn_implementation=attn_implementation
            )
            tokenizer = tokenizer or own_tokenizer
        if options.get("peft"):
            model = _load_adapter(model, options["peft"])
        # Report wrong arguments before the first prompt.
        self._cache_config.build(model)
        self._num_prompts = self._longest_prompt = 1
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)

    def _new_cache(self) -> CompressedCache:
        return self._cache_config.build(self.model)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Generate an answer to each request; see `HFLM.generate_until`."""
        if self.batch_size == "auto":
            prompts = [len(self.tok_encode(request.args[0])) for request in requests]
            self._longest_prompt = min(max(prompts, default=1), self.max_length)
            self._num_prompts = max(len(prompts), 1)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
        """Return the largest batch size for which a prefill of the longest prompt fits into memory."""
        from accelerate.utils import find_executable_batch_size

        def fill(batch_size: int) -> int:
            input_ids = torch.ones(batch_size, self._longest_prompt, dtype=torch.long, device=self.device)
            fill_cache(self.model, input_ids, self._new_cache(), tokenizer=self.tokenizer)
            return batch_size

        largest = min(self.max_batch_size, self._num_prompts)
        return find_executable_batch_size(fill, starting_batch_size=largest)()

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        cache = self._new_cache()
        if cache.needs_replay:
            # The last token is fed by `generate`.
            mask = options["attention_mask"][:, :-1]
            fill_cache(self.model, context[:, :-1], cache, tokenizer=self.tokenizer, attention_mask=mask)
        return super()._model_generate(context, max_length, stop, past_key_values=cache, **options)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations. Those with the same context are read from copies of one compressed cache."""
        by_context: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"context and continuation of request {index} must have at least 1 token each, and the "
                    f"continuation at most {self.max_length}, got {len(context)} and {len(continuation)}"
                )
            # As in the harness, a context that exceeds the window is truncated on the left.
            max_context = self.max_length + 1 - len(continuation)
            by_context.setdefault(tuple(context[-max_context:]), []).append(index)
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for context, indices in by_context.items():
            input_ids = torch.tensor([context], device=self.device)
            cache = self._new_cache()
            try:
                fill_cache(self.model, input_ids[:, :-1], cache, tokenizer=self.tokenizer)
            except ValueError as error:
                raise ValueError(f"context of request {indices[0]}: {error}") from error
            with torch.no_grad():
                for index in indices:
                    key, _, continuation = requests[index]
                    scores[index] = self._score(cache.copy(), input_ids[:, -1:], continuation)
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, scores[index])
        return scores

    def _score(self, cache: CompressedCache, last: Tensor, continuation: list[int]) -> tuple[float, bool]:
        """Return the log-likelihood of a continuation, and whether greedy decoding would generate it."""
        gold = torch.tensor(continuation, device=self.device)
        logits = self.model(torch.cat((last, gold[None, :-1]), 1), past_key_values=cache, use_cache=True).logits[0]
        log_probs: Tensor = logits.float().log_softmax(-1)
        log_likelihood = log_probs.gather(-1, gold[:, None]).sum()
        return float(log_likelihood), bool((log_probs.argmax(-1) == gold).all())

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text.

        As in the harness, a text that is longer than the context window is split into windows, each with one token of
        context. Each window is read in chunks into a cache of its own, which evicts after each chunk.
        """
        totals: list[float] = []
        for request in requests:
            (text,) = request.args
            windows: Any = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            totals.append(sum(self._score_window(*make_disjoint_window(window)) for window in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _score_window(self, context: list[int], continuation: list[int]) -> float:
        """Return the log-likelihood of a continuation that is read in chunks, with evictions between them."""
        cache = self._cache_config.build(self.model, evict="always")
        ids = torch.tensor([[*context, *continuation]], device=self.device)
        inputs = ids[:, :-1]
        log_likelihood = 0.0
        for start in range(0, inputs.shape[1], _ROLLING_CHUNK):
            chunk = inputs[:, start : start + _ROLLING_CHUNK]
            with torch.no_grad():
                logits = self.model(chunk, past_key_values=cache, use_cache=True).logits[0]
            following = ids[0, start + 1 : start + 1 + len(logits)]
            scores = logits.float().log_softmax(-1).gather(-1, following[:, None])[:, 0]
            log_likelihood += float(scores[max(0, len(context) - 1 - start) :].sum())
        return log_likelihood


def _load_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    try:
        import peft  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(f"peft={adapter!r} needs the package peft: pip install peft") from None
    wrapped: Any = peft.PeftModel.from_pretrained(model, adapter)  # pyright: ignore
    return unwrap_model(wrapped)


register_model("suffice")(CompressedLM)


def main() -> None:
    """Run the harness's command line with the model `suffice` registered."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()


if __name__ == "__main__":
    main()
