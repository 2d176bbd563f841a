"""A budget that holds at all times: chunks of a prompt, generated tokens, texts longer than the model's window."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from suffice.kv import CompressedCache, Policy, get_policy, policies
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.registry import allocations
from suffice.kv.policy.weight_state import QueryMoments
from suffice.kv.policy.weights import ExpectedAttention, MeanQuery
from tests.kv.tiny import VOCABULARY, answer, build, prompt, tiny


def read(model, cache, ids, pieces):
    """Read ids in pieces of these lengths, the rest token by token; logits of each last token."""
    found, start = [], 0
    with torch.no_grad():
        while start < ids.shape[1]:
            stop = start + (pieces.pop(0) if pieces else 1)
            found.append(model(ids[:, start:stop], past_key_values=cache).logits[:, -1])
            start = stop
    return found


class Readings(TorchDispatchMode):
    """Counts how often Python reads a number from a tensor: on a GPU each reading waits for all that came before."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"evict": "always", "interval": 100}])
def test_a_step_of_decoding_reads_no_number_in_any_layer(options, padded):
    model = build("llama")
    ids = longer(40).expand(2, -1)
    mask = torch.ones_like(ids)
    mask[1, : 9 * padded] = 0

    def step(cache):
        with torch.no_grad():
            for stop in (40, 41, 42, 43):
                new = ids[:, :40] if stop == 40 else ids[:, :1]
                grown = torch.cat([mask, mask.new_ones(2, stop - 40)], dim=1)
                with Readings() as readings:
                    model(new, attention_mask=grown, past_key_values=cache)
        return readings.count

    plain = step(DynamicCache(config=model.config))
    # One for all layers, of the mask.
    assert step(CompressedCache(model, budget=0.5, **options)) - plain <= int(padded)


def longer(length):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(2, VOCABULARY, (1, length), generator=generator)


@pytest.mark.parametrize("allocation", list(allocations()))
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_output_is_the_full_caches_until_the_budget_is_exceeded(family, allocation):
    model, ids = tiny(family), longer(50)
    cache = CompressedCache(model, "capkv", 24, allocation=allocation, evict="always", interval=6)
    got, expected = read(model, cache, ids, [10]), read(model, DynamicCache(config=model.config), ids, [10])
    # 24 + 6 entries are held before the first eviction, after the 30th token.
    for own, full in zip(got[:21], expected[:21], strict=True):
        torch.testing.assert_close(own, full, atol=2e-5, rtol=1e-5)
    assert all(not torch.allclose(own, full, atol=1e-4) for own, full in zip(got[22:], expected[22:], strict=True))


@pytest.mark.parametrize("allocation", list(allocations()))
@pytest.mark.parametrize("start", [1, 40])
def test_budget_and_interval_are_never_exceeded(allocation, start):
    """From an empty cache, and after a prompt that was itself compressed."""
    model, ids = tiny("llama"), longer(70)
    cache = CompressedCache(model, "h2o", 16, allocation=allocation, evict="always", interval=5)
    read(model, cache, ids[:, :start], [start])
    held = []
    for token in range(start, 70):
        read(model, cache, ids[:, token : token + 1], [])
        held.append(sum(head.tokens_kept for head in cache.report().heads) / 6)
    assert max(held) == 16 + 4
    since = [kept - 16 for kept in held if kept >= 16]
    assert since == [n % 5 for n in range(int(since[0]), int(since[0]) + len(since))]


@pytest.mark.parametrize("name", [name for name in policies() if name != "full"])
def test_first_eviction_while_generating_chooses_as_one_prefill_would(name):
    """Nothing was evicted before, so that queries, keys and attention are those of the whole text at once."""
    model, ids = tiny("llama"), longer(48)
    whole = CompressedCache(model, name, 40)
    read(model, whole, ids, [48])
    piecewise = CompressedCache(model, name, 40, evict="always", interval=8)
    read(model, piecewise, ids, [])
    for layer in whole.compressed_layers:
        assert torch.equal(piecewise.kept_positions(layer.index), whole.kept_positions(layer.index))


@pytest.mark.parametrize("name", ["knorm", "streaming-llm", "random"])
@pytest.mark.parametrize("allocation", ["equal", "pyramid", "profile"])
def test_policies_that_score_a_token_for_itself_do_not_depend_on_chunks(name, allocation):
    model, ids = tiny("llama"), longer(64)
    found = []
    for pieces in ([64], [32, 32], [16] * 4, [5] * 12 + [4]):
        cache = CompressedCache(model, name, 20, allocation=allocation, evict="always", measure_capacity=False)
        read(model, cache, ids, list(pieces))
        found.append([cache.kept_positions(layer.index)[0].tolist() for layer in cache.compressed_layers][:1])
    # In the first layer: what later layers see depends on what earlier ones evicted.
    assert found[1:] == found[:-1]


def in_chunks(model, ids, cache):
    """Generate 8 tokens after a prompt that is read 16 tokens at a time."""
    options = {"prefill_chunk_size": 16, "max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)[:, ids.shape[1] :]


def chunks_well(model, ids):
    """Whether stock chunks give what stock gives at once: not with sliding windows in transformers 5.2."""
    stock = DynamicCache(config=model.config)
    return torch.equal(in_chunks(model, ids, stock)[0], answer(model, {"input_ids": ids}, None, new=8)[0])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("allocation", list(allocations()))
def test_generate_in_chunks_is_the_plain_loop(allocation, family):
    model, ids = tiny(family), longer(45)
    if not chunks_well(model, ids):
        pytest.skip("this transformers reads chunks otherwise, without Suffice too")
    settings = {"allocation": allocation, "evict": "always", "interval": 4}
    loop, own = (CompressedCache(model, "capkv", 16, **settings) for _ in range(2))
    read(model, loop, ids[:, :-1], [16, 16, 12])
    expected = answer(model, {"input_ids": ids}, loop, new=8)
    got = in_chunks(model, ids, own)
    # The token that starts the answer is read by itself here, with the last chunk there.
    held = [sum(h.tokens_kept for h in cache.report().heads) for cache in (loop, own)]
    heads = len(own.report().heads)
    assert got.shape == expected.shape
    assert held == [16 * heads + heads * (8 % 4), 16 * heads + heads * (7 % 4)]
    again = CompressedCache(model, "capkv", 16, **settings)
    logits = read(model, again, torch.cat((ids, got[:, :-1]), 1), [16, 16, 13])[2:]
    assert [int(x.argmax()) for x in logits] == got[0].tolist()


@pytest.mark.parametrize("allocation", ["equal", "adakv"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_compact_keys_are_those_of_their_new_places(family, allocation):
    """Undo the rotation at the places: the same keys as in a full cache, its rotation undone at the positions."""
    model, ids = tiny(family), longer(60)
    cache = CompressedCache(model, "keydiff", 16, allocation=allocation, evict="always", rerotate=True)
    stock = DynamicCache(config=model.config)
    # One piece: later layers of later pieces would see other hidden states than the full cache's.
    read(model, cache, ids, [60])
    read(model, stock, ids, [60])
    for layer in cache.compressed_layers:
        entries = layer.storage.entries
        for head in range(2):
            there = entries.positions[0, head] >= 0
            places = entries.places[0, head][there].long()
            assert places.tolist() == list(range(60 - len(places), 60))
            old = entries.positions[0, head][there]
            keys = entries.keys[:, head : head + 1][:, :, there]
            full = stock.layers[layer.index].keys[:, head : head + 1, old]
            own, other = (
                AttentionStats(x, x, x, rotary=layer._rotary, positions=at[None, None], query_positions=at[None])
                for x, at in ((keys, places), (full, old))
            )
            torch.testing.assert_close(own.unrotated_keys(), other.unrotated_keys(), atol=1e-5, rtol=1e-4)


def test_compact_texts_may_be_longer_than_the_window():
    """Distances stay within budget + chunk: the same output wherever in an endless text a stretch begins."""
    model = build("llama")
    cache = CompressedCache(model, "streaming-llm", 12, sinks=0, window=12, evict="always", rerotate=True)
    ids = longer(40).repeat(1, 20)  # 800 tokens, a window of 512
    logits = read(model, cache, ids, [40] * 20)
    torch.testing.assert_close(logits[-1], logits[-2], atol=1e-3, rtol=1e-3)
    assert cache.get_seq_length() == 800


def test_compact_is_refused_where_rotation_depends_on_length():
    model = build("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(ValueError, match=r"positions is 'compact'.*accepted: 'original'"):
        CompressedCache(model, rerotate=True)


def test_attention_adds_up_over_pieces():
    """H2O's sum over pieces is that over the whole text, as long as nothing is evicted."""
    model, ids = tiny("llama"), longer(44)
    found = []
    for pieces in ([44], [13, 9, 22]):
        cache = CompressedCache(model, "h2o", 100, evict="always")
        read(model, cache, ids, pieces)
        found.append([layer.storage.columns["received"] for layer in cache.compressed_layers])
    for whole, summed in zip(*found, strict=True):
        torch.testing.assert_close(summed, whole, atol=1e-4, rtol=1e-4)
        # Each of the 44 queries pays one unit of attention, wherever it goes.
        torch.testing.assert_close(whole.sum(-1), torch.full((1, 2), 44.0), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("allocation", list(allocations()))
def test_rows_evict_when_they_are_due(allocation):
    """While it generates, a row of a batch evicts when it would alone."""
    model, rows = tiny("llama"), [longer(20), longer(33)]
    ids, mask = torch.zeros(2, 33, dtype=torch.long), torch.zeros(2, 33, dtype=torch.long)
    for row, own in enumerate(rows):
        ids[row, 33 - own.shape[1] :], mask[row, 33 - own.shape[1] :] = own[0], 1
    settings = {"allocation": allocation, "evict": "always", "interval": 4}
    cache = CompressedCache(model, "capkv-window", 24, **settings)
    inputs = {"input_ids": ids, "attention_mask": mask}
    together = answer(model, inputs, cache, new=15)
    for row, own in enumerate(rows):
        alone = CompressedCache(model, "capkv-window", 24, **settings)
        assert torch.equal(answer(model, {"input_ids": own}, alone, new=15)[0], together[row])
        for layer in alone.compressed_layers:
            single, batched = alone.kept_positions(layer.index)[0], cache.kept_positions(layer.index)[row]
            assert [h[h >= 0].tolist() for h in single] == [h[h >= 0].tolist() for h in batched]


@pytest.mark.parametrize("half_life", [1.0, 5.0, 300.0])
def test_moments_are_those_of_the_whole_stream(half_life):
    torch.manual_seed(0)
    queries = torch.randn(2, 4, 30, 8)
    asked = torch.ones(2, 30, dtype=torch.bool)
    asked[1, :11] = False
    mean, square = torch.zeros(2, 4, 8), torch.zeros(2, 4, 8)
    for row in range(2):
        weights = torch.tensor([asked[row, i] * 0.5 ** ((29 - i) / half_life) for i in range(30)])
        weights = weights / weights.sum()
        for i in range(30):
            mean[row] += weights[i] * queries[row, :, i]
            square[row] += weights[i] * queries[row, :, i] ** 2
    joined = None
    for start, stop in ((0, 12), (12, 13), (13, 30)):
        joined = QueryMoments.of(queries[:, :, start:stop], asked[:, start:stop], half_life).after(joined, half_life)
    for moments in (QueryMoments.of(queries, asked, half_life), joined):
        torch.testing.assert_close(moments.mean, mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(moments.square, square, atol=1e-5, rtol=1e-4)


def test_weights_of_a_stream_follow_its_moments():
    """With a half-life far longer than the text, all queries count alike, as without one."""
    torch.manual_seed(0)
    stats = AttentionStats(torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8))
    plain = ExpectedAttention(future=0, pooled=True, diagonal=True, skip=0).log(stats)
    stream = ExpectedAttention(future=0, pooled=True, diagonal=True, skip=0, half_life=1e7).log(stats)
    torch.testing.assert_close(plain, stream, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        MeanQuery(recent=40).log(stats), MeanQuery(half_life=1e7).log(stats), atol=1e-4, rtol=1e-4
    )


def test_a_stream_with_a_half_life_keeps_the_budget():
    moving = Policy(weights=MeanQuery(half_life=20.0), name="moving")
    cache = CompressedCache(tiny("llama"), moving, 16, evict="always", interval=4)
    read(tiny("llama"), cache, longer(61), [20, 21])
    assert {head.tokens_kept for head in cache.report().heads} == {16}
    assert set(cache.compressed_layers[0].moments) == {20.0}
    assert float(cache.compressed_layers[0].moments[20.0].count) == 61


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"evict": "never"}, ValueError, "evict is 'never'; accepted: 'prefill', 'always'"),
        ({"positions": "new"}, ValueError, "positions is 'new'; accepted: 'original', 'compact'"),
        ({"interval": 0}, ValueError, "interval is 0; accepted: at least 1"),
        ({"interval": 2.5}, TypeError, "interval is 2.5"),
        ({"allocation": "pyramids"}, ValueError, "allocation is 'pyramids'.*Did you mean 'pyramid'"),
        ({"allocation": 3}, TypeError, "allocation is 3"),
    ],
)
def test_wrong_settings_are_named(settings, error, words):
    with pytest.raises(error, match=words):
        CompressedCache(tiny("llama"), **settings)


def test_a_chunk_too_small_for_what_is_protected_leaves_the_cache_as_it_was():
    model, ids = tiny("llama"), longer(60)
    cache = CompressedCache(model, "capkv", 0.5, sinks=4, window=12, evict="always")
    read(model, cache, ids[:, :40], [40])
    before = cache.report()
    small = CompressedCache(model, "capkv", 0.5, sinks=4, window=12, evict="always")
    with pytest.raises(ValueError, match="budget is 10 tokens here, smaller than what is protected"):
        read(model, small, ids[:, :20], [20])
    assert small.get_seq_length() == 0
    assert cache.report() == before
    read(model, cache, ids[:, 40:], [20])
    assert {head.tokens_kept for head in cache.report().heads} == {30}


def test_keys_twice_in_one_forward_are_refused():
    model = tiny("llama")
    cache = CompressedCache(model, "capkv", 12)
    read(model, cache, longer(30), [30])
    layer, before = cache.compressed_layers[1], cache.report()
    keys = torch.zeros(1, 2, 1, 12)
    layer.update(keys, keys)
    with pytest.raises(ValueError, match="got keys twice in one forward pass"):
        layer.update(keys, keys)
    layer.waiting = False
    assert cache.report() == before


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_assisted_decoding_works_or_is_refused_by_name(budget, lookup):
    """By a second model, and by looking up what followed the last tokens earlier in the prompt."""
    model, assistant = build("llama"), build("llama", seed=3)
    ids = torch.cat((prompt(20), prompt(20)), 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    cache = CompressedCache(model, "capkv", budget)
    options = {"prompt_lookup_num_tokens": 3} if lookup else {"assistant_model": assistant}
    plain = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 1}  # looking up asks for an end of text
    if budget == 1.0:
        expected = model.generate(**inputs, **plain)
        assert torch.equal(model.generate(**inputs, **plain, **options, past_key_values=cache), expected)
        return
    with pytest.raises(ValueError, match="assisted decoding"):
        model.generate(**inputs, **plain, **options, past_key_values=cache)


def test_shares_rank_as_scores_within_a_head():
    torch.manual_seed(1)
    stats = AttentionStats(torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8))
    for name in ("snapkv", "h2o", "keydiff", "capkv-window"):
        policy = get_policy(name).with_(weights=get_policy(name).weights)
        shares = policy.estimator.shares(policy.weights, policy.directions, stats)
        scores = policy.score(stats).clamp_min(-1e30)
        best = scores[..., 4:].argsort(-1, descending=True)[..., :10]
        ordered = shares[..., 4:].gather(-1, best)
        assert bool((ordered.diff(dim=-1) <= 1e-6).all())
