"""How close a part of the cache stays to the full one, on one example, for any number of policies at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suffice.kv.budget.allocation import Allocation
from suffice.kv.cache.batched import BatchedCaches
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.shared_prefill import prefill
from suffice.kv.eval.answer import Prompt, check_length, generate
from suffice.kv.eval.tasks import Example
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.registry import get_policy

# Rows that one forward pass reads at once are limited by what their logits take.
_LOGITS = 32_000_000


@dataclass(frozen=True)
class Cell:
    """A policy, a budget and an allocation to be tried.

    Args:
        policy: a name, or a `Policy`.
        budget: entries to keep of each row, or a fraction.
        allocation: how the budget is split over heads, in place of the policy's own; None for its own.

    """

    policy: str | Policy
    budget: float = 0.25
    allocation: str | Allocation | None = None

    def cache(self, model: PreTrainedModel, *, measure_capacity: bool = False) -> CompressedCache:
        """Return an empty cache of this kind.

        Raises:
            TypeError, ValueError: what `CompressedCache` refuses.

        """
        return CompressedCache(
            model, self.policy, self.budget, allocation=self.allocation, measure_capacity=measure_capacity
        )

    @property
    def names(self) -> tuple[str, str]:
        """Names of policy and allocation, as given, or the allocation's words."""
        split = self.allocation
        if split is None:
            split = get_policy(self.policy).allocation
        return get_policy(self.policy).name, split if isinstance(split, str) else str(split)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    cells: Sequence[Cell],
    *,
    mode: str = "agnostic",
    answer: bool = True,
    greedy_tokens: int = 0,
    measure_capacity: bool = False,
) -> list[dict[str, Any]]:
    """Measure how close caches stay to the full one on an example; all of them share one prefill.

    Divergence, likelihood and top-1 agreement are measured on the right answer, given to the model token after
    token, so that they do not depend on what each cache would have said.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        example: what is read and asked, `suffice.kv.eval.tasks.make`.
        cells: what to try.
        mode: `"agnostic"` evicts before the question is seen, `"aware"` after; `"continuation"` for a text.
        answer: let each cache answer, greedily, and score what it says.
        greedy_tokens: let each cache go on greedily for so many tokens and compare with the full one; 0 for not.
        measure_capacity: measure the share of capacity that is kept.

    Returns:
        A row of plain values for the full cache and then one for each cell:
        `task`, `mode`, `seed`; `policy`, `allocation`, `budget`;
        `tokens` of the prompt, `gold_tokens` of the right answer;
        `kl`, the divergence KL(full ‖ cell) of the next-token distributions, nats a token;
        `log_likelihood` of the right answer, nats a token, and `log_likelihood_change` against the full cache;
        `top1`, share of the tokens at which both deem the same token likeliest;
        `score` of the answer, 0 to 1, `full_score`, the full cache's, and `chance`; None without `answer`, or
        for a text;
        `said`, the answer; None without `answer`;
        `agreement`, share of the full cache's greedy tokens that come the same at the same place, and
        `agreed_tokens`, how many come the same before the first that does not; None without `greedy_tokens`;
        `tokens_kept` (mean over heads), `bytes_kept`, `bytes_full` after the prefill, `capacity_retained` (None if
        it was not measured) and `seconds`, what scoring and evicting took on top of the cells before.

    Raises:
        ValueError: a mode that the example does not have, a prompt longer than the model's window, or what
            `CompressedCache` refuses.

    """
    if mode not in example.modes:
        raise ValueError(f"mode is {mode!r}; accepted for task {example.task!r}: {', '.join(example.modes)}")
    if greedy_tokens < 0:
        raise ValueError(f"greedy_tokens is {greedy_tokens}; accepted: 0 or more")
    gold = example.gold(tokenizer)
    parts = example.prompt(tokenizer)
    spoken = example.new_tokens if answer and example.references else 0
    check_length(model, parts.ids.shape[1] + max(gold.shape[1], spoken, greedy_tokens))
    every = [Cell("full", 1.0, "equal"), *cells]
    caches = [cell.cache(model, measure_capacity=measure_capacity) for cell in every]
    shared = prefill(model, {"input_ids": _first(parts, mode).to(model.device)}, caches, share_statistics=True)
    reports = [cache.report() for cache in caches]
    measured = _on_gold(model, caches, parts.ids, gold)
    told = _greedy(model, caches, parts.ids, max(spoken, greedy_tokens))
    said = [_text(tokenizer, tokens[:spoken]) if spoken else None for tokens in told]
    scores = [None if text is None else example.score(text) for text in said]
    rows: list[dict[str, Any]] = []
    for number, (cell, report) in enumerate(zip(every, reports, strict=True)):
        policy, allocation = cell.names
        same = _agreement(told[0][:greedy_tokens], told[number][:greedy_tokens]) if greedy_tokens else (None, None)
        rows.append(
            {
                "task": example.task,
                "mode": mode,
                "seed": example.seed,
                "policy": policy,
                "allocation": allocation,
                "budget": cell.budget,
                "tokens": parts.ids.shape[1],
                "gold_tokens": gold.shape[1],
                **measured[number],
                "log_likelihood_change": measured[number]["log_likelihood"] - measured[0]["log_likelihood"],
                "score": scores[number],
                "full_score": scores[0],
                "chance": example.chance,
                "said": said[number],
                "agreement": same[0],
                "agreed_tokens": same[1],
                "tokens_kept": report.tokens_kept,
                "bytes_kept": report.bytes_kept,
                "bytes_full": report.bytes_full,
                "capacity_retained": report.capacity_retained,
                "seconds": shared.seconds[number],
            }
        )
    return rows


def divergence(reference: Tensor, own: Tensor) -> Tensor:  # log-probabilities [..., vocabulary]
    """Return KL(reference ‖ own) of distributions given as log-probabilities, nats, [...]."""
    # Where the reference has no weight its log is −∞, and 0 · −∞ counts as 0.
    terms = reference.exp() * (reference - own)
    return terms.masked_fill(reference == float("-inf"), 0).sum(-1)


def compare(reference: Tensor, own: Tensor, gold: Tensor) -> dict[str, float]:
    """Compare two caches by what they predict for each token of a right answer.

    Args:
        reference: the full cache's log-probabilities, [tokens, vocabulary].
        own: the other's.
        gold: the tokens of the answer, long [tokens].

    Returns:
        `kl` and `log_likelihood`, means over the tokens, nats, and `top1`.

    """
    return {
        "kl": float(divergence(reference, own).mean()),
        "log_likelihood": float(own.gather(-1, gold[:, None]).mean()),
        "top1": float((reference.argmax(-1) == own.argmax(-1)).float().mean()),
    }


def _first(parts: Prompt, mode: str) -> Tensor:
    """Return what is prefilled: of a whole prompt all but the last token, whose logits predict the answer's first."""
    return parts.document if mode == "agnostic" else parts.ids[:, :-1]


def _on_gold(
    model: PreTrainedModel, caches: list[CompressedCache], ids: Tensor, gold: Tensor
) -> list[dict[str, float]]:
    """Read the rest of the prompt and the right answer from each cache, and compare with the first."""
    rest = torch.cat((ids[:, caches[0].get_seq_length() :], gold), dim=1).to(model.device)
    network: Any = model
    wanted = gold.shape[1] + 1
    at_once = max(1, _LOGITS // (wanted * model.config.get_text_config().vocab_size))
    target = gold[0].to(model.device)
    reference: Tensor | None = None
    found: list[dict[str, float]] = []
    for start in range(0, len(caches), at_once):
        rows = [cache.copy() for cache in caches[start : start + at_once]]
        with torch.no_grad():
            logits = network(
                rest.expand(len(rows), -1), past_key_values=BatchedCaches(rows), logits_to_keep=wanted
            ).logits
        for own in logits[:, :-1]:
            scored: Tensor = own.float().log_softmax(-1)
            if reference is None:
                reference = scored
            found.append(compare(reference, scored, target))
    return found


def _greedy(model: PreTrainedModel, caches: list[CompressedCache], ids: Tensor, count: int) -> list[list[int]]:
    """Continue the prompt from a copy of each cache; what comes after an end of text is left out."""
    if count == 0:
        return [[] for _ in caches]
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    rows = BatchedCaches([cache.copy() for cache in caches])
    told = generate(model, ids.expand(len(caches), -1), rows, count).tolist()
    return [_until(tokens, ends) for tokens in told]


def _until(tokens: list[int], ends: list[int]) -> list[int]:
    places = [place for place, token in enumerate(tokens) if token in ends]
    return tokens[: places[0] + 1] if places else tokens


def _agreement(reference: list[int], own: list[int]) -> tuple[float, int]:
    """Share of the reference's tokens that come the same at the same place, and how many before the first other."""
    same = [place < len(own) and own[place] == token for place, token in enumerate(reference)]
    first = same.index(False) if False in same else len(same)
    return sum(same) / len(same), first


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
