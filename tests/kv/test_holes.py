"""Masked tokens after other tokens of a row: questions of unequal length, and turns of a batched chat."""

import pytest
import torch
from transformers import DynamicCache

from suffice.kv import CompressedCache
from tests.kv.tiny import build, left_padded, prompt


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def _extend(mask, new):
    return torch.cat((mask, new), dim=1)


def _read(model, cache, ids, mask):
    """Read the newest tokens with the positions that `generate` gives them; return the logits of the last one."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]


def _kept(cache, layer, row, head):
    positions = cache.kept_positions(layer)[row, head]
    return positions[positions >= 0].tolist()


OPTIONS = [
    {"budget": 1.0},
    {"budget": 20},
    {"policy": "capkv", "budget": 20},
    {"policy": "capkv", "budget": 20, "rerotate": True},
    {"policy": "h2o", "budget": 20, "evict": "always", "interval": 3},
    {"budget": 20, "evict": "always", "interval": 3},
    {"policy": "capkv", "budget": 20, "evict": "always", "interval": 3},
    {"budget": 20, "allocation": "marginal", "evict": "always", "interval": 3},
]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_questions_of_unequal_length_about_one_document_equal_single_questions(family, options):
    # Windows of the stock cache count masked tokens too, so they are long enough here to cover the whole text.
    model, tokens = build(family, **({"sliding_window": 200} if family == "gemma3" else {})), prompt(95)
    document, questions = tokens[:, :40], [tokens[:, 40:52], tokens[:, 52:59], tokens[:, 59:61]]
    steps = tokens[:, 70:80]
    cache = CompressedCache(model, **options)
    model(document, past_key_values=cache)
    singles = [cache.copy() for _ in questions]
    cache.batch_repeat_interleave(len(questions))
    batch = left_padded(questions)
    mask = _extend(torch.ones(3, 40, dtype=torch.long), batch["attention_mask"])
    got = [_read(model, cache, batch["input_ids"], mask)]
    for step in range(steps.shape[1]):
        mask = _extend(mask, torch.ones(3, 1, dtype=torch.long))
        got.append(_read(model, cache, steps[:, step : step + 1].expand(3, -1), mask))
    for row, (single, question) in enumerate(zip(singles, questions, strict=True)):
        expected = [model(question, past_key_values=single).logits[:, -1]]
        expected += [model(steps[:, step : step + 1], past_key_values=single).logits[:, -1] for step in range(10)]
        for layer in (layer.index for layer in cache.compressed_layers):
            for head in range(2):
                assert _kept(cache, layer, row, head) == _kept(single, layer, 0, head)
        for own, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(own[row], wanted[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("evict", ["prefill", "always"])
@pytest.mark.parametrize("policy", ["capkv-profile", "capkv", "snapkv", "h2o"])
def test_masked_tokens_inside_a_prompt_count_for_nothing(policy, evict):
    """The row with holes keeps what the same text keeps without the masked tokens."""
    model, tokens = build("llama"), prompt(80)
    options = {"policy": policy, "budget": 20, "evict": evict, "interval": 3}
    mask = torch.ones(1, 60, dtype=torch.long)
    mask[0, :5] = mask[0, 20:27] = mask[0, 40] = 0
    holes, dense = CompressedCache(model, **options), CompressedCache(model, **options)
    got = _read(model, holes, tokens[:, :60], mask)
    wanted = model(tokens[:, :60][mask.bool()][None], past_key_values=dense).logits[:, -1]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    for step in range(12):
        mask = _extend(mask, torch.ones(1, 1, dtype=torch.long))
        got = _read(model, holes, tokens[:, 60 + step : 61 + step], mask)
        wanted = model(tokens[:, 60 + step : 61 + step], past_key_values=dense).logits[:, -1]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    for layer in range(3):
        for head in range(2):
            assert _kept(holes, layer, 0, head) == _kept(dense, layer, 0, head)


def test_holes_equal_those_of_the_stock_cache_at_full_budget():
    model, tokens = build("llama"), prompt(90)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, 10:15] = mask[1, :20] = mask[1, 50:53] = 0
    caches = CompressedCache(model, budget=1.0), DynamicCache(config=model.config)
    ids = tokens[:, :60].expand(2, -1)
    got, wanted = (_read(model, cache, ids, mask) for cache in caches)
    torch.testing.assert_close(got, wanted)
    mask = _extend(mask, torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 1, 1]]))
    got, wanted = (_read(model, cache, tokens[:, 60:65].expand(2, -1), mask) for cache in caches)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("options", OPTIONS[:-1], ids=str)
def test_turns_of_a_batched_chat_mask_the_padding_of_rows_that_were_finished(options):
    """`generate` appends padding to finished rows, which the next turn masks."""
    model, tokens = build("llama"), prompt(95)
    documents, questions = [tokens[:, :40], tokens[:, 40:70]], [tokens[:, 70:77], tokens[:, 77:82]]
    answers, padding = tokens[:, 82:86], torch.full((1, 2), 1)
    cache = CompressedCache(model, **options)
    batch = left_padded(documents)
    mask = batch["attention_mask"]
    _read(model, cache, batch["input_ids"], mask)
    shorter = torch.cat((answers[:, :2], padding), dim=1)  # the second row stops after two tokens
    mask = _extend(mask, torch.ones(2, 4, dtype=torch.long))
    _read(model, cache, torch.cat((answers, shorter)), mask)
    mask[1, -2:] = 0
    batch = left_padded(questions)
    mask = _extend(mask, batch["attention_mask"])
    if options.get("evict") == "always":
        with pytest.raises(ValueError, match="attention_mask must mask earlier tokens only at the end of a row"):
            _read(model, cache, batch["input_ids"], mask)
        return
    got = _read(model, cache, batch["input_ids"], mask)
    for row in range(2):
        single = CompressedCache(model, **options)
        model(documents[row], past_key_values=single)
        model(answers[:, : 4 - 2 * row], past_key_values=single)
        expected = model(questions[row], past_key_values=single).logits[:, -1]
        torch.testing.assert_close(got[row], expected[0], rtol=1e-4, atol=1e-4)
        for head in range(2):
            assert _kept(cache, 1, row, head) == _kept(single, 1, 0, head)


@pytest.mark.parametrize("evict", ["prefill", "always"])
def test_masked_tokens_can_be_removed_again(evict):
    model, tokens = build("llama"), prompt(90)
    cache = CompressedCache(model, "capkv", 20, evict=evict)
    batch = left_padded([tokens[:, :40], tokens[:, 40:73]])
    mask = batch["attention_mask"]
    _read(model, cache, batch["input_ids"], mask)
    expected = cache.copy()
    new = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    longer = mask
    for step in range(4):
        longer = _extend(longer, new[:, step : step + 1])
        ids = tokens[:, 73 + step : 74 + step].expand(2, -1)
        _read(model, cache, ids, longer)
        if step < 2:
            _read(model, expected, ids, longer)
    cache.crop(-2)
    mask = _extend(longer[:, :-2], torch.ones(2, 5, dtype=torch.long))
    got, wanted = (_read(model, each, tokens[:, 80:85].expand(2, -1), mask) for each in (cache, expected))
    assert torch.equal(got, wanted)
    assert torch.equal(cache.kept_positions(1), expected.kept_positions(1))


def test_tokens_before_masked_ones_cannot_be_removed_after_an_eviction():
    model, tokens = build("llama"), prompt(90)
    cache, mask = CompressedCache(model, "capkv", 20, evict="always"), torch.ones(1, 44, dtype=torch.long)
    _read(model, cache, tokens[:, :40], mask[:, :40])
    mask[0, -1] = 0
    _read(model, cache, tokens[:, 40:44], mask)
    with pytest.raises(ValueError, match="crop must remove at most 0 tokens"):
        cache.crop(-2)


@pytest.mark.parametrize("policy", ["capkv", "snapkv", "tova", "h2o"])
def test_masked_generated_tokens_do_not_count_towards_the_interval(policy):
    model, tokens = build("llama"), prompt(90)
    batch, single = (CompressedCache(model, policy, 20, evict="always", interval=3) for _ in range(2))
    mask = torch.ones(2, 40, dtype=torch.long)
    _read(model, batch, tokens[:, :40].expand(2, -1), mask)
    model(tokens[:, :40], past_key_values=single)
    for step in range(10):
        is_token = int(step not in (0, 2, 3))
        mask, ids = _extend(mask, torch.tensor([[1], [is_token]])), tokens[:, 40 + step : 41 + step]
        _read(model, batch, ids.expand(2, -1), mask)
        if is_token:
            model(ids, past_key_values=single)
        assert _kept(batch, 1, 1, 0) == _kept(single, 1, 0, 0)


def test_queries_count_once_in_rows_that_evict_at_different_steps_with_masked_tokens():
    model, tokens = build("llama"), prompt(95)
    batch, single = (CompressedCache(model, "h2o", 12, evict="always", interval=4) for _ in range(2))
    mask = torch.ones(2, 40, dtype=torch.long)
    _read(model, batch, tokens[:, :40].expand(2, -1), mask)
    model(tokens[:, :40], past_key_values=single)
    for step in range(40):
        is_token = int(step % 7 not in (0, 3, 5))
        mask, ids = _extend(mask, torch.tensor([[1], [is_token]])), tokens[:, 40 + step : 41 + step]
        _read(model, batch, ids.expand(2, -1), mask)
        if is_token:
            model(ids, past_key_values=single)
        storages = batch.layers[1].storage, single.layers[1].storage
        received, expected = (
            storage.columns["attention_received"][row][storage.positions[row] >= 0]
            for storage, row in zip(storages, (1, 0), strict=True)
        )
        torch.testing.assert_close(received, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", ["tova", "snapkv"])
def test_masked_last_tokens_of_a_chunk_take_no_place_among_the_newest_queries(policy):
    model, tokens = build("llama"), prompt(90)
    batch, single = (CompressedCache(model, policy, 20, evict="always") for _ in range(2))
    mask = torch.ones(2, 40, dtype=torch.long)
    _read(model, batch, tokens[:, :40].expand(2, -1), mask)
    model(tokens[:, :40], past_key_values=single)
    mask = _extend(mask, torch.tensor([[1] * 8, [1] * 6 + [0] * 2]))
    _read(model, batch, tokens[:, 40:48].expand(2, -1), mask)
    model(tokens[:, 40:46], past_key_values=single)
    for head in range(2):
        assert _kept(batch, 1, 1, head) == _kept(single, 1, 0, head)


def test_masks_over_earlier_tokens_are_checked():
    model, ids = build("llama"), prompt(60)
    cache = CompressedCache(model, "capkv", 20)
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[0, :3] = 0
    _read(model, cache, ids[:, :40], mask)
    before = cache.copy()
    message = "attention_mask must mask earlier tokens only at the end of a row, .* 1 earlier tokens are newly masked"
    with pytest.raises(ValueError, match=message):
        _read(model, cache, ids[:, 40:45], _extend(mask.clone().index_fill_(1, torch.tensor(20), 0), mask[:, -5:]))
    with pytest.raises(ValueError, match="attention_mask must mask all tokens that it masked before, got 38"):
        _read(model, cache, ids[:, 40:45], _extend(mask.clone().index_fill_(1, torch.tensor(2), 1), mask[:, -5:]))
    full = _extend(mask, mask[:, -5:])
    assert torch.equal(*(_read(model, each, ids[:, 40:45], full) for each in (cache, before)))
