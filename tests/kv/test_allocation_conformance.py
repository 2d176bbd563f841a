"""What every policy must do on every family under every allocation, with a prompt at once and in chunks."""

from __future__ import annotations

import pytest
import torch

from suffice.kv import CompressedCache, policies
from suffice.kv.policy.registry import allocations
from suffice.kv.storage.ragged import RaggedStorage
from tests.kv.tiny import FAMILIES, left_padded, prompt, tiny

every = [
    pytest.mark.parametrize("allocation", list(allocations())),
    pytest.mark.parametrize("family", FAMILIES),
    pytest.mark.parametrize("name", list(policies())),
]
# More entries than dimensions at every time: below, all have a leverage of nearly 1, and rounding would choose.
LENGTHS, CHUNK, BUDGET = (41, 62, 61), 20, 18


def conformance(test):
    for mark in every:
        test = mark(test)
    return test


def feed(model, cache, ids, mask=None, at=()):
    """Read token ids in pieces that end at the given columns; logits of the last token."""
    logits = None
    with torch.no_grad():
        for start, stop in zip((0, *at), (*at, ids.shape[1]), strict=True):
            own = None if mask is None else mask[:, :stop]
            positions = None if mask is None else (mask[:, :stop].cumsum(-1) - 1).clamp_min(0)[:, start:stop]
            out = model(ids[:, start:stop], attention_mask=own, position_ids=positions, past_key_values=cache)
            logits = out.logits[:, -1]
    return logits


def kept(cache, row):
    """Positions that a row keeps, by layer and head."""
    return [
        [head[head >= 0].tolist() for head in cache.kept_positions(layer.index)[row]]
        for layer in cache.compressed_layers
    ]


def check_budget(cache, name, budget, seen, later=0):
    """The whole budget, no more; heads of one length where the allocation says so; later tokens on top."""
    for row, own in enumerate(seen):
        lengths = [[len(head) - later for head in layer] for layer in kept(cache, row)]
        total = sum(map(sum, lengths))
        heads = sum(map(len, lengths))
        assert total == heads * (own if name == "full" else min(budget, own))
        if not cache.policy.allocation.ragged:
            assert all(len(set(layer)) == 1 for layer in lengths)
        assert all(own - 1 in head for layer in kept(cache, row) for head in layer)


@conformance
def test_prompt_at_once(name, family, allocation):
    model = tiny(family)
    prompts = [prompt(n) for n in LENGTHS]
    inputs = left_padded(prompts)
    question = prompt(2, seed=5, rows=3)
    cache = CompressedCache(model, name, BUDGET, allocation=allocation)
    feed(model, cache, inputs["input_ids"], inputs["attention_mask"])
    check_budget(cache, name, BUDGET, LENGTHS)
    ids = torch.cat((inputs["input_ids"], question), 1)
    mask = torch.cat((inputs["attention_mask"], torch.ones_like(question)), 1)
    first = kept(cache, 0)
    with torch.no_grad():
        for column in (-2, -1):
            stop = ids.shape[1] + column + 1
            positions = (mask[:, :stop].cumsum(-1) - 1)[:, -1:]
            logits = model(
                ids[:, stop - 1 : stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache
            ).logits[:, -1]
    for row, own in enumerate(prompts):
        alone = CompressedCache(model, name, BUDGET, allocation=allocation)
        feed(model, alone, own)
        if row == 0:
            assert kept(alone, 0) == first
        expected = feed(model, alone, torch.cat((own, question[row : row + 1]), 1)[:, own.shape[1] :], at=(1,))
        torch.testing.assert_close(logits[row : row + 1], expected, atol=2e-4, rtol=1e-3)
    report = cache.report()
    held = sum(layer.storage.nbytes for layer in cache.compressed_layers)
    slid = sum(
        x.nbytes for layer in cache.layers if layer not in cache.compressed_layers for x in (layer.keys, layer.values)
    )
    assert report.bytes_kept == held + slid
    if name != "full":
        # Nothing larger stands behind what is kept than room for a sixteenth more.
        for layer in cache.compressed_layers:
            behind = sum(x.untyped_storage().nbytes() for x in layer.storage.tensors)
            assert layer.storage.nbytes <= behind <= layer.storage.nbytes * 17 / 16


@conformance
def test_prompt_in_chunks(name, family, allocation):
    model = tiny(family)
    prompts = [prompt(n) for n in LENGTHS]
    inputs = left_padded(prompts)
    width = inputs["input_ids"].shape[1]
    ends = tuple(range(CHUNK, width, CHUNK))
    settings = {"allocation": allocation, "evict": "always", "interval": 3}
    cache = CompressedCache(model, name, BUDGET, **settings)
    logits = feed(model, cache, inputs["input_ids"], inputs["attention_mask"], ends)
    check_budget(cache, name, BUDGET, LENGTHS)
    for row, own in enumerate(prompts):
        # The same boundaries, seen from the row; those in its padding fall away.
        start = width - own.shape[1]
        alone = CompressedCache(model, name, BUDGET, **settings)
        expected = feed(model, alone, own, at=tuple(end - start for end in ends if end > start))
        assert kept(alone, 0) == kept(cache, row)
        torch.testing.assert_close(logits[row : row + 1], expected, atol=2e-4, rtol=1e-3)
    if cache.policy.allocation.ragged and name != "full":
        assert all(isinstance(layer.storage, RaggedStorage) for layer in cache.compressed_layers)
