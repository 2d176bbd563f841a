"""The prompts and the answers of `leaderboard.py`, compared with those of kvpress's pipeline, without compression.

    python benchmarks/leaderboard_peers.py --data out/made-600     # in the environment of make bench-kv

Both tokenize all prompts of the data, with the chat template and without one, and answer the first question of each
task from all entries. Prompts are equal if the token ids of the context and of the question are.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from leaderboard_answers import fill_caches, generate_from_each, tokenize_contexts
from leaderboard_data import Sample, first_of_each_task, read_samples
from suffice.kv import CacheConfig, load_model

_NO_LIMIT = 10**9  # tokens; the pipeline shortens longer contexts


def count_equal_prompts(pipe: Any, samples: Sequence[Sample]) -> int:
    """Return how many samples have the same prompt in both libraries."""
    equal = 0
    for context in tokenize_contexts(pipe.tokenizer, samples):
        for sample, question in zip(context.samples, context.questions, strict=True):
            theirs = pipe.preprocess(sample.context, [sample.question], sample.answer_prefix, _NO_LIMIT)
            pairs = ((theirs["context_ids"], context.ids), (theirs["questions_ids"][0], question))
            equal += all(torch.equal(one, other) for one, other in pairs)
    return equal


def count_equal_answers(pipe: Any, samples: Sequence[Sample]) -> int:
    """Return how many samples get the same answer from both libraries."""
    equal = 0
    for sample in samples:
        (context,) = tokenize_contexts(pipe.tokenizer, [sample])
        caches = fill_caches(pipe.model, pipe.tokenizer, context, [CacheConfig("full", 1.0)])
        (ids,) = generate_from_each(pipe.model, caches, context.questions[0], sample.max_new_tokens)
        theirs = pipe(
            sample.context,
            questions=[sample.question],
            answer_prefix=sample.answer_prefix,
            max_new_tokens=sample.max_new_tokens,
        )
        equal += pipe.tokenizer.decode(ids, skip_special_tokens=True) == theirs["answers"][0]
    return equal


def main() -> None:
    importlib.import_module("kvpress")  # registers the pipeline

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="as of leaderboard.py")
    parser.add_argument("--data-dir", default="4096", help="as of leaderboard.py")
    parser.add_argument("--model", help="Hugging Face model id or folder; the default model if it is not given")
    options = parser.parse_args()
    samples = read_samples(options.data, options.data_dir)
    model, tokenizer = load_model(options.model)
    plain: Any = copy.deepcopy(tokenizer)
    plain.chat_template = None
    pipes = [
        transformers.pipeline("kv-press-text-generation", model=model, tokenizer=own) for own in (tokenizer, plain)
    ]
    few = first_of_each_task(samples, 1)
    result = {
        "kvpress": importlib.metadata.version("kvpress"),
        "prompts": 2 * len(samples),
        "equal_prompts": sum(count_equal_prompts(pipe, samples) for pipe in pipes),
        "answers": len(few),
        "equal_answers": count_equal_answers(pipes[0], few),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
