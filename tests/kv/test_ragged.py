"""Storages that grow in place, and attention over heads of unequal length against dense attention with a mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from suffice.kv import CompressedCache
from suffice.kv.storage.base import Entries
from suffice.kv.storage.ragged import RaggedStorage
from suffice.kv.storage.uniform import UniformStorage
from tests.kv.tiny import prompt, tiny

DIM, VALUE_DIM = 8, 6
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
kv_lengths = st.integers(1, 3).flatmap(
    lambda heads: st.lists(st.lists(st.integers(0, 40), min_size=heads, max_size=heads), min_size=1, max_size=3)
)


def ragged(lengths, dtype=torch.float64, value_dim=VALUE_DIM):
    """A storage of random entries, each head's positions counted up to 100."""
    held = torch.tensor(lengths)
    width = max(1, int(held.max()))
    shape = (*held.shape, width)
    kept = torch.arange(width).where(torch.arange(width) >= width - held[..., None], -1)
    positions = torch.arange(100 - width, 100).expand(shape)
    keys, values = (torch.randn(*shape, d, dtype=torch.float64).to(dtype) for d in (DIM, value_dim))
    return RaggedStorage.gather(Entries(keys, values, positions, columns={"received": torch.rand(shape)}), kept)


def append(storage, new, padding=None, dtype=torch.float64, value_dim=VALUE_DIM):
    """Give the storage `new` more tokens; the first `padding[row]` of a row are none. Returns what was added."""
    shape = (len(storage.lengths), len(storage.lengths[0]), new)
    keys, values = (torch.randn(*shape, d, dtype=torch.float64).to(dtype) for d in (DIM, value_dim))
    positions = torch.arange(100 + storage.tail, 100 + storage.tail + new).expand(shape[0], -1).clone()
    for row, number in enumerate(padding or ()):
        positions[row, :number] = -1
    storage.append(keys, values, positions, padded=bool((positions < 0).any()))
    return keys, values, positions


def dense(query, storage, mask, scaling):
    """Attention in float64 over the padded view of all entries, keys expanded to query heads."""
    entries = storage.entries
    kv_heads, width = entries.keys.shape[1:3]
    group, new = query.shape[1] // kv_heads, query.shape[2]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (entries.keys, entries.values))
    there = (entries.positions >= 0).repeat_interleave(group, 1)[:, :, None].expand(-1, -1, new, -1).clone()
    latest = torch.ones(new, new, dtype=torch.bool).tril() if mask is None else mask
    there[..., width - new :] &= latest
    logits = (query.double() @ keys.mT * scaling).masked_fill(~there, float("-inf"))
    return (logits.softmax(-1) @ values).transpose(1, 2)


@settings(max_examples=60, deadline=None)
@given(
    lengths=kv_lengths,
    group=st.integers(1, 3),
    earlier=st.lists(st.sampled_from([1, 1, 1, 5]), max_size=4),
    new=st.sampled_from([1, 1, 7]),
    dtype=st.sampled_from(list(CLOSE)),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_attention_is_dense_attention_with_a_mask(lengths, group, earlier, new, dtype, masked, seed):
    """Heads of any length, none too, single tokens and chunks, rows that are left-padded or not."""
    torch.manual_seed(seed)
    storage = ragged(lengths, dtype)
    # A row that holds nothing yet may have been all padding so far.
    padding = [int(torch.randint(0, sum(earlier) + 1, ())) if masked and not any(row) else 0 for row in lengths]
    for size in earlier:
        append(storage, size, [min(size, left) for left in padding], dtype)
        padding = [max(0, left - size) for left in padding]
    append(storage, new, None, dtype)
    query = torch.randn(len(lengths), len(lengths[0]) * group, new, DIM, dtype=torch.float64).to(dtype)
    mask = torch.ones(len(lengths), 1, new, new, dtype=torch.bool).tril() if masked else None
    got = attend(query, storage, mask, 0.4)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), dense(query, storage, mask, 0.4), atol=CLOSE[dtype], rtol=CLOSE[dtype])


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("dtype", list(CLOSE))
def test_padding_is_not_read(dtype, new):
    """A row whose part of the first chunk was all padding holds empty places, and masks some of the next chunk."""
    torch.manual_seed(0)
    storage = ragged([[9, 3], [0, 0]], dtype)
    append(storage, 4, [0, 4], dtype)
    append(storage, new, None, dtype)
    query = torch.randn(2, 6, new, DIM, dtype=torch.float64).to(dtype)
    mask = torch.ones(2, 1, new, new, dtype=torch.bool).tril()
    mask[1, :, :, : new // 2] = False
    seen = slice(new // 2, None)  # queries of padding read nothing, and nothing is asked of them
    got, expected = attend(query, storage, mask, 0.3), dense(query, storage, mask, 0.3)
    torch.testing.assert_close(got[0].double(), expected[0], atol=CLOSE[dtype], rtol=CLOSE[dtype])
    torch.testing.assert_close(got[1, seen].double(), expected[1, seen], atol=CLOSE[dtype], rtol=CLOSE[dtype])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("new", [1, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu_it_reads_the_same(dtype, new):
    torch.manual_seed(0)
    storage = ragged([[400, 30, 0], [170, 333, 20]], dtype, value_dim=DIM)
    append(storage, new, None, dtype, value_dim=DIM)
    query = torch.randn(2, 6, new, DIM, dtype=torch.float64).to(dtype)
    expected = dense(query, storage, None, 0.3)
    gpu = RaggedStorage(
        storage.packed_keys.cuda(),
        storage.packed_values.cuda(),
        storage.packed_positions.cuda(),
        storage.lengths,
        (storage.tail_keys.cuda(), storage.tail_values.cuda(), storage.tail_positions.cuda()),
    )
    got = attend(query.cuda(), gpu, None, 0.3).cpu()
    torch.testing.assert_close(got.double(), expected, atol=2e-2, rtol=2e-2)


def both_forms():
    """The same entries in both storages."""
    torch.manual_seed(0)
    entries = Entries(
        torch.randn(2, 2, 40, DIM),
        torch.randn(2, 2, 40, VALUE_DIM),
        torch.arange(40).expand(2, 2, 40),
        columns={"received": torch.rand(2, 2, 40)},
    )
    kept = torch.arange(40).expand(2, 2, 40)
    return [form.gather(entries, kept) for form in (UniformStorage, RaggedStorage)]


def added(number, new=1):
    generator = torch.Generator().manual_seed(number)
    keys, values = (torch.randn(2, 2, new, d, generator=generator) for d in (DIM, VALUE_DIM))
    return keys, values, torch.arange(number, number + new).expand(2, -1)


def same(entries, keys, positions):
    assert torch.equal(entries.keys, keys)
    assert torch.equal(entries.positions[:, 0], positions)
    assert entries.columns["received"].shape == entries.positions.shape


@pytest.mark.parametrize("form", [0, 1])
def test_copies_write_into_the_shared_room_without_meeting(form):
    storage = both_forms()[form]
    storage.append(*added(40))
    keys, positions = storage.entries.keys, storage.entries.positions[:, 0]
    copies = [storage.copy() for _ in range(3)]
    stored = [x.data_ptr() for x in storage.tensors]
    for number, own in enumerate((storage, *copies)):
        own.append(*added(50 + number))
        own.append(*added(60 + number))
    for number, own in enumerate((storage, *copies)):
        latest = [added(50 + number), added(60 + number)]
        expected = torch.cat([keys, *(x[0] for x in latest)], 2)
        same(own.entries, expected, torch.cat([positions, *(x[2] for x in latest)], 1))
        # The first to write took the room, the others went elsewhere.
        assert ([x.data_ptr() for x in own.tensors] == stored) == (number == 0)


@pytest.mark.parametrize("form", [0, 1])
def test_what_was_forgotten_is_not_written_over_in_a_copy(form):
    storage = both_forms()[form]
    for number in (40, 41):
        storage.append(*added(number))
    other, before = storage.copy(), storage.entries
    storage.drop_last(1)
    storage.append(*added(77))
    same(other.entries, before.keys, before.positions[:, 0])
    expected = torch.cat((before.keys[:, :, :-1], added(77)[0]), 2)
    same(storage.entries, expected, torch.cat((before.positions[:, 0, :-1], added(77)[2]), 1))


@pytest.mark.parametrize("form", [0, 1])
def test_room_is_a_sixteenth_at_most_and_counted(form):
    storage = both_forms()[form]
    for number in range(40, 140):
        storage.append(*added(number))
        behind = sum(x.untyped_storage().nbytes() for x in storage.tensors)
        assert storage.nbytes == 2 * 2 * (number + 1) * 4 * (DIM + VALUE_DIM)
        assert storage.nbytes <= behind <= storage.nbytes * 17 / 16
        assert behind - storage.nbytes <= storage.nbytes_index
    # A chunk leaves no room: what comes next is an eviction, or an answer.
    storage.append(*added(140, new=30))
    assert sum(x.untyped_storage().nbytes() for x in storage.tensors) == storage.nbytes


@pytest.mark.parametrize("form", [0, 1])
def test_rows_are_reordered_with_their_new_tokens(form):
    storage = both_forms()[form]
    storage.append(*added(40))
    before = storage.entries
    storage.rows(torch.tensor([1, 0, 1]))
    same(storage.entries, before.keys[[1, 0, 1]], before.positions[[1, 0, 1], 0])
    assert torch.equal(storage.entries.values, before.values[[1, 0, 1]])


@pytest.mark.parametrize("allocation", ["equal", "adakv"])
def test_prefill_and_decoding_may_run_in_different_modes(allocation):
    """Tensors of inference mode can't be written to outside, and those that gradients flow into not at all."""
    model, ids = tiny("llama"), prompt(60)
    found = []
    plain, inference, gradients = torch.no_grad, torch.inference_mode, torch.enable_grad
    for modes in ((plain, plain), (inference, plain), (plain, gradients)):
        cache = CompressedCache(model, "knorm", 40, allocation=allocation)
        with modes[0]():
            model(ids, past_key_values=cache)
            model(ids[:, :1], past_key_values=cache)
        with modes[1]():
            logits = [model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(1, 6)]
        if modes[1] is gradients:
            torch.stack(logits).sum().backward()
            model.zero_grad()
        found.append(torch.cat(logits, 1).detach().clone())
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
