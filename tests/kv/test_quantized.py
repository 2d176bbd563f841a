"""Caches whose older entries are quantized."""

import pytest
import torch

from suffice.kv import CompressedCache
from suffice.kv.storage.quantization import Quantization
from suffice.kv.storage.quantized import NUM_SINKS
from tests.kv.test_quantized_attention import text
from tests.kv.tiny import build, left_padded, tiny

WINDOW = Quantization().window
POLICIES = [
    {"policy": "capkv"},
    {"policy": "capkv-profile"},
    {"policy": "keydiff"},
    {"policy": "capkv", "allocation": "marginal"},
    {"policy": "capkv", "allocation": "pyramid"},
    {"policy": "h2o", "allocation": "adakv"},
]
some_policies = pytest.mark.parametrize("options", [POLICIES[1], POLICIES[3], POLICIES[5]], ids=str)
every_policy = pytest.mark.parametrize("options", POLICIES, ids=str)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def pair(model, bits=8, **options):
    """Return a cache without and one with quantized entries."""
    return tuple(CompressedCache(model, bits=own, **{"budget": 60, **options}) for own in (None, bits))


def read(model, cache, ids):
    return model(ids, past_key_values=cache).logits[:, -1]


def fill(model, cache, rows=(110, 75)):
    return model(**left_padded([text(size, seed) for seed, size in enumerate(rows)]), past_key_values=cache)


def generate(model, cache, steps, rows=2, first=0):
    """Read single tokens, the same in every cache; return the logits."""
    return torch.stack([read(model, cache, text(1, 50 + first + step, rows=rows)) for step in range(steps)])


def quantized_vectors(cache):
    """Return the stored bytes of each quantized entry, by layer, row, head and position."""
    found = {}
    for layer in cache.compressed_layers:
        entries = layer.storage.quantized
        tensors = torch.cat((entries.keys.codes, entries.keys.scales, entries.values.codes, entries.values.scales), 1)
        vectors, positions = iter(tensors.numpy()), iter(entries.positions.tolist())
        for row, lengths in enumerate(entries.lengths):
            for head, length in enumerate(lengths):
                for _ in range(length):
                    found[layer.index, row, head, next(positions)] = next(vectors).tobytes()
        assert next(vectors, None) is None
    return found


def stored(cache):
    """Return key and value of each entry, by layer, row, head and position."""
    found = {}
    for layer in cache.compressed_layers:
        entries = layer.storage.entries
        for row, head, slot in (entries.positions >= 0).nonzero().tolist():
            name = layer.index, row, head, int(entries.positions[row, head, slot])
            assert name not in found
            found[name] = torch.cat((entries.keys[row, head, slot], entries.values[row, head, slot]))
    return found


def distance(got, wanted):
    return float((got - wanted).norm() / wanted.norm())


def assert_equal_stored(got, wanted):
    got, wanted = stored(got), stored(wanted)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


# ---- Values ----------------------------------------------------------------------------------------------------------


@every_policy
@pytest.mark.parametrize("budget", [0.3, 60, 1.0])
def test_kept_entries_equal_those_of_the_plain_cache_up_to_rounding(options, budget):
    model = tiny("llama")
    plain, cache = pair(model, budget=budget, **options)
    assert torch.equal(fill(model, cache).logits, fill(model, plain).logits)  # quantized after the attention
    wanted, got, codes = stored(plain), stored(cache), quantized_vectors(cache)
    assert got.keys() == wanted.keys()
    # With a global budget, later layers make earlier ones drop entries after these are quantized.
    window = 0 if options.get("allocation") == "marginal" else WINDOW
    for name, vector in wanted.items():
        if name in codes:
            assert 0 < distance(got[name], vector) < 0.03
            newer = [other for other in wanted if other[:3] == name[:3] and other[3] > name[3]]
            assert name[3] >= NUM_SINKS
            assert len(newer) >= window
        else:
            assert torch.equal(got[name], vector)
    if budget == 1.0:
        assert len(codes) == len(wanted) - 2 * 2 * 3 * (NUM_SINKS + WINDOW)


@every_policy
@pytest.mark.parametrize("evict", ["prefill", "always"])
def test_logits_with_8_bits_stay_near_those_of_the_plain_cache(options, evict):
    model = tiny("llama")
    caches = pair(model, budget=60, evict=evict, interval=6, **options)
    wanted, got = (
        [fill(model, cache).logits[:, -1], read(model, cache, text(40, 3, rows=2)), *generate(model, cache, 12)]
        for cache in caches
    )
    # Evictions that are scored with quantized keys may keep a few other entries.
    errors = [distance(*logits) for logits in zip(got, wanted, strict=True)]
    assert max(errors[:2]) < 0.1
    assert max(errors) < (0.2 if evict == "prefill" else 0.6)
    assert evict == "always" or sum(errors) / len(errors) < 0.05
    kept, other = (set(stored(cache)) for cache in caches)
    assert len(kept & other) >= (len(kept) if evict == "prefill" else 0.9 * len(kept))


def test_more_bits_are_more_exact():
    model, results = tiny("llama"), []
    for bits in (2, 3, 4, 8, None):
        cache = CompressedCache(model, "capkv", 60, bits=bits)
        fill(model, cache)
        results.append(generate(model, cache, 5))
    errors = [distance(got, results[-1]) for got in results[:-1]]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05


@every_policy
@pytest.mark.parametrize("evict", ["prefill", "always"])
def test_quantized_entries_are_never_changed(options, evict):
    model = tiny("llama")
    cache = CompressedCache(model, budget=60, evict=evict, interval=5, bits=4, **options)
    fill(model, cache)
    known = quantized_vectors(cache)
    for step, size in enumerate([1] * 12 + [30, 1, 50] + [1] * 6):
        read(model, cache, text(size, step, rows=2))
        own = quantized_vectors(cache)
        assert all(known.get(name, own[name]) == own[name] for name in own)
        if evict == "prefill":
            assert own.keys() >= known.keys()
        known |= own
        counts = torch.stack([layer.storage.exact.num_kept for layer in cache.compressed_layers])
        assert int(counts.max()) < NUM_SINKS + WINDOW + 32
    assert len(own) > 50


def test_means_stay_those_of_the_first_quantized_entries():
    model = tiny("llama")
    cache = CompressedCache(model, "capkv", 60, evict="always", interval=5, bits=4)
    fill(model, cache)
    before = [layer.storage.quantized.means.clone() for layer in cache.compressed_layers]
    generate(model, cache, 80)
    for means, layer in zip(before, cache.compressed_layers, strict=True):
        assert torch.equal(means, layer.storage.quantized.means)


# ---- Rows and copies -------------------------------------------------------------------------------------------------


@some_policies
@pytest.mark.parametrize("evict", ["prefill", "always"])
def test_copies_are_independent(options, evict):
    model = tiny("llama")
    cache = CompressedCache(model, budget=60, evict=evict, interval=5, bits=4, **options)
    fill(model, cache)
    generate(model, cache, 3)
    other, reference = cache.copy(), cache.copy()
    before = stored(reference)
    assert_equal_stored(other, cache)
    wanted = [generate(model, cache.copy(), 34) for _ in range(2)]
    assert torch.equal(*wanted)
    generate(model, other, 45, first=100)
    read(model, cache, text(40, 5, rows=2))
    other.crop(-30) if evict == "prefill" else other.batch_select_indices(torch.tensor([1]))
    after = stored(reference)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(generate(model, reference, 34), wanted[0])


@some_policies
def test_rows_are_selected_and_repeated(options):
    model = tiny("llama")
    cache = CompressedCache(model, budget=60, bits=4, **options)
    fill(model, cache, (110, 75, 90))
    before, codes = stored(cache), quantized_vectors(cache)
    for change, rows in (
        (lambda own: own.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda own: own.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda own: own.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    ):
        own = cache.copy()
        change(own)
        for found, known in ((stored(own), before), (quantized_vectors(own), codes)):
            assert len(found) == sum(name[1] == row for row in rows for name in known)
            for (layer, row, head, position), vector in found.items():
                expected = known[layer, rows[row], head, position]
                assert vector == expected if isinstance(vector, bytes) else torch.equal(vector, expected)
        generate(model, own, 40, rows=len(rows))
        for (layer, row, head, position), vector in quantized_vectors(own).items():
            assert codes.get((layer, rows[row], head, position), vector) == vector
    assert quantized_vectors(cache) == codes


@some_policies
def test_beam_search_continues_from_quantized_entries(options):
    model = tiny("llama")
    inputs = left_padded([text(110), text(75, 1)])
    settings = {"max_new_tokens": 45, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    results = []
    for cache in pair(model, budget=1.0, **options):
        out = model.generate(
            **inputs, **settings, past_key_values=cache, output_scores=True, return_dict_in_generate=True
        )
        results.append(out.sequences_scores)
    assert out.sequences.shape == (4, 155)
    torch.testing.assert_close(results[1], results[0], atol=0.1, rtol=0.1)


# ---- Removing tokens -------------------------------------------------------------------------------------------------


@some_policies
@pytest.mark.parametrize("count", [1, 8, 41])
def test_removed_tokens_leave_all_earlier_entries_as_they_are(options, count):
    """The chunk of 41 tokens makes a block of older entries quantized, some of its own among them."""
    model = tiny("llama")
    cache = CompressedCache(model, budget=60, bits=4, **options)
    fill(model, cache)
    generate(model, cache, 6)
    read(model, cache, text(41, 8, rows=2))
    before = stored(cache)
    last = {row: max(name[3] for name in before if name[1] == row) for row in (0, 1)}
    cache.crop(-count)
    after = stored(cache)
    assert after.keys() == {name for name in before if name[3] <= last[name[1]] - count}
    assert all(torch.equal(after[name], before[name]) for name in after)
    copy = cache.copy()
    generate(model, cache, 40)
    assert len(stored(cache)) == len(after) + 40 * 2 * 2 * 3
    assert cache.report().bytes_kept > 0
    assert all(torch.equal(vector, after[name]) for name, vector in stored(copy).items())


def test_tokens_before_the_last_eviction_can_be_removed_while_every_head_has_them():
    model = tiny("llama")
    plain, cache = pair(model, policy="capkv", budget=60)
    for each in (plain, cache):
        fill(model, each)
        generate(model, each, 3)
        assert each.layers[0].state.num_droppable > 3
        each.crop(-each.layers[0].state.num_droppable)
    assert stored(plain).keys() == stored(cache).keys()
    assert plain.layers[0].state.rows == cache.layers[0].state.rows
    assert distance(generate(model, cache, 40), generate(model, plain, 40)) < 0.1


@pytest.mark.parametrize("policy", ["capkv", "capkv-profile"])
@pytest.mark.parametrize("lookup", [False, True])
def test_assisted_decoding(policy, lookup):
    """Tokens are proposed by a second model, or looked up in the prompt."""
    model, ids = tiny("llama"), text(110)
    cache, plain = (CompressedCache(model, policy, 1.0, bits=8) for _ in range(2))
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 50, "do_sample": False, "eos_token_id": 1}
    options = {"prompt_lookup_num_tokens": 3} if lookup else {"assistant_model": build("llama", seed=3)}
    out = model.generate(ids, **settings, **options, past_key_values=cache)
    assert cache.get_seq_length() == out.shape[1] - 1
    # Rejected tokens make entries quantized earlier, so that a few tokens may differ.
    logits = [read(model, plain, ids), *(read(model, plain, new) for new in out[:, 110:-1].split(1, dim=1))]
    assert float((torch.cat(logits).argmax(-1) == out[0, 110:]).float().mean()) > 0.85
