"""The replay of a prompt: a second pass, in which the model repeats the prompt while all its entries are in memory.

The first pass fills a cache that keeps all entries. In the second pass, copies of this cache read the instruction to
repeat the prompt and then a part of it, and the attention of these tokens gives the scores of the part's entries. The
copies are deleted after each part. At last, each layer passes all its entries with their scores to the same layer of
the caches that evict, and frees them.
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from suffice.kv.attention.call import AttentionCall
from suffice.kv.cache.cache import CompressedCache
from suffice.kv.cache.layer import CompressedLayer
from suffice.kv.cache.linear_states import copy_states, has_linear_states
from suffice.kv.cache.read_prompt import read_prompt
from suffice.kv.cache.recent_queries import RecentQueries
from suffice.kv.cache.replay_gradient import GradientRecorder, InputNorms
from suffice.kv.cache.replay_prompt import Instruction, ReplayInput, replay_inputs
from suffice.kv.cache.replay_scores import PartScores, PromptScores
from suffice.kv.cache.shared_prefill import PrefillResult, SharedPrefill
from suffice.kv.cache.stock_layer import copy_stock_layer
from suffice.kv.hf.layers import compressed_layers, find_decoder
from suffice.kv.hf.wrappers import unwrap_model
from suffice.kv.policy.weights.replay import GRADIENT, OUTPUT

# Number of tokens of the prompt that a pass repeats. Gradients are computed for shorter parts, as in KVgrad.
_PART_SIZE, _PART_SIZE_OF_GRADIENT = 2048, 512
# Number of newest queries of each layer that are kept for the eviction, if the policies need fewer: quantized keys are
# scaled by the size of the queries.
_MIN_QUERIES = 512


def replayed_prefill(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    caches: Sequence[CompressedCache],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    share_statistics: bool,
    chunk_size: int | None,
) -> PrefillResult:
    """Fill empty caches, of which some need a replay; see `suffice.kv.prefill`."""
    model = unwrap_model(model)
    replayed = [cache for cache in caches if cache.needs_replay]
    one_pass = [cache for cache in caches if not cache.needs_replay]
    kinds = frozenset().union(*(cache.policy.replay_kinds for cache in replayed))
    plan = _plan_replay(model, inputs, tokenizer, kinds)
    seconds = dict.fromkeys(map(id, caches), 0.0)
    # Tensors that are made in inference mode could not be used for gradients.
    with torch.inference_mode(False), torch.no_grad():
        recording = Recording(model, [cache.policy.weights.num_queries_needed for cache in replayed])
        shared = SharedPrefill([recording.cache, *one_pass], share_statistics)
        try:
            first_pass = shared if one_pass else recording.cache
            ids, mask = inputs["input_ids"], inputs.get("attention_mask")
            logits = read_prompt(model, ids, first_pass, mask=mask, chunk_size=chunk_size)
            for cache, spent in zip(one_pass, shared.seconds[1:], strict=True):
                seconds[id(cache)] = spent
            start = time.perf_counter()
            scores = recording.replay(plan, mask)
            replay_seconds = time.perf_counter() - start
            for number, cache in enumerate(replayed):
                start = time.perf_counter()
                recording.fill(cache, scores, inputs, free=number == len(replayed) - 1)
                seconds[id(cache)] = replay_seconds + time.perf_counter() - start
        except BaseException:
            for cache in caches:
                cache.reset()
            raise
    return PrefillResult(logits, [seconds[id(cache)] for cache in caches])


def _plan_replay(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    kinds: frozenset[str],
) -> dict[frozenset[str], list[ReplayInput]]:
    """Return the inputs of the passes of the replay, by the kinds of scores that they serve.

    Raises:
        ValueError: the model or the inputs cannot be replayed, or the replay does not fit into the context window.

    """
    ids = inputs.get("input_ids")
    if ids is None:
        raise ValueError("inputs must have input_ids, which a replay repeats, got none")
    others = sorted(inputs.keys() - {"input_ids", "attention_mask"})
    if others:
        raise ValueError(
            f"inputs must be input_ids and attention_mask for a policy with a replay, which repeats tokens only, got "
            f"{', '.join(others)} too"
        )
    if model.config.is_encoder_decoder:
        raise ValueError(
            "policy must be one that scores entries in one pass, because a replay supports decoders without an encoder "
            f"only, got {type(model).__name__}, an encoder-decoder model"
        )
    instruction = Instruction.from_tokenizer(tokenizer)
    groups = ((kinds - {GRADIENT}, _PART_SIZE), (kinds & {GRADIENT}, _PART_SIZE_OF_GRADIENT))
    return {own: replay_inputs(model, ids, instruction, size) for own, size in groups if own}


@dataclass
class _RecordedLayer:
    """What the first pass leaves for the eviction of a layer, besides its entries.

    Args:
        queries: the newest queries.
        call: an attention call of the layer, without its tensors.

    """

    queries: RecentQueries = field(default_factory=RecentQueries)
    call: AttentionCall | None = None


class Recording:
    """A cache with all entries of a prompt, and the newest queries of each layer.

    Args:
        model: the model.
        num_queries: for each policy that evicts later, the number of newest queries that it needs; None for all.

    """

    def __init__(self, model: PreTrainedModel, num_queries: Sequence[int | None]) -> None:
        self._model, self._decoder = model, find_decoder(model)
        self._modules = compressed_layers(model)
        self.cache = CompressedCache(model, "full", 1.0, measure_capacity=False)
        known = [needed for needed in num_queries if needed is not None]
        self._num_queries = None if len(known) < len(num_queries) else max(*known, _MIN_QUERIES)
        self._layers = {layer.index: _RecordedLayer() for layer in self.cache.compressed_layers}
        for layer in self.cache.compressed_layers:
            if layer.max_readable is not None:
                raise ValueError(
                    f"policy must score entries in one pass for {type(model).__name__}, all of whose layers have a "
                    "sliding window, got one that needs a replay: the repeated text cannot read the whole prompt"
                )
            layer.on_attention = self._record

    def _record(self, layer: CompressedLayer, call: AttentionCall) -> None:
        recorded = self._layers[layer.index]
        recorded.queries = recorded.queries.append(call.query, layer.new_positions, self._num_queries)
        nothing = call.key[:, :, :0]
        recorded.call = replace(call, query=nothing, key=nothing, value=nothing, mask=None, memo=None)

    # ---- Replay -----------------------------------------------------------------------------------------------------

    def replay(self, plan: dict[frozenset[str], list[ReplayInput]], mask: Tensor | None) -> dict[int, PromptScores]:
        """Have the model repeat the prompt, and return the scores of its entries by the index of the layer.

        Args:
            plan: the inputs of the passes, by the kinds of scores that they serve.
            mask: mask of the prompt, [batch, tokens]; None without padding.

        """
        scores = {index: PromptScores(self.cache.get_seq_length()) for index in self._layers}
        for kinds, parts in plan.items():
            for part in parts:
                run = self._replay_with_gradient if GRADIENT in kinds else self._replay_part
                run(part, kinds, mask, scores)
        return scores

    def _replay_part(
        self, part: ReplayInput, kinds: frozenset[str], mask: Tensor | None, scores: dict[int, PromptScores]
    ) -> None:
        with self._input_norms() if OUTPUT in kinds else contextlib.nullcontext() as norms:

            def score(layer: CompressedLayer, call: AttentionCall) -> None:
                factors = {} if norms is None else {OUTPUT: 1 / norms.of(call.module)}
                own = PartScores.from_layer(layer, call, part, scores[layer.index].num_tokens)
                own.add_to(scores[layer.index], kinds, factors)
                layer.free()

            self._run(part, mask, score)

    def _replay_with_gradient(
        self, part: ReplayInput, kinds: frozenset[str], mask: Tensor | None, scores: dict[int, PromptScores]
    ) -> None:
        parts: dict[int, PartScores] = {}
        modules = self._modules

        def keep(layer: CompressedLayer, call: AttentionCall) -> None:
            parts[layer.index] = PartScores.from_layer(layer, call, part, scores[layer.index].num_tokens)
            layer.free()

        with GradientRecorder(self._model, list(modules.values())) as recorder:
            self._run(part, mask, keep)
            repeated = _repeated_mask(part, mask)
            gradients = recorder.gradients(None if repeated is None else repeated.bool())
        for index, own in parts.items():
            norms = torch.linalg.vector_norm(gradients[modules[index]], dim=-1, dtype=torch.float32)
            own.add_to(scores[index], kinds, {GRADIENT: norms})

    def _input_norms(self) -> InputNorms:
        return InputNorms(list(self._modules.values()))

    def _run(
        self, part: ReplayInput, mask: Tensor | None, on_attention: Callable[[CompressedLayer, AttentionCall], None]
    ) -> None:
        """Feed the tokens of a part to a copy of the cache."""
        copied = self.cache.copy()
        for layer in copied.compressed_layers:
            layer.on_attention = on_attention
        options: dict[str, Any] = {}
        if mask is not None:
            repeated = _repeated_mask(part, mask)
            assert repeated is not None
            options["attention_mask"] = torch.cat((mask, repeated), dim=1)
            if "position_ids" in inspect.signature(self._model.forward).parameters:
                # Masked tokens of a part take no position, so that all rows have the same distances.
                options["position_ids"] = mask.shape[1] + (repeated.cumsum(-1) - 1).clamp_min(0)
        network: Any = self._model
        network(part.ids, past_key_values=copied, use_cache=True, logits_to_keep=1, **options)

    # ---- Eviction ---------------------------------------------------------------------------------------------------

    def fill(
        self, cache: CompressedCache, scores: dict[int, PromptScores], inputs: Mapping[str, Tensor], *, free: bool
    ) -> None:
        """Pass all entries with their scores to a cache, which evicts.

        Args:
            cache: an empty cache.
            scores: result of `replay`.
            inputs: inputs of the model.
            free: free the entries of each layer as soon as the cache has evicted in it.

        """
        budget = cache.compressed_layers[0].global_budget
        if cache.settings.repair and budget is not None:
            # Entries can only be repaired when it is known which ones all layers keep in the end.
            self._fill_compressed(cache, scores, inputs, free=False)
            with budget.decided():
                cache.reset()
                self._fill_compressed(cache, scores, inputs, free=free)
        else:
            self._fill_compressed(cache, scores, inputs, free=free)
        for index, (source, target) in enumerate(zip(self.cache.layers, cache.layers, strict=True)):
            if has_linear_states(source):
                copy_states([source], target)
            elif not isinstance(source, CompressedLayer):
                cache.layers[index] = source if free else copy_stock_layer(source)

    def _fill_compressed(
        self, cache: CompressedCache, scores: dict[int, PromptScores], inputs: Mapping[str, Tensor], *, free: bool
    ) -> None:
        with _forward_pass(cache, self._decoder, inputs):
            for source, target in zip(self.cache.compressed_layers, cache.compressed_layers, strict=True):
                assert source.storage is not None
                entries, recorded = source.storage.entries, self._layers[source.index]
                assert recorded.call is not None
                queries, _ = recorded.queries.join()
                is_token = entries.positions[:, :1] >= 0
                call = replace(
                    recorded.call,
                    query=queries,
                    key=entries.keys,
                    value=entries.values,
                    mask=None if bool(is_token.all()) else is_token[:, :, None],
                    replay_scores=scores[source.index].by_kind(),
                )
                target.update(entries.keys, entries.values)
                target.pre_attention(call)
                target.post_attention(call, None)
                if free:
                    source.free()


def _repeated_mask(part: ReplayInput, mask: Tensor | None) -> Tensor | None:
    """Return the mask of the tokens of a pass, [batch, tokens]; None without padding."""
    if mask is None:
        return None
    return torch.cat((mask.new_ones(len(mask), part.num_instruction), mask[:, part.start : part.end]), dim=1)


@contextlib.contextmanager
def _forward_pass(cache: CompressedCache, decoder: nn.Module, inputs: Mapping[str, Tensor]) -> Generator[None]:
    """Open a forward pass of a cache, and close it."""
    cache.begin_pass(decoder, inputs)
    failed = True
    try:
        cache.will_store()
        yield
        failed = False
    finally:
        cache.end_pass(failed=failed)
