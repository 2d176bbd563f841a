"""Caches with `evict="always"`: prompts read in chunks, generated tokens, texts longer than the context window."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from suffice.kv import CompressedCache, Policy, get_policy, policies
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.layer_context import EntryPositions
from suffice.kv.policy.registry import allocations
from suffice.kv.policy.weight_state import QueryMoments
from suffice.kv.policy.weights import ExpectedAttention, MeanQuery
from tests.kv.tiny import VOCABULARY, answer, build, prompt, tiny


def read(model, cache, ids, chunks):
    """Read ids in chunks of these lengths and the rest token by token; return the logits of each last token."""
    logits, start = [], 0
    with torch.no_grad():
        while start < ids.shape[1]:
            stop = start + (chunks.pop(0) if chunks else 1)
            logits.append(model(ids[:, start:stop], past_key_values=cache).logits[:, -1])
            start = stop
    return logits


class ScalarReads(TorchDispatchMode):
    """Counts how often Python reads a number from a tensor; on a GPU, each read waits for all queued work."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"evict": "always", "interval": 100}])
def test_decoding_step_reads_no_number_from_the_device(options, padded):
    model = build("llama")
    ids = long_prompt(40).expand(2, -1)
    mask = torch.ones_like(ids)
    mask[1, : 9 * padded] = 0

    def step(cache):
        with torch.no_grad():
            for stop in (40, 41, 42, 43):
                new = ids[:, :40] if stop == 40 else ids[:, :1]
                grown = torch.cat([mask, mask.new_ones(2, stop - 40)], dim=1)
                with ScalarReads() as reads:
                    model(new, attention_mask=grown, past_key_values=cache)
        return reads.count

    stock = step(DynamicCache(config=model.config))
    # The mask is read once for all layers.
    assert step(CompressedCache(model, budget=0.5, **options)) - stock <= int(padded)


def long_prompt(length):
    """Return random token ids, [1, length], in which tokens may repeat, unlike in `prompt`."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(2, VOCABULARY, (1, length), generator=generator)


@pytest.mark.parametrize("allocation", list(allocations()))
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_output_equals_that_of_the_full_cache_until_the_first_eviction(family, allocation):
    model, ids = tiny(family), long_prompt(50)
    cache = CompressedCache(model, "capkv", 24, allocation=allocation, evict="always", interval=6)
    got, expected = read(model, cache, ids, [10]), read(model, DynamicCache(config=model.config), ids, [10])
    # The first eviction comes after the 30th token, when the cache holds 24 + 6 entries.
    for own, full in zip(got[:21], expected[:21], strict=True):
        torch.testing.assert_close(own, full, atol=2e-5, rtol=1e-5)
    assert all(not torch.allclose(own, full, atol=1e-4) for own, full in zip(got[22:], expected[22:], strict=True))


@pytest.mark.parametrize("allocation", list(allocations()))
@pytest.mark.parametrize("start", [1, 40])
def test_budget_and_interval_are_never_exceeded(allocation, start):
    """The cache starts empty, or with a prompt that is compressed itself."""
    model, ids = tiny("llama"), long_prompt(70)
    cache = CompressedCache(model, "h2o", 16, allocation=allocation, evict="always", interval=5)
    read(model, cache, ids[:, :start], [start])
    kept = []
    for token in range(start, 70):
        read(model, cache, ids[:, token : token + 1], [])
        kept.append(sum(head.tokens_kept for head in cache.report().heads) / 6)
    assert max(kept) == 16 + 4
    above_budget = [count - 16 for count in kept if count >= 16]
    first = int(above_budget[0])
    assert above_budget == [n % 5 for n in range(first, first + len(above_budget))]


@pytest.mark.parametrize("name", [name for name in policies(replay=False) if name != "full"])
def test_first_eviction_while_generating_keeps_the_entries_of_one_prefill(name):
    """Before the first eviction, queries, keys and attention equal those of the whole text in one prefill."""
    model, ids = tiny("llama"), long_prompt(48)
    whole = CompressedCache(model, name, 40)
    read(model, whole, ids, [48])
    piecewise = CompressedCache(model, name, 40, evict="always", interval=8)
    read(model, piecewise, ids, [])
    for layer in whole.compressed_layers:
        assert torch.equal(piecewise.kept_positions(layer.index), whole.kept_positions(layer.index))


@pytest.mark.parametrize("name", ["knorm", "streaming-llm", "random"])
@pytest.mark.parametrize("allocation", ["equal", "pyramid", "profile"])
def test_chunks_do_not_matter_to_policies_that_score_each_token_alone(name, allocation):
    model, ids = tiny("llama"), long_prompt(64)
    found = []
    for chunks in ([64], [32, 32], [16] * 4, [5] * 12 + [4]):
        cache = CompressedCache(model, name, 20, allocation=allocation, evict="always", measure_capacity=False)
        read(model, cache, ids, list(chunks))
        found.append([cache.kept_positions(layer.index)[0].tolist() for layer in cache.compressed_layers][:1])
    # Only the first layer is compared: the input of later layers depends on what earlier layers evicted.
    assert found[1:] == found[:-1]


def generate_in_chunks(model, ids, cache):
    """Return 8 generated tokens after a prompt that is read in chunks of 16 tokens."""
    options = {"prefill_chunk_size": 16, "max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)[:, ids.shape[1] :]


def stock_supports_chunks(model, ids):
    """Whether chunks do not change what the stock cache gives; transformers 5.2 fails with sliding windows."""
    stock = DynamicCache(config=model.config)
    return torch.equal(generate_in_chunks(model, ids, stock)[0], answer(model, {"input_ids": ids}, None, new=8)[0])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("allocation", list(allocations()))
def test_generate_in_chunks_equals_a_plain_loop(allocation, family):
    model, ids = tiny(family), long_prompt(45)
    if not stock_supports_chunks(model, ids):
        pytest.skip("chunks change the output of this transformers without Suffice too")
    settings = {"allocation": allocation, "evict": "always", "interval": 4}
    loop, own = (CompressedCache(model, "capkv", 16, **settings) for _ in range(2))
    read(model, loop, ids[:, :-1], [16, 16, 12])
    expected = answer(model, {"input_ids": ids}, loop, new=8)
    got = generate_in_chunks(model, ids, own)
    # The loop reads the last prompt token alone, `generate` reads it with the last chunk.
    kept = [sum(head.tokens_kept for head in cache.report().heads) for cache in (loop, own)]
    heads = len(own.report().heads)
    assert got.shape == expected.shape
    assert kept == [16 * heads + heads * (8 % 4), 16 * heads + heads * (7 % 4)]
    again = CompressedCache(model, "capkv", 16, **settings)
    logits = read(model, again, torch.cat((ids, got[:, :-1]), 1), [16, 16, 13])[2:]
    assert [int(x.argmax()) for x in logits] == got[0].tolist()


@pytest.mark.parametrize("allocation", ["equal", "adakv"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
def test_rerotated_keys_have_the_rotation_of_their_new_positions(family, allocation):
    """Without their rotations, rerotated keys equal those of a full cache."""
    model, ids = tiny(family), long_prompt(60)
    cache = CompressedCache(model, "keydiff", 16, allocation=allocation, evict="always", rerotate=True)
    stock = DynamicCache(config=model.config)
    # In one chunk, because evictions change the hidden states of later chunks.
    read(model, cache, ids, [60])
    read(model, stock, ids, [60])
    for layer in cache.compressed_layers:
        entries = layer.storage.entries
        for head in range(2):
            is_entry = entries.positions[0, head] >= 0
            new = entries.rope_positions[0, head][is_entry].long()
            assert new.tolist() == list(range(60 - len(new), 60))
            old = entries.positions[0, head][is_entry]
            keys = entries.keys[:, head : head + 1][:, :, is_entry]
            full = stock.layers[layer.index].keys[:, head : head + 1, old]
            own, other = (
                AttentionStats(
                    x, x, x, rotary=layer.rotary, positions=EntryPositions(entries=at[None, None], queries=at[None])
                )
                for x, at in ((keys, new), (full, old))
            )
            torch.testing.assert_close(own.unrotated_keys(), other.unrotated_keys(), atol=1e-5, rtol=1e-4)


def test_rerotated_text_may_be_longer_than_the_context_window():
    """Distances stay below budget + chunk, so a repeated chunk gives the same output wherever it stands."""
    model = build("llama")
    cache = CompressedCache(model, "streaming-llm", 12, sinks=0, window=12, evict="always", rerotate=True)
    ids = long_prompt(40).repeat(1, 20)  # 800 tokens; the context window has 512
    logits = read(model, cache, ids, [40] * 20)
    torch.testing.assert_close(logits[-1], logits[-2], atol=1e-3, rtol=1e-3)
    assert cache.get_seq_length() == 800


def test_rerotation_is_rejected_if_frequencies_depend_on_the_length():
    model = build("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    message = "rerotate must be False for a model whose rotary embedding changes its frequencies .*, got True"
    with pytest.raises(ValueError, match=message):
        CompressedCache(model, rerotate=True)


def test_attention_received_adds_up_over_chunks():
    """Without evictions, H2O's sum over chunks equals that over the whole text."""
    model, ids = tiny("llama"), long_prompt(44)
    found = []
    for chunks in ([44], [13, 9, 22]):
        cache = CompressedCache(model, "h2o", 100, evict="always")
        read(model, cache, ids, chunks)
        found.append([layer.storage.columns["attention_received"] for layer in cache.compressed_layers])
    for whole, summed in zip(*found, strict=True):
        torch.testing.assert_close(summed, whole, atol=1e-4, rtol=1e-4)
        # The attention weights of each of the 44 queries sum to 1.
        torch.testing.assert_close(whole.sum(-1), torch.full((1, 2), 44.0), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("allocation", list(allocations()))
def test_rows_evict_at_the_same_tokens_as_alone(allocation):
    model, rows = tiny("llama"), [long_prompt(20), long_prompt(33)]
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
def test_query_moments_of_chunks_combine_to_those_of_all_queries(half_life):
    torch.manual_seed(0)
    queries = torch.randn(2, 4, 30, 8)
    valid = torch.ones(2, 30, dtype=torch.bool)
    valid[1, :11] = False
    mean, square = torch.zeros(2, 4, 8), torch.zeros(2, 4, 8)
    for row in range(2):
        weights = torch.tensor([valid[row, i] * 0.5 ** ((29 - i) / half_life) for i in range(30)])
        weights = weights / weights.sum()
        for i in range(30):
            mean[row] += weights[i] * queries[row, :, i]
            square[row] += weights[i] * queries[row, :, i] ** 2
    combined = None
    for start, stop in ((0, 12), (12, 13), (13, 30)):
        chunk = QueryMoments.from_queries(queries[:, :, start:stop], valid[:, start:stop], half_life)
        combined = chunk.combine_with_earlier(combined, half_life)
    for moments in (QueryMoments.from_queries(queries, valid, half_life), combined):
        torch.testing.assert_close(moments.mean, mean, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(moments.square, square, atol=1e-5, rtol=1e-4)


def test_half_life_far_longer_than_the_text_equals_no_half_life():
    torch.manual_seed(0)
    stats = AttentionStats(torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8))
    without = ExpectedAttention(future=0, pooled=True, diagonal=True, skip=0).log_weights(stats)
    with_half_life = ExpectedAttention(future=0, pooled=True, diagonal=True, skip=0, half_life=1e7).log_weights(stats)
    torch.testing.assert_close(without, with_half_life, atol=1e-4, rtol=1e-4)
    without, with_half_life = (w.log_weights(stats) for w in (MeanQuery(recent=40), MeanQuery(half_life=1e7)))
    torch.testing.assert_close(without, with_half_life, atol=1e-4, rtol=1e-4)


def test_cache_with_a_half_life_keeps_the_budget():
    moving = Policy(weights=MeanQuery(half_life=20.0), name="moving")
    cache = CompressedCache(tiny("llama"), moving, 16, evict="always", interval=4)
    read(tiny("llama"), cache, long_prompt(61), [20, 21])
    assert {head.tokens_kept for head in cache.report().heads} == {16}
    moments = cache.compressed_layers[0].state.weight_state.query_moments
    assert set(moments) == {20.0}
    assert float(moments[20.0].count) == 61


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"evict": "never"}, ValueError, "evict must be 'prefill', 'always' or None, got 'never'"),
        ({"rerotate": "compact"}, TypeError, "rerotate must be True or False, got 'compact'"),
        ({"interval": 0}, ValueError, "interval must be at least 1, got 0"),
        ({"interval": 2.5}, TypeError, "interval must be an int, .*, got 2.5"),
        (
            {"allocation": "pyramids"},
            ValueError,
            "allocation must be one of .*, got 'pyramids'. Did you mean 'pyramid'",
        ),
        ({"allocation": 3}, TypeError, "allocation must be an instance of Allocation or one of .*, got 3"),
    ],
)
def test_invalid_settings_are_rejected(settings, error, message):
    with pytest.raises(error, match=message):
        CompressedCache(tiny("llama"), **settings)


def test_chunk_without_room_for_the_protected_entries_leaves_the_cache_unchanged():
    model, ids = tiny("llama"), long_prompt(60)
    cache = CompressedCache(model, "capkv", 0.5, sinks=4, window=12, evict="always")
    read(model, cache, ids[:, :40], [40])
    before = cache.report()
    small = CompressedCache(model, "capkv", 0.5, sinks=4, window=12, evict="always")
    with pytest.raises(ValueError, match=r"budget must be at least 16 tokens, .*, got a budget of 10 for this row"):
        read(model, small, ids[:, :20], [20])
    assert small.get_seq_length() == 0
    assert cache.report() == before
    read(model, cache, ids[:, 40:], [20])
    assert {head.tokens_kept for head in cache.report().heads} == {30}


def test_second_update_of_a_layer_in_one_forward_pass_is_rejected():
    model = tiny("llama")
    cache = CompressedCache(model, "capkv", 12)
    read(model, cache, long_prompt(30), [30])
    layer, before = cache.compressed_layers[1], cache.report()
    keys = torch.zeros(1, 2, 1, 12)
    layer.update(keys, keys)
    with pytest.raises(ValueError, match="must get keys once in a forward pass, got them twice"):
        layer.update(keys, keys)
    layer.awaits_attention = False
    assert cache.report() == before


@pytest.mark.parametrize("lookup", [False, True])
def test_assisted_decoding_with_full_budget_equals_plain_decoding(lookup):
    """Tokens are proposed by a second model, or looked up in the prompt."""
    model, assistant = build("llama"), build("llama", seed=3)
    ids = torch.cat((prompt(20), prompt(20)), 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    cache = CompressedCache(model, "capkv", 1.0)
    options = {"prompt_lookup_num_tokens": 3} if lookup else {"assistant_model": assistant}
    plain = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 1}  # prompt lookup needs an end token
    expected = model.generate(**inputs, **plain)
    assert torch.equal(model.generate(**inputs, **plain, **options, past_key_values=cache), expected)


def test_assisted_decoding_from_an_empty_cache_drops_rejected_tokens_from_the_window():
    model = build("llama")
    ids = torch.cat((prompt(40), prompt(40)), 1)
    cache = CompressedCache(model, "capkv", 0.5)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 1, "prompt_lookup_num_tokens": 3}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
    assert cache.get_seq_length() == out.shape[1] - 1
    assert int(cache.kept_positions(0).max()) == out.shape[1] - 2


def test_contributions_rank_entries_of_a_head_like_scores():
    torch.manual_seed(1)
    stats = AttentionStats(torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8))
    for name in ("snapkv", "h2o", "keydiff", "capkv-window"):
        policy = get_policy(name)
        contributions = policy.estimator.contributions(policy.objective(stats))
        scores = policy.score(stats).clamp_min(-1e30)
        best = scores[..., 4:].argsort(-1, descending=True)[..., :10]
        ordered = contributions[..., 4:].gather(-1, best)
        assert bool((ordered.diff(dim=-1) <= 1e-6).all())
