"""Every policy on every model family under every allocation, with the prompt at once and in chunks."""

from __future__ import annotations

import pytest
import torch

from suffice.kv import CompressedCache, allocations, policies
from suffice.kv.storage.ragged import RaggedStorage
from tests.kv.tiny import FAMILIES, left_padded, prompt, tiny

PARAMETERS = [
    pytest.mark.parametrize("allocation", list(allocations())),
    pytest.mark.parametrize("family", FAMILIES),
    pytest.mark.parametrize("name", list(policies(replay=False))),
]
# Budgets are always larger than the head dimension. With fewer entries, all have a leverage score of nearly 1, and
# rounding errors would decide which ones are kept.
LENGTHS, CHUNK, BUDGET = (41, 62, 61), 20, 18


def for_every_combination(test):
    """Parametrize a test by policy, family and allocation."""
    for mark in PARAMETERS:
        test = mark(test)
    return test


def feed(model, cache, ids, mask=None, ends=()):
    """Run the model over token ids, in chunks that end at the given columns; return the logits of the last token."""
    logits = None
    with torch.no_grad():
        for start, stop in zip((0, *ends), (*ends, ids.shape[1]), strict=True):
            chunk_mask = None if mask is None else mask[:, :stop]
            positions = None if mask is None else (chunk_mask.cumsum(-1) - 1).clamp_min(0)[:, start:stop]
            chunk = ids[:, start:stop]
            output = model(chunk, attention_mask=chunk_mask, position_ids=positions, past_key_values=cache)
            logits = output.logits[:, -1]
    return logits


def kept_by_head(cache, row):
    """Return the positions that a row keeps, by layer and head."""
    return [
        [head[head >= 0].tolist() for head in cache.kept_positions(layer.index)[row]]
        for layer in cache.compressed_layers
    ]


def check_budget(cache, name, budget, num_seen):
    """Check that rows keep exactly their budget, with heads of equal length unless the allocation is per head."""
    for row, seen in enumerate(num_seen):
        kept = kept_by_head(cache, row)
        lengths = [[len(head) for head in layer] for layer in kept]
        num_heads = sum(map(len, lengths))
        assert sum(map(sum, lengths)) == num_heads * (seen if name == "full" else min(budget, seen))
        if not cache.policy.allocation.per_head:
            assert all(len(set(layer)) == 1 for layer in lengths)
        assert all(seen - 1 in head for layer in kept for head in layer)


@for_every_combination
def test_batched_prompts_match_single_prompts(name, family, allocation):
    model = tiny(family)
    prompts = [prompt(n) for n in LENGTHS]
    inputs = left_padded(prompts)
    question = prompt(2, seed=5, rows=3)
    cache = CompressedCache(model, name, BUDGET, allocation=allocation)
    feed(model, cache, inputs["input_ids"], inputs["attention_mask"])
    check_budget(cache, name, BUDGET, LENGTHS)
    ids = torch.cat((inputs["input_ids"], question), 1)
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(question)), 1)
    kept_in_batch = kept_by_head(cache, 0)
    with torch.no_grad():
        for column in (-2, -1):
            stop = ids.shape[1] + column + 1
            positions = (mask[:, :stop].cumsum(-1) - 1)[:, -1:]
            logits = model(
                ids[:, stop - 1 : stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache
            ).logits[:, -1]
    for row, row_ids in enumerate(prompts):
        alone = CompressedCache(model, name, BUDGET, allocation=allocation)
        feed(model, alone, row_ids)
        if row == 0:
            assert kept_by_head(alone, 0) == kept_in_batch
        expected = feed(model, alone, question[row : row + 1], ends=(1,))
        torch.testing.assert_close(logits[row : row + 1], expected, atol=2e-4, rtol=1e-3)
    bytes_compressed = sum(layer.storage.nbytes for layer in cache.compressed_layers)
    bytes_sliding = sum(
        x.nbytes for layer in cache.layers if layer not in cache.compressed_layers for x in (layer.keys, layer.values)
    )
    assert cache.report().bytes_kept == bytes_compressed + bytes_sliding
    if name != "full":
        # Evicted entries are freed: buffers exceed the kept entries by spare slots of at most a sixteenth.
        for layer in cache.compressed_layers:
            allocated = sum(x.untyped_storage().nbytes() for x in layer.storage.buffers)
            assert layer.storage.nbytes <= allocated <= layer.storage.nbytes * 17 / 16


@for_every_combination
def test_batched_prompts_in_chunks_match_single_prompts(name, family, allocation):
    model = tiny(family)
    prompts = [prompt(n) for n in LENGTHS]
    inputs = left_padded(prompts)
    width = inputs["input_ids"].shape[1]
    ends = tuple(range(CHUNK, width, CHUNK))
    settings = {"allocation": allocation, "evict": "always", "interval": 3}
    cache = CompressedCache(model, name, BUDGET, **settings)
    logits = feed(model, cache, inputs["input_ids"], inputs["attention_mask"], ends)
    check_budget(cache, name, BUDGET, LENGTHS)
    for row, row_ids in enumerate(prompts):
        # The same chunk boundaries as columns of the row; those within its padding are left out.
        padding = width - row_ids.shape[1]
        alone = CompressedCache(model, name, BUDGET, **settings)
        expected = feed(model, alone, row_ids, ends=tuple(end - padding for end in ends if end > padding))
        assert kept_by_head(alone, 0) == kept_by_head(cache, row)
        torch.testing.assert_close(logits[row : row + 1], expected, atol=2e-4, rtol=1e-3)
    if cache.policy.allocation.per_head and name != "full":
        assert all(isinstance(layer.storage, RaggedStorage) for layer in cache.compressed_layers)


@PARAMETERS[0]
@PARAMETERS[1]
def test_quantized_heads_of_any_length_keep_the_entries_of_the_cache_without_bits(family, allocation):
    """One policy stands for all: a storage does not depend on the policy, and `test_conformance.py` runs all."""
    model, inputs = tiny(family), left_padded([prompt(85), prompt(72)])
    caches = [CompressedCache(model, "capkv", 60, allocation=allocation, bits=bits) for bits in (None, 8)]
    for cache in caches:
        feed(model, cache, inputs["input_ids"], inputs["attention_mask"])
        check_budget(cache, "capkv", 60, (85, 72))
    for row in range(2):
        assert kept_by_head(caches[0], row) == kept_by_head(caches[1], row)
    for one, other in zip(*(cache.compressed_layers for cache in caches), strict=True):
        for row in range(2):
            for head in range(2):
                exact, restored = (
                    [
                        x[row, head][entries.positions[row].expand(2, -1)[head] >= 0]
                        for x in (entries.keys, entries.values)
                    ]
                    for entries in (one.storage.entries, other.storage.entries)
                )
                for wanted, got in zip(exact, restored, strict=True):
                    assert got.shape == wanted.shape
                    assert (got - wanted).norm() <= 0.02 * wanted.norm()
    assert caches[1].report().bytes_kept < caches[0].report().bytes_kept
