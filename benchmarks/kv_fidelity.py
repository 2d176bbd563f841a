"""Compare how close all policies with equal heads stay to the full cache on text and on questions.

Text: the next 64 tokens of a document of 900 tokens. Questions: four six-digit numbers hidden in 900 tokens of real
English, one of them asked, seen before eviction (aware) or after it (agnostic). The measure is the KL divergence from
the full cache's next-token distribution, in nats per token of the right continuation or answer: mean and standard
error.

    python benchmarks/kv_fidelity.py --samples 12 --seed 2 --json docs/results/kv-fidelity.json
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suffice.kv import CompressedCache, load_model, policies
from suffice.kv.cache.prefill import prefill
from suffice.kv.eval.fidelity import kl_divergence
from suffice.kv.hf.tokenization import tokenize

NAMES = ("river", "castle", "garden", "violin", "harbor", "lantern", "meadow", "orchard")
TASKS = ("text", "agnostic", "aware")
CONTINUATION = 64


@dataclass
class Experiment:
    """Measures all policies and budgets on prompts.

    Args:
        model: the language model.
        policies: names of policies.
        budgets: fractions of the tokens to keep.

    Attributes:
        kl: KL of each sample by task, policy and budget.

    """

    model: Any
    policies: Sequence[str]
    budgets: Sequence[float]
    kl: dict[tuple[str, str, float], list[float]] = field(default_factory=lambda: defaultdict(list))

    def measure(self, task: str, prompt: Tensor, question: Tensor, target: Tensor) -> None:
        """Prefill a prompt, evict, feed a question, and score the target; all are token ids [tokens]."""
        settings = [("full", 1.0), *((name, budget) for name in self.policies for budget in self.budgets)]
        caches = [CompressedCache(self.model, name, budget, measure_capacity=False) for name, budget in settings]
        # The last token of the prompt is fed after eviction: it predicts the first token of the target.
        rest = torch.cat((prompt[-1:], question, target))
        prefill(self.model, {"input_ids": prompt[None, :-1]}, caches)
        reference = self._log_probs(caches[0], rest, len(target))
        for (name, budget), cache in zip(settings[1:], caches[1:], strict=True):
            log_probs = self._log_probs(cache, rest, len(target))
            self.kl[task, name, budget].append(float(kl_divergence(reference, log_probs).mean()))

    def _log_probs(self, cache: CompressedCache, rest: Tensor, count: int) -> Tensor:
        """Return the log-probabilities of the last `count` tokens that follow the cache, [count, vocabulary]."""
        with torch.no_grad():
            logits = self.model(rest[None], past_key_values=cache.copy()).logits[0]
        return logits[-count - 1 : -1].float().log_softmax(-1)


def measure_sample(
    experiment: Experiment, tokenizer: Any, text_ids: Tensor, tokens: int, generator: random.Random
) -> None:
    """Measure the three tasks on one random piece of a text.

    Args:
        experiment: collects the results.
        tokenizer: the model's tokenizer.
        text_ids: token ids of the whole text, [tokens].
        tokens: number of tokens in the piece.
        generator: draws the piece and the numbers.

    """
    start = generator.randrange(len(text_ids) - tokens - CONTINUATION)
    document = text_ids[start : start + tokens]
    nothing = text_ids[:0]
    experiment.measure("text", document, nothing, text_ids[start + tokens : start + tokens + CONTINUATION])
    facts = [(name, str(generator.randrange(100_000, 1_000_000))) for name in generator.sample(NAMES, 4)]
    fifth = tokens // 5
    parts = [tokenizer.decode(document[fifth * j : fifth * (j + 1)]) for j in range(5)]
    # Plain text comes last: a fact there would show the last queries what a fact looks like.
    story = "".join(
        f"{part}\n\nThe secret number of the {name} is {number}.\n\n"
        for part, (name, number) in zip(parts, facts, strict=False)
    )
    name, number = generator.choice(facts)
    context, question, gold = (
        tokenize(tokenizer, text)[0]
        for text in (
            f"<|im_start|>user\n{story}{parts[4]}",
            f"\nWhat is the secret number of the {name}?<|im_end|>\n<|im_start|>assistant\n"
            f"The secret number of the {name} is",
            f" {number}.",
        )
    )
    experiment.measure("agnostic", context, question, gold)
    experiment.measure("aware", torch.cat((context, question)), nothing, gold)


def summarize(experiment: Experiment) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Print the table; return the mean ranks and the rows of the JSON file."""
    conditions = [(task, budget) for task in TASKS for budget in experiment.budgets]
    names = experiment.policies
    print("KL to the full cache, nats per token: mean ± standard error")
    headers = "".join(f"{f'{task} {budget:.0%}':>18}" for task, budget in conditions)
    print(f"{'policy':<20}{headers}{'mean rank':>12}")
    means = {
        (name, task, budget): statistics.mean(experiment.kl[task, name, budget])
        for name in names
        for task, budget in conditions
    }
    ranks = {
        name: statistics.mean(
            1 + sum(means[other, task, budget] < means[name, task, budget] for other in names)
            for task, budget in conditions
        )
        for name in names
    }
    rows: list[dict[str, Any]] = []
    for name in sorted(names, key=lambda name: ranks[name]):
        line = f"{name:<20}"
        for task, budget in conditions:
            values, mean = experiment.kl[task, name, budget], means[name, task, budget]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            line += f"{f'{mean:.3f} ± {error:.3f}':>18}"
            rows.append({"policy": name, "task": task, "budget": budget, "kl": mean, "se": error})
        print(f"{line}{ranks[name]:>12.1f}")
    return ranks, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(dtype="float32")
    text = "\n\n".join(value for _, value in sorted(pydoc_data.topics.topics.items()) if len(value) > 400)
    text_ids = tokenize(tokenizer, text, add_special_tokens=True)[0]
    names = [name for name, policy in policies(replay=False).items() if name != "full" and not policy.allocation.ragged]
    experiment = Experiment(model, names, options.budgets)
    generator = random.Random(options.seed)
    for sample in range(options.samples):
        measure_sample(experiment, tokenizer, text_ids, options.tokens, generator)
        print(f"sample {sample + 1} of {options.samples}", flush=True)
    ranks, rows = summarize(experiment)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {"samples": options.samples, "seed": options.seed, "tokens": options.tokens, "mean_rank": ranks}
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
