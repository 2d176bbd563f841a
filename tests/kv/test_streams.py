"""Evictions in chunks and while tokens are generated: short chunks, small budgets, rows of unequal length."""

import warnings

import pytest
import torch

from suffice.kv import DEFAULT_POLICY, CompressedCache, policies
from suffice.kv.cache.read_prompt import read_prompt
from suffice.kv.eval.generation import fill_cache
from tests.kv.tiny import build, left_padded, prompt, tiny

NAMES = [name for name in policies(replay=False) if name != "full"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def _long_prompt(length, seed=0):
    return torch.cat([prompt(90, seed=seed + part) for part in range(-(-length // 90))], dim=1)[:, :length]


def _read(cache, model, ids, chunk_size):
    for chunk in ids.split(chunk_size, dim=1):
        model(chunk, past_key_values=cache)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk_size", [4, 16])
def test_chunks_may_be_shorter_than_what_a_policy_looks_back_on(name, chunk_size):
    """Some remembered queries are then older than every entry that a head has kept, and read nothing."""
    model, ids = tiny("llama"), _long_prompt(170)
    cache = CompressedCache(model, name, 0.1, evict="always", interval=3)
    _read(cache, model, ids, chunk_size)
    assert cache.get_seq_length() == 170
    assert cache.report().tokens_kept <= (17 + 3)


@pytest.mark.parametrize("chunk_size", [None, 7, 30])
def test_a_padded_prompt_in_chunks_gives_the_logits_of_single_rows(chunk_size):
    """The mask covers the tokens that the cache already holds, too."""
    model, prompts = tiny("llama"), [prompt(60), prompt(41, seed=1)]
    batch, cache = left_padded(prompts), CompressedCache(model, "full", 1.0)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    fill_cache(model, ids[:, :20], cache, chunk_size, attention_mask=mask[:, :20])
    logits = read_prompt(model, ids[:, 20:], cache, mask=mask, chunk_size=chunk_size)
    assert cache.get_seq_length() == 60
    for row, alone in enumerate(prompts):
        torch.testing.assert_close(logits[row], model(alone).logits[0, -1], atol=1e-4, rtol=1e-4)
    assert read_prompt(model, ids[:, :0], cache).numel() == 0


@pytest.mark.parametrize("name", ["capkv-window", "snapkv", "capkv", "criticalkv", "h2o"])
def test_queries_that_read_no_entry_do_not_change_which_entries_are_kept(name):
    """The kept entries equal those that the queries that read an entry select by themselves."""
    model, ids = tiny("llama"), _long_prompt(60)
    cache = CompressedCache(model, name, 12, evict="always")
    _read(cache, model, ids, 8)
    for layer in cache.compressed_layers:
        positions = layer.storage.positions
        assert positions.shape[-1] == 12
        assert int(positions[..., -1].min()) == 59


@pytest.mark.parametrize("name", ["capkv-profile", "capkv", "snapkv", "h2o", "tova", "streaming-llm"])
@pytest.mark.parametrize("budget", [1, 4])
@pytest.mark.parametrize("evict", ["prefill", "always"])
def test_budgets_of_few_tokens_are_kept(name, budget, evict):
    model = tiny("llama")
    cache = CompressedCache(model, name, budget, evict=evict)
    model(prompt(40), past_key_values=cache)
    assert cache.report().tokens_kept == budget
    _read(cache, model, prompt(12, seed=1), 6)
    assert cache.report().tokens_kept == (budget if evict == "always" else budget + 12)


@pytest.mark.parametrize(("name", "budget"), [*((name, 0.3) for name in NAMES), (DEFAULT_POLICY, 20), ("capkv", 20)])
def test_rows_of_a_padded_stream_equal_single_rows(name, budget):
    """Rows of unequal length evict at different steps, and keep what they would keep alone."""
    model = build("llama", vocab_size=300)
    # No token occurs twice in a row, because equal keys would tie.
    tokens = torch.randperm(290, generator=torch.Generator().manual_seed(0))[None] + 5
    steps = tokens[:, :25]
    prompts = [tokens[:, 50:185], tokens[:, 60:141], tokens[:, 170:270]]
    options = {"policy": name, "budget": budget, "evict": "always", "interval": 7}
    batch = left_padded(prompts)
    together = CompressedCache(model, **options)
    mask = batch["attention_mask"]
    model(**batch, position_ids=(mask.cumsum(1) - 1).clamp_min(0), past_key_values=together)
    alone = []
    for row in prompts:
        cache = CompressedCache(model, **options)
        model(row, past_key_values=cache)
        alone.append(cache)
    for step in range(steps.shape[1]):
        token = steps[:, step : step + 1]
        mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), dim=1)
        ids, positions = token.expand(3, -1), mask.sum(1, keepdim=True) - 1
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=together)
        for cache in alone:
            model(token, past_key_values=cache)
    for row, cache in enumerate(alone):
        for layer in range(3):
            for head in range(2):
                kept, wanted = (c.kept_positions(layer)[r, head] for c, r in ((together, row), (cache, 0)))
                assert kept[kept >= 0].tolist() == wanted[wanted >= 0].tolist(), (row, layer, head)


def test_a_prompt_in_chunks_is_warned_about_unless_every_chunk_is_evicted():
    model, ids = build("llama"), prompt(92)
    options = {"prefill_chunk_size": 16, "max_new_tokens": 4, "do_sample": False}
    cache = CompressedCache(model, budget=24)
    with pytest.warns(UserWarning, match="the prompt seems to be read in chunks.*evict='always'"):
        model.generate(ids, past_key_values=cache, **options)
    for quiet in ({"evict": "always"}, {"budget": 1.0}, {"policy": "full"}):
        cache = CompressedCache(model, **{"budget": 24, **quiet})
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.generate(ids, past_key_values=cache, **options)
    question = CompressedCache(model, budget=24)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(ids, past_key_values=question)
        model(prompt(9), past_key_values=question)
        model(prompt(9), past_key_values=question)
