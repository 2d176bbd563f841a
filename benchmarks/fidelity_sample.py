"""One example on which caches are compared with the full cache, in the models' own bytes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from suffice.kv import CompressedCache
from suffice.kv.cache.memory import LayerShape, MemoryBudget
from suffice.kv.eval.fidelity import teacher_forced_metrics
from suffice.kv.eval.samples import load_cached
from suffice.kv.eval.tasks import make_example
from suffice.kv.hf.layers import compressed_layers
from suffice.kv.hf.loading import ModelSource
from suffice.kv.policy.registry import get_policy

MODES = {"text": ("text", "continuation"), "agnostic": ("multikey", "agnostic"), "aware": ("multikey", "aware")}


class FidelitySample:
    """The full cache of one example, and the distributions that it predicts.

    The models run in float32. What is stored in full precision counts as 16 bits, as it would in a model of 16 bits.

    Args:
        model_name: name of the model.
        mode: `"text"`, `"agnostic"` or `"aware"`.
        tokens: length of the prompt.
        seed: seed of the example.
        haystack: file of the text from which the prompt is taken.

    """

    def __init__(self, model_name: str, mode: str, tokens: int, seed: int, haystack: str) -> None:
        self.model, self.tokenizer = load_cached(ModelSource(model_name, dtype="float32"))
        task, task_mode = MODES[mode]
        text = Path(haystack).read_text(encoding="utf-8")
        example = make_example(task, self.tokenizer, tokens=tokens, seed=seed, haystack=text)
        prompt, gold = example.prompt(self.tokenizer), example.answer_ids(self.tokenizer)
        self.num_tokens, self._gold = prompt.input_ids.shape[1], gold
        # The last token of the prompt is fed later, because it predicts the first token of the answer.
        self.prefilled = prompt.document if task_mode == "agnostic" else prompt.input_ids[:, :-1]
        self._rest = torch.cat((prompt.input_ids[:, self.prefilled.shape[1] :], gold), dim=1)
        network: Any = self.model
        self.full = transformers.DynamicCache(config=self.model.config)
        with torch.no_grad():
            network(self.prefilled, past_key_values=self.full, logits_to_keep=1)
        self._reference = self._log_probs(copy.deepcopy(self.full))
        self.layers: list[Any] = [self.full.layers[index] for index in compressed_layers(self.model)]
        """The layers that a compressed cache compresses."""
        self.full_bytes = sum(2 * part.numel() for layer in self.layers for part in (layer.keys, layer.values))

    def _log_probs(self, cache: Any) -> Tensor:
        network: Any = self.model
        with torch.no_grad():
            logits = network(self._rest, past_key_values=cache, logits_to_keep=self._gold.shape[1] + 1).logits
        return logits[0, :-1].float().log_softmax(-1)

    def compare(self, cache: Any, num_bytes: float) -> dict[str, float]:
        """Return `kl`, `log_likelihood`, `top1` and `bytes` (relative to the full cache's) of a cache.

        The cache is changed.
        """
        values = teacher_forced_metrics(self._reference, self._log_probs(cache), self._gold[0])
        return {**values, "bytes": num_bytes / self.full_bytes}

    @property
    def shape(self) -> LayerShape:
        """Sizes of the layers in 16 bits."""
        _, heads, _, head_dim = self.layers[0].keys.shape
        query_dim = self.model.config.num_attention_heads * head_dim
        return LayerShape(heads, head_dim, head_dim, 2, 2 * query_dim, query_dim)

    def limited_cache(self, memory: float, evict: str, policy: str, *, repair: bool = False) -> CompressedCache:
        """Return an empty cache that keeps as many entries, with as many bits, as one with `memory=` in 16 bits.

        Args:
            memory: fraction of the full cache in 16 bits.
            evict: `"always"` leaves room for new tokens, `"prefill"` does not.
            policy: name of the policy.
            repair: whether entries are repaired.

        """
        settings = CompressedCache(self.model, policy, memory=memory, evict=evict, repair=repair).settings
        assert isinstance(settings.memory, MemoryBudget)
        num_tokens = self.prefilled.shape[1]
        plan = settings.memory.plan(self.shape, num_tokens, num_parts=1)
        budget = min(plan.num_entries, num_tokens)
        cache = CompressedCache(self.model, policy, budget, measure_capacity=False, repair=repair)
        storage = replace(cache.settings.storage, quantization=plan.quantization)
        for layer in cache.compressed_layers:
            layer.settings = replace(layer.settings, storage=storage)
        return cache

    def exact_cache(self, memory: float, policy: str, *, repair: bool = False) -> CompressedCache:
        """Return an empty cache whose entries are not quantized, as many as fit into a fraction of the full bytes."""
        shape, num_tokens = self.shape, self.prefilled.shape[1]
        # Positions, scores of policies that compare entries of all layers, and numbers that are added to the logits.
        index_bytes = 4 * (1 + get_policy(policy).allocation.is_global + repair)
        entry_bytes = (shape.key_dim + shape.value_dim) * shape.element_size + index_bytes
        budget = int(memory * shape.full_bytes(num_tokens) / (shape.num_heads * entry_bytes))
        return CompressedCache(self.model, policy, budget, measure_capacity=False, repair=repair)


def stored_bytes(cache: CompressedCache) -> int:
    """Return the bytes of the compressed layers, with at most 16 bits for each floating-point number."""
    storages = [layer.storage for layer in cache.compressed_layers]
    assert sum(part.nbytes for storage in storages for part in storage.buffers) == sum(s.nbytes for s in storages)
    return sum(
        sum(part.numel() * min(part.element_size(), 2 if part.is_floating_point() else 8) for part in storage.buffers)
        + storage.nbytes_index
        for storage in storages
    )
