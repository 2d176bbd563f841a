"""Run tasks of the LM Evaluation Harness on a compressed cache.

In Python: `lm_eval.simple_evaluate(model=CompressedLM(policy="capkv", budget=0.25), tasks=[…])`. On the command line,
use this module in place of `lm_eval`, with the same arguments. The module registers `suffice`:

    python -m suffice.kv.eval.lm_eval --model suffice --model_args policy=capkv,budget=0.25 --tasks longbench
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suffice.kv.budget.allocation import Allocation
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.eval.fidelity import CacheConfig
from suffice.kv.hf.loading import load_model
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.registry import DEFAULT_POLICY

try:
    # The harness is an optional dependency, which the type checker may not find.
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("the LM Evaluation Harness is not installed: pip install 'suffice[lm-eval]'") from error

Request = tuple[Any, list[int], list[int]]
"""The harness's own key of a request, and the token ids of its context and of its continuation."""


class CompressedLM(HFLM):  # pyright: ignore[reportUntypedBaseClass]
    """A language model of the harness whose cache is compressed right after the prompt.

    Tasks of the type `generate_until` generate from the compressed cache. Tasks that compare continuations
    compute the likelihood of each continuation with the compressed cache. The prompt includes the question, so the
    question is seen before eviction ("aware"). At a budget of 1.0, the results equal those of the harness's own model
    `hf`.

    Args:
        pretrained: a model id, a local folder, or a model; None loads the default model.
        policy: which entries to keep.
        budget: number of tokens of each prompt to keep, or a fraction.
        allocation: how the budget is split over heads; None uses the policy's own allocation.
        tokenizer: the tokenizer, if `pretrained` is a model.
        device: device of a model that is loaded; by default the first CUDA device, or the CPU if there is none.
        dtype: dtype of a model that is loaded: `"auto"`, `"float32"`, `"bfloat16"` or `"float16"`.
        attn_implementation: `"sdpa"`, `"eager"` or another one of `load_model`, for a model that is loaded.
        options: further arguments of the harness's model `hf`, such as `batch_size` (for tasks that generate).

    Raises:
        TypeError, ValueError: `load_model` or `CompressedCache` rejects an argument, or a model has no tokenizer.

    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel | None = None,
        *,
        policy: str | Policy = DEFAULT_POLICY,
        budget: float = 0.25,
        allocation: str | Allocation | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        **options: Any,
    ) -> None:
        if isinstance(pretrained, PreTrainedModel):
            if tokenizer is None:
                raise ValueError("tokenizer must be given if pretrained is a model, got None")
            model = pretrained
        else:
            # The harness's command line requests CUDA by default, even if there is no CUDA device.
            has_cuda = torch.cuda.is_available()
            if not device or (device.startswith("cuda") and not has_cuda):
                device = "cuda:0" if has_cuda else "cpu"
            model, tokenizer = load_model(
                pretrained, device=device, dtype=dtype, attn_implementation=attn_implementation
            )
        self._config = CacheConfig(policy, budget, allocation)
        # Report invalid arguments now, not after the first prompt.
        self._config.build(model)
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)

    def _new_cache(self) -> CompressedCache:
        return self._config.build(self.model)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        return super()._model_generate(context, max_length, stop, past_key_values=self._new_cache(), **options)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations. Those of the same context are scored with copies of one compressed cache."""
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
            with torch.no_grad():
                if len(context) > 1:
                    self.model(input_ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
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
        """Reject tasks that score a whole text, which has no prompt to compress.

        Raises:
            ValueError: always.

        """
        raise ValueError(
            "tasks must generate text or compare continuations, got a task that uses loglikelihood_rolling, which "
            "scores a whole text without a prompt to compress"
        )


register_model("suffice")(CompressedLM)


def main() -> None:
    """Run the harness's command line with the model `suffice` registered."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()


if __name__ == "__main__":
    main()
