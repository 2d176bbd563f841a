"""The compressed cache of cross-attention, against the stock model with the evicted entries of the encoder masked."""

from __future__ import annotations

import copy
import functools
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from suffice.kv import CompressedCache, CrossAttentionCache, Policy, policies
from suffice.kv.hf.layers import cross_attention_modules, find_decoder
from suffice.kv.policy.weights import KeyNorm
from suffice.kv.storage.uniform import UniformStorage
from tests.kv import families
from tests.kv.family_cases import EncoderOutput
from tests.kv.flash import flash_package, with_flash
from tests.kv.tiny import build as build_tiny
from tests.kv.tiny import prompt

FAMILIES = ("bart", "whisper", "marian", "encoder-decoder")
LENGTH = 24  # of the encoder's output
every_family = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def build(family, implementation="sdpa"):
    try:
        model = families.build(family)
    except ValueError as error:  # early versions of transformers have no default configuration for some families
        pytest.skip(str(error))
    model.set_attn_implementation(implementation)
    return model


def encoded(rows=1, seed=0):
    return torch.randn(rows, LENGTH, 64, generator=torch.Generator().manual_seed(seed))


def read(model, cache, ids, states, mask=None):
    """Continue from a cache with more tokens; return the logits."""
    with torch.no_grad():
        return model(
            decoder_input_ids=ids,
            encoder_outputs=EncoderOutput(last_hidden_state=states),
            **({} if mask is None else {"attention_mask": mask}),
            past_key_values=cache,
            use_cache=True,
        ).logits


def masked_logits(model, pieces, states, kept, mask=None):
    """Return the stock logits of each piece; in all but the first, cross-attention reads the kept entries only.

    Args:
        model: the model.
        pieces: the tokens of each call.
        states: output of the encoder.
        kept: kept positions by layer.
        mask: mask of the encoder's output.

    """
    kept_of = {id(module): kept[index] for index, module in cross_attention_modules(model).items()}
    implementation, is_first = find_decoder(model).config._attn_implementation, True

    def attend(module, query, key, value, attention_mask, **options):
        positions = kept_of.get(id(module))
        if positions is not None and not is_first:
            positions = positions.long()
            readable = torch.zeros(*positions.shape[:2], LENGTH + 1, dtype=torch.bool)
            readable.scatter_(2, torch.where(positions >= 0, positions, LENGTH), True)
            readable = readable[:, :, None, :LENGTH].expand(-1, -1, query.shape[2], -1)
            attention_mask = torch.zeros(readable.shape).masked_fill(~readable, torch.finfo(torch.float32).min)
        if implementation == "eager":
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[implementation]
        return function(module, query, key, value, attention_mask, **options)

    AttentionInterface.register("masked_cross_attention", attend)
    AttentionMaskInterface.register("masked_cross_attention", ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    cache, logits = EncoderDecoderCache(DynamicCache(), DynamicCache()), []
    decoder = find_decoder(model)
    decoder.set_attn_implementation("masked_cross_attention")
    try:
        for piece in pieces:
            logits.append(read(model, cache, piece, states, mask))
            is_first = False
    finally:
        decoder.set_attn_implementation(implementation)
    return logits


def padded_mask(lengths):
    """Return a mask of rows that are padded on the right, as encoders expect."""
    return (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()


@every_family
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("policy", [None, "keydiff"])
def test_tokens_after_the_first_pass_read_the_kept_entries(family, implementation, padded, policy):
    model = build(family, implementation)
    if padded and family == "whisper":
        pytest.skip("the decoder takes no mask of the encoder's output")
    states, mask = encoded(2), padded_mask([LENGTH, 15]) if padded else None
    pieces = prompt(11, rows=2).split([1, 1, 4, 5], dim=1)
    cross_attention = CrossAttentionCache(model, policy, budget=0.5)
    cache = EncoderDecoderCache(DynamicCache(), cross_attention)
    logits = [read(model, cache, piece, states, mask) for piece in pieces]
    kept = {index: cross_attention.kept_positions(index) for index in range(len(cross_attention.layers))}
    for positions in kept.values():
        assert (positions >= 0).sum(-1).tolist() == [[12] * 4, [7 if padded else 12] * 4]
        assert int(positions[1].max()) < (15 if padded else LENGTH)
    del cache
    for got, expected in zip(logits, masked_logits(model, pieces, states, kept, mask), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@every_family
def test_full_budget_equals_the_stock_cache(family):
    model, states = build(family), encoded(2)
    stock = EncoderDecoderCache(DynamicCache(), DynamicCache())
    cache = EncoderDecoderCache(CompressedCache(model, "capkv", 1.0), CrossAttentionCache(model, budget=1.0))
    for piece in prompt(9, rows=2).split([4, 1, 4], dim=1):
        torch.testing.assert_close(read(model, cache, piece, states), read(model, stock, piece, states))


def test_kept_entries_have_the_smallest_cosines_to_the_mean_key():
    """The formula of `keydiff`, on the keys of the stock cache."""
    model, states = build("bart"), encoded()
    stock = EncoderDecoderCache(DynamicCache(), DynamicCache())
    read(model, stock, prompt(1), states)
    cross_attention = CrossAttentionCache(model, "keydiff", budget=7)
    read(model, EncoderDecoderCache(DynamicCache(), cross_attention), prompt(1), states)
    for index, layer in enumerate(stock.cross_attention_cache.layers):
        for head, keys in enumerate(layer.keys[0]):
            unit = keys / keys.norm(dim=-1, keepdim=True)
            expected = (unit @ unit.mean(0)).argsort()[:7].sort().values
            assert torch.equal(cross_attention.kept_positions(index)[0, head].long(), expected)


def test_kept_entries_do_not_depend_on_the_tokens_of_the_decoder():
    model, states = build("bart"), encoded()
    kept = []
    for ids in (prompt(1), prompt(12, seed=3)):
        cache = CrossAttentionCache(model)
        read(model, EncoderDecoderCache(DynamicCache(), cache), ids, states)
        kept.append(torch.stack([cache.kept_positions(layer.index) for layer in cache.compressed_layers]))
    assert torch.equal(*kept)


def test_rows_of_a_padded_batch_equal_single_inputs():
    model, states, lengths = build("bart"), encoded(3), [15, LENGTH, 9]
    cache = EncoderDecoderCache(DynamicCache(), CrossAttentionCache(model, budget=0.4))
    pieces = prompt(6, rows=3).split([1, 5], dim=1)
    together = [read(model, cache, piece, states, padded_mask(lengths)) for piece in pieces]
    for row, length in enumerate(lengths):
        own = EncoderDecoderCache(DynamicCache(), CrossAttentionCache(model, budget=0.4))
        for piece, logits in zip(pieces, together, strict=True):
            alone = read(model, own, piece[row, None], states[row, None, :length])
            torch.testing.assert_close(logits[row, None], alone, atol=1e-4, rtol=1e-4)


def test_beam_search_generates_the_tokens_of_the_stock_cache_with_the_full_budget():
    model = build("bart")
    options = {"encoder_outputs": EncoderOutput(last_hidden_state=encoded(2)), "decoder_start_token_id": 1}
    options |= {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": 3, "pad_token_id": 0}
    expected = model.generate(**copy.deepcopy(options))
    caches = CompressedCache(model, "capkv", 1.0), CrossAttentionCache(model, budget=1.0)
    assert torch.equal(model.generate(**options, past_key_values=EncoderDecoderCache(*caches)), expected)


@pytest.mark.parametrize("padded", [False, True])
def test_flash_attention_reads_the_kept_entries(monkeypatch, padded):
    states, mask = encoded(2), padded_mask([LENGTH, 15]) if padded else None
    pieces, logits = prompt(6, rows=2).split([1, 5], dim=1), {}
    with flash_package(monkeypatch) as package:
        for implementation in ("sdpa", "flash_attention_2"):
            model = copy.deepcopy(build("bart"))
            if implementation != "sdpa":
                with_flash(model, implementation)
            cache = EncoderDecoderCache(DynamicCache(), CrossAttentionCache(model, budget=0.5))
            logits[implementation] = [read(model, cache, piece, states, mask) for piece in pieces]
        assert (5, 12) in package.shapes
    for got, expected in zip(logits["flash_attention_2"], logits["sdpa"], strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_memory_of_evicted_entries_is_freed_and_reported():
    model = build("bart")
    cache = CrossAttentionCache(model, budget=0.25)
    assert str(cache.report()) == "no tokens seen yet"
    read(model, EncoderDecoderCache(DynamicCache(), cache), prompt(1), encoded())
    report = cache.report()
    assert report.bytes_kept * 4 == report.bytes_full == 4 * 2 * LENGTH * 64 * 4
    assert report.capacity_retained is None
    for layer in cache.compressed_layers:
        assert layer.keys.untyped_storage().nbytes() == 6 * 64 * 4
    cache.reset()
    assert cache.get_seq_length() == 0
    read(model, EncoderDecoderCache(DynamicCache(), cache), prompt(1), encoded(seed=1))


@every_family
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_quantized_entries_are_read_as_they_are_stored(family, implementation, padded):
    """With 8 bits close to the model's dtype, and with 2 bits equal to the attention over the dequantized entries."""
    model = build(family, implementation)
    if padded and family == "whisper":
        pytest.skip("the decoder takes no mask of the encoder's output")
    states, mask = encoded(2), padded_mask([LENGTH, 15]) if padded else None
    pieces = prompt(11, rows=2).split([1, 1, 9], dim=1)
    logits, kept = {}, {}
    for bits in (None, 8, 2):
        cross_attention = CrossAttentionCache(model, "keydiff", budget=0.5, bits=bits)
        cache = EncoderDecoderCache(DynamicCache(), cross_attention)
        logits[bits] = [read(model, cache, piece, states, mask) for piece in pieces]
        kept[bits] = [cross_attention.kept_positions(layer.index) for layer in cross_attention.compressed_layers]
    for one, other, coarse in zip(kept[None], kept[8], kept[2], strict=True):
        assert torch.equal(one[one >= 0], other[other >= 0])
        assert torch.equal(one[one >= 0], coarse[coarse >= 0])
    assert torch.equal(logits[2][0], logits[None][0])  # the first pass reads all entries before they are quantized
    for got, expected in zip(logits[8], logits[None], strict=True):
        torch.testing.assert_close(got, expected, atol=0.03 * float(expected.abs().max()), rtol=0)
    # The same cache whose storages are replaced by the dequantized entries.
    cross_attention = CrossAttentionCache(model, "keydiff", budget=0.5, bits=2)
    cache = EncoderDecoderCache(DynamicCache(), cross_attention)
    read(model, cache, pieces[0], states, mask)
    for layer in cross_attention.compressed_layers:
        entries = layer.storage.entries
        layer.state = replace(layer.state, storage=UniformStorage(replace(entries, positions=entries.positions.int())))
    for piece, expected in zip(pieces[1:], logits[2][1:], strict=True):
        got = read(model, cache, piece, states, mask)
        torch.testing.assert_close(got, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_quantized_entries_are_reported_copied_and_searched_with_beams():
    model, states = build("bart"), encoded()
    caches = {bits: CrossAttentionCache(model, budget=1.0, bits=bits) for bits in (None, 8, (4, 2))}
    for cache in caches.values():
        read(model, EncoderDecoderCache(DynamicCache(), cache), prompt(3), states)
    reports = {bits: cache.report() for bits, cache in caches.items()}
    assert reports[(4, 2)].bytes_kept < reports[8].bytes_kept < reports[None].bytes_kept
    assert {head.bits for head in reports[8].heads} == {(8, 8)}
    assert all(0 < head.key_error < 0.02 for head in reports[8].heads)
    for layer in caches[8].compressed_layers:
        assert layer.storage.exact.positions[0, 0].tolist() == [0, 1, 2, 3]
        assert caches[8].kept_positions(layer.index)[0, 0].tolist() == list(range(LENGTH))
        assert reports[8].bytes_kept == sum(
            x.nbytes for own in caches[8].compressed_layers for x in own.storage.buffers
        )
    cache = EncoderDecoderCache(CompressedCache(model, "capkv"), CrossAttentionCache(model, bits=4))
    read(model, cache, prompt(3), states)
    other = copy.deepcopy(cache)
    expected = read(model, cache, prompt(2, seed=1), states)
    cache.cross_attention_cache.reset()
    assert torch.equal(read(model, other, prompt(2, seed=1), states), expected)
    options = {"encoder_outputs": EncoderOutput(last_hidden_state=encoded(2)), "decoder_start_token_id": 1}
    options |= {"max_new_tokens": 8, "min_new_tokens": 8, "num_beams": 3, "pad_token_id": 0}
    found = [
        model.generate(
            **copy.deepcopy(options),
            past_key_values=EncoderDecoderCache(
                CompressedCache(model, "capkv", 1.0), CrossAttentionCache(model, bits=bits)
            ),
        )
        for bits in (None, 8)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("bits", "words"), [(6, "bits must be 2, 3, 4, 5 or 8, got 6"), ("4", "bits must be a number of bits, .*, got '4'")]
)
def test_bits_that_are_not_supported_are_refused(bits, words):
    with pytest.raises((TypeError, ValueError), match=words):
        CrossAttentionCache(build("bart"), bits=bits)


def test_rows_of_a_padded_batch_share_no_scales():
    model, states, lengths = build("bart"), encoded(3), [15, LENGTH, 9]
    cache = EncoderDecoderCache(DynamicCache(), CrossAttentionCache(model, budget=0.9, bits=4))
    pieces = prompt(6, rows=3).split([1, 5], dim=1)
    together = [read(model, cache, piece, states, padded_mask(lengths)) for piece in pieces]
    for row, length in enumerate(lengths):
        own = EncoderDecoderCache(DynamicCache(), CrossAttentionCache(model, budget=0.9, bits=4))
        for piece, logits in zip(pieces, together, strict=True):
            alone = read(model, own, piece[row, None], states[row, None, :length])
            torch.testing.assert_close(logits[row, None], alone, atol=1e-3, rtol=1e-3)


def test_copies_are_independent():
    model, states = build("bart"), encoded()
    cache = EncoderDecoderCache(CompressedCache(model, "capkv"), CrossAttentionCache(model))
    read(model, cache, prompt(3), states)
    other = copy.deepcopy(cache)
    expected = read(model, cache, prompt(2, seed=1), states)
    cache.cross_attention_cache.reset()
    assert torch.equal(read(model, other, prompt(2, seed=1), states), expected)


def test_unsupported_models_and_policies_are_refused():
    model = build("bart")
    for name in sorted(
        {*policies(replay=False)} - {"keydiff", "key-leverage", "knorm", "streaming-llm", "random", "full"}
    ):
        with pytest.raises(ValueError, match="policy must score the entries of the cross-attention by their keys and"):
            CrossAttentionCache(model, name)
    with pytest.raises(ValueError, match="policy must have the allocation 'equal' for cross-attention"):
        CrossAttentionCache(model, Policy(KeyNorm(), allocation=policies()["capkv-profile"].allocation))
    with pytest.raises(ValueError, match="budget must be a number of tokens"):
        CrossAttentionCache(model, budget=0)
    with pytest.raises(ValueError, match=r"model must have a decoder with cross-attention.*got LlamaForCausalLM"):
        CrossAttentionCache(build_tiny("llama"))
    with pytest.raises(ValueError, match=r"model must .* T5Attention"):
        CrossAttentionCache(families.build("t5"))


def test_cache_of_another_model_or_with_another_input_is_refused():
    model, states = build("bart"), encoded()
    cache = CrossAttentionCache(copy.deepcopy(model))
    held = CrossAttentionCache(model)  # so that attention calls reach caches
    with pytest.raises(ValueError, match="past_key_values must be made for the model that is called"):
        read(model, EncoderDecoderCache(DynamicCache(), cache), prompt(1), states)
    both = EncoderDecoderCache(DynamicCache(), held)
    read(model, both, prompt(1), states)
    both.is_updated = dict.fromkeys(both.is_updated, False)
    with pytest.raises(ValueError, match="must get the encoder's output once, got it twice"):
        read(model, both, prompt(1), states)
