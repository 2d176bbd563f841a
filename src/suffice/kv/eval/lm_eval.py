"""The LM Evaluation Harness on a compressed cache: its model `suffice`, for any of its tasks that have a prompt.

From Python, `lm_eval.simple_evaluate(model=CompressedLM(policy="capkv", budget=0.25), tasks=[…])`. From a shell, since
the harness looks for no models outside itself, through this module, which takes the arguments of `lm_eval`:

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
from suffice.kv.eval.fidelity import Cell
from suffice.kv.hf.loading import load_model
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.registry import DEFAULT_POLICY

try:
    # The harness is an extra that the type checker may not find.
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError("the LM Evaluation Harness is not installed: pip install 'suffice[lm-eval]'") from error

Request = tuple[Any, list[int], list[int]]
"""What was asked, and the token ids of a context and of its continuation."""


class CompressedLM(HFLM):  # pyright: ignore[reportUntypedBaseClass]
    """A language model whose cache is compressed right after the prompt, whatever the task.

    Tasks that generate are answered from the compressed cache; those that compare continuations read each of them from
    it. The prompt holds the question, so that eviction is "aware" of it. At a budget of 1.0 the results are those of
    the harness's own model `hf`.

    Args:
        pretrained: a model id or folder, the default model without it, or a model.
        policy: what to keep.
        budget: entries to keep of each prompt, or a fraction.
        allocation: how the budget is split over heads, in place of the policy's own.
        tokenizer: of a model that is given as such.
        device: where a model that is loaded goes; the first CUDA device without it, the CPU where there is none.
        dtype: of a model that is loaded: "auto", "float32", "bfloat16" or "float16".
        attn: its attention implementation, "sdpa" or "eager".
        options: further arguments of the harness's model `hf`, as `batch_size`, which holds for tasks that generate.

    Raises:
        TypeError, ValueError: what `load` and `CompressedCache` refuse, or a model without a tokenizer.

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
        attn: str = "sdpa",
        **options: Any,
    ) -> None:
        if isinstance(pretrained, PreTrainedModel):
            if tokenizer is None:
                raise ValueError("tokenizer is None with a model given as such; accepted: its tokenizer")
            model = pretrained
        else:
            # The harness's command asks for CUDA unless told otherwise, and takes the CPU where there is none.
            there = torch.cuda.is_available()
            device = device if device and (there or not device.startswith("cuda")) else "cuda:0" if there else "cpu"
            model, tokenizer = load_model(pretrained, device=device, dtype=dtype, attn=attn)
        self._cell = Cell(policy, budget, allocation)
        # What is wrong with these is said now, not after the first prompt.
        self._cell.cache(model)
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", **options)

    def _cache(self) -> CompressedCache:
        return self._cell.cache(self.model)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        return super()._model_generate(context, max_length, stop, past_key_values=self._cache(), **options)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations; those of one context are read from copies of one compressed cache."""
        together: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"request {number} has a context of {len(context)} and a continuation of {len(continuation)} "
                    f"tokens; accepted: at least 1 each, and at most {self.max_length} of the continuation"
                )
            # What the model's window does not hold is cut from the left, as the harness does.
            room = self.max_length + 1 - len(continuation)
            together.setdefault(tuple(context[-room:]), []).append(number)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for context, numbers in together.items():
            ids = torch.tensor([context], device=self.device)
            cache = self._cache()
            with torch.no_grad():
                if len(context) > 1:
                    self.model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
                for number in numbers:
                    asked, _, continuation = requests[number]
                    found[number] = self._score(cache.copy(), ids[:, -1:], continuation)
                    if asked is not None:
                        self.cache_hook.add_partial("loglikelihood", asked, found[number])
        return found

    def _score(self, cache: CompressedCache, last: Tensor, continuation: list[int]) -> tuple[float, bool]:
        """Log-likelihood of a continuation after the context's last token, and whether it is the greedy one."""
        gold = torch.tensor(continuation, device=self.device)
        logits = self.model(torch.cat((last, gold[None, :-1]), 1), past_key_values=cache, use_cache=True).logits[0]
        scored: Tensor = logits.float().log_softmax(-1)
        likelihood = scored.gather(-1, gold[:, None]).sum()
        return float(likelihood), bool((scored.argmax(-1) == gold).all())

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Refuse: a text that is scored from its first token on has no prompt to compress.

        Raises:
            ValueError: always.

        """
        raise ValueError(
            "the task asks for loglikelihood_rolling, the likelihood of a whole text, which has no prompt that could "
            "be compressed; accepted: tasks that generate, or compare continuations"
        )


register_model("suffice")(CompressedLM)


def main() -> None:
    """Run the harness's own command line, which now knows the model `suffice`."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()


if __name__ == "__main__":
    main()
