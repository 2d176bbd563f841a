"""Caches with quantized entries: masked and failed tokens, files, reports, and layers of other kinds."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from suffice.kv import CompressedCache
from suffice.kv.storage.quantization import Quantization
from suffice.kv.storage.quantized import QuantizedStorage
from tests.kv import families
from tests.kv.test_failures import PassError, _describe, _fail_in_layer
from tests.kv.test_holes import _extend, _kept, _read
from tests.kv.test_quantized import POLICIES, distance, fill, generate, quantized_vectors, read, some_policies, stored
from tests.kv.test_quantized_attention import text
from tests.kv.tiny import build, left_padded, tiny


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# ---- Masked tokens ---------------------------------------------------------------------------------------------------


@some_policies
@pytest.mark.parametrize("evict", ["prefill", "always"])
def test_masked_tokens_count_for_nothing(options, evict):
    """A row with masked tokens in between keeps and computes what the same text does without them."""
    model, tokens = tiny("llama"), text(190)
    options = {"budget": 60, "evict": evict, "interval": 3, "bits": 8, **options}
    batch, single = CompressedCache(model, **options), CompressedCache(model, **options)
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[1, 20:30] = mask[1, 50] = 0
    ids = tokens[:, :100].expand(2, -1)
    _read(model, batch, ids, mask)
    model(ids[:1, mask[1].bool()], past_key_values=single)
    for step in range(45):
        is_token = int(step % 5 not in (0, 2))
        mask, ids = _extend(mask, torch.tensor([[1], [is_token]])), tokens[:, 100 + step : 101 + step]
        got = _read(model, batch, ids.expand(2, -1), mask)
        if is_token:
            wanted = read(model, single, ids)
            for layer in range(3):
                for head in range(2):
                    kept = batch.kept_positions(layer)[1, head], single.kept_positions(layer)[0, head]
                    kept = [set(own[own >= 0].tolist()) for own in kept]
                    # Entries are quantized at other steps, so that a few others may be kept.
                    assert len(kept[0] ^ kept[1]) <= (0 if evict == "prefill" else 12)
            assert distance(got[1], wanted[0]) < (0.2 if evict == "prefill" else 0.6)


def test_turns_of_a_batched_chat_mask_padding():
    model, tokens = tiny("llama"), text(200)
    options = {"policy": "capkv", "budget": 60, "bits": 8}
    cache = CompressedCache(model, **options)
    batch = left_padded([tokens[:, :110], tokens[:, 40:115]])
    mask = batch["attention_mask"]
    _read(model, cache, batch["input_ids"], mask)
    shorter = torch.cat((tokens[:, 120:160], torch.ones(1, 6, dtype=torch.long)), dim=1)
    mask = _extend(mask, torch.ones(2, 46, dtype=torch.long))
    _read(model, cache, torch.cat((tokens[:, 120:166], shorter)), mask)
    mask[1, -6:] = 0
    mask = _extend(mask, torch.tensor([[1] * 7, [0] * 2 + [1] * 5]))
    question = tokens[:, 170:177].expand(2, -1)
    got = _read(model, cache, question, mask)
    for row, (document, answer, asked) in enumerate(((slice(0, 110), 46, 7), (slice(40, 115), 40, 5))):
        single = CompressedCache(model, **options)
        read(model, single, tokens[:, document])
        read(model, single, tokens[:, 120 : 120 + answer])
        wanted = read(model, single, question[:1, 7 - asked :])
        assert distance(got[row], wanted[0]) < 0.1
        for head in range(2):
            assert _kept(cache, 1, row, head) == _kept(single, 1, 0, head)


@some_policies
def test_a_row_may_be_padding_in_the_whole_first_chunk(options):
    model = tiny("llama")
    cache = CompressedCache(model, budget=60, bits=4, **{**options, "evict": "always"})
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[1, :50] = 0
    ids = text(100, rows=2)
    _read(model, cache, ids[:, :40], mask[:, :40])
    assert bool(_read(model, cache, ids[:, 40:], mask).isfinite().all())


# ---- Failed passes ---------------------------------------------------------------------------------------------------


@some_policies
@pytest.mark.parametrize("layer", [1, 2])
def test_a_failed_pass_keeps_all_earlier_entries(options, layer):
    """Layers before the failure have quantized a block, in which the tokens of the failed pass may be."""
    model = tiny("llama")
    cache = CompressedCache(model, budget=60, bits=8, **options)
    fill(model, cache)
    generate(model, cache, 3)
    expected, before, described = cache.copy(), stored(cache), _describe(cache)
    handle = _fail_in_layer(model, layer)
    try:
        with pytest.raises(PassError):
            read(model, cache, text(80, 9, rows=2))
    finally:
        handle.remove()
    assert len(quantized_vectors(cache)) >= len(quantized_vectors(expected))
    got = generate(model, cache, 1)
    after = stored(cache)
    assert len(after) == len(before) + 2 * 2 * 3
    assert all(distance(after[name], vector) < 0.03 for name, vector in before.items())
    assert distance(got, generate(model, expected, 1)) < 0.1
    assert [own[0] for own in _describe(cache)] == [own[0] + 1 for own in described]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_numbers_that_are_not_finite_leave_the_cache_as_it_was(bad):
    model = build("llama")
    cache = CompressedCache(model, "capkv", 60, bits=4)
    fill(model, cache)
    expected = cache.copy()
    weight = model.model.layers[1].self_attn.v_proj.weight
    good = weight[0, 0].clone()
    weight[0, 0] = bad
    with pytest.raises(ValueError, match="finite"):
        read(model, cache, text(80, 1, rows=2))
    with pytest.raises(ValueError, match="finite"):
        fill(model, CompressedCache(model, "capkv", 60, bits=4))
    weight[0, 0] = good
    assert cache.get_seq_length() == expected.get_seq_length()
    assert distance(generate(model, cache, 2), generate(model, expected, 2)) < 0.4


# ---- Files and reports -----------------------------------------------------------------------------------------------


@some_policies
@pytest.mark.parametrize("evict", ["prefill", "always"])
def test_loaded_cache_continues_bit_by_bit(tmp_path, options, evict):
    model = tiny("llama")
    cache = CompressedCache(model, budget=60, bits=(8, 3), evict=evict, interval=5, **options)
    fill(model, cache)
    generate(model, cache, 3)
    read(model, cache, text(10, 2, rows=2))
    files = [cache.save(model, tmp_path / name) for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    loaded = CompressedCache.load(files[0], model)
    assert loaded.settings == cache.settings
    assert loaded.report() == cache.report()
    assert quantized_vectors(loaded) == quantized_vectors(cache)
    if evict == "prefill":
        for each in (cache, loaded):
            each.crop(-2)
    assert torch.equal(generate(model, loaded, 40), generate(model, cache, 40))
    assert loaded.report() == cache.report()


@some_policies
@pytest.mark.parametrize("bits", [2, (8, 3)])
def test_reported_bytes_are_those_of_the_tensors(options, bits):
    model = tiny("llama")
    cache = CompressedCache(model, budget=60, bits=bits, **options)
    fill(model, cache)
    for _ in range(2):
        storages = [layer.storage for layer in cache.compressed_layers]
        assert cache.report().bytes_kept == sum(storage.nbytes for storage in storages)
        for storage in storages:
            assert isinstance(storage, QuantizedStorage)
            assert sum(x.nbytes for x in storage.buffers) == storage.nbytes
            assert 0 <= storage.nbytes - sum(storage.nbytes_by_head) < storage.num_heads
            quantized, exact = storage.quantized, storage.exact
            own = Quantization(*(bits if isinstance(bits, tuple) else (bits, bits)))
            per_entry = sum(16 * number // 8 + 1 for number in (own.key_bits, own.value_bits))  # heads of 12 dimensions
            expected = exact.nbytes + int(quantized.counts.sum()) * per_entry + 2 * quantized.means.nbytes
            assert storage.nbytes == expected
        remembered = sum(layer.state.nbytes for layer in cache.compressed_layers)
        assert cache.report().bytes_index == sum(storage.nbytes_index for storage in storages) + remembered
        generate(model, cache, 50)


# ---- Layers of other kinds -------------------------------------------------------------------------------------------


def compare_to_plain(model, policy="capkv", *, limit=0.15, rows=(90, 70)):
    """Compare a cache with 8 bits to the plain cache; return both."""
    caches = [CompressedCache(model, policy, 60, bits=bits) for bits in (None, 8)]
    results = []
    for cache in caches:
        fill(model, cache, rows)
        results.append([*generate(model, cache, 3, len(rows)), read(model, cache, text(40, 1, rows=len(rows)))])
        results[-1] += [*generate(model, cache, 3, len(rows), first=9)]
    assert max(distance(*pair) for pair in zip(*reversed(results), strict=True)) < limit
    assert any(sum(map(sum, layer.storage.quantized.lengths)) for layer in caches[1].compressed_layers)
    return caches


@pytest.mark.parametrize("policy", ["capkv", "capkv-profile"])
def test_models_in_which_all_layers_have_a_sliding_window(policy, tmp_path):
    config = build("mistral").config
    config = MistralConfig(**{**config.to_dict(), "sliding_window": 100})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    plain, cache = compare_to_plain(model, policy, rows=(130, 90))
    for own, other in zip(plain.compressed_layers, cache.compressed_layers, strict=True):
        assert own.storage.num_kept.tolist() == other.storage.num_kept.tolist()
    known = quantized_vectors(cache)
    generate(model, cache, 40)
    own = quantized_vectors(cache)
    assert own
    assert all(known.get(name, own[name]) == own[name] for name in own)
    loaded = CompressedCache.load(cache.save(model, tmp_path / "x"), model)
    assert torch.equal(generate(model, loaded, 5), generate(model, cache, 5))


@pytest.mark.parametrize("family", ["falcon_h1", "deepseek_v2", "gemma3n_text", "gemma4_text"])
def test_families_with_other_layers(family, tmp_path):
    if family not in families.families():
        pytest.skip("needs a newer transformers")
    model = families.build(family)
    try:
        CompressedCache(model)
    except ValueError as error:  # test_families.py checks that the newest transformers is supported
        pytest.skip(f"needs a newer transformers: {error}")
    rows = (90,) if family == "falcon_h1" else (90, 70)
    _, cache = compare_to_plain(model, rows=rows)
    copy = cache.copy()
    loaded = CompressedCache.load(cache.save(model, tmp_path / "x"), model)
    wanted = generate(model, cache, 40, len(rows))
    for each in (copy, loaded):
        assert torch.equal(generate(model, each, 40, len(rows)), wanted)


# ---- Settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"bits": 6}, ValueError, "bits must be 2, 3, 4, 5 or 8, got 6"),
        ({"bits": 0}, ValueError, "bits must be 2, 3, 4, 5 or 8, got 0"),
        ({"bits": (4, 6)}, ValueError, "bits must be 2, 3, 4, 5 or 8, got 6"),
        ({"bits": "4"}, TypeError, "bits must be a number of bits, a pair .* or None, got '4'"),
        ({"bits": True}, TypeError, "bits must be a number of bits, a pair .* or None, got True"),
        ({"bits": 4.0}, TypeError, "bits must be a number of bits, a pair .* or None, got 4.0"),
        ({"bits": (4,)}, TypeError, r"bits must be a number of bits, a pair .* or None, got \(4,\)"),
        ({"bits": (4, None)}, TypeError, r"bits must be a number of bits, a pair .* or None, got \(4, None\)"),
        ({"bits": 4, "rerotate": True}, ValueError, "bits must be None with rerotate=True, got 4"),
    ],
)
def test_invalid_settings_are_rejected(settings, error, message):
    with pytest.raises(error, match=message):
        CompressedCache(tiny("llama"), "capkv", 60, **settings)


def test_pairs_of_bits_are_those_of_keys_and_values():
    cache = CompressedCache(tiny("llama"), POLICIES[0]["policy"], 60, bits=[8, 2])
    fill(tiny("llama"), cache)
    assert cache.layers[0].storage.bits == (8, 2)
    with pytest.raises(ValueError, match="window of a quantization must be at least 0, got -1"):
        Quantization(4, 4, -1)
