"""Uniform and ragged storages: spare slots, copies, rows, state dicts; and attention over ragged storages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from suffice.kv import CompressedCache
from suffice.kv.attention.softmax import attend_with_sinks
from suffice.kv.backend.triton_backend import choose_backend
from suffice.kv.storage.base import Entries
from suffice.kv.storage.ragged import PackedEntries, RaggedStorage, Tail
from suffice.kv.storage.uniform import UniformStorage
from tests.kv.tiny import prompt, tiny

DIM, VALUE_DIM = 8, 6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
kv_lengths = st.integers(1, 3).flatmap(
    lambda heads: st.lists(st.lists(st.integers(0, 40), min_size=heads, max_size=heads), min_size=1, max_size=3)
)


def ragged_storage(lengths, dtype=torch.float64, value_dim=VALUE_DIM):
    """Return a storage of random entries; the last position of each head is 99."""
    counts = torch.tensor(lengths)
    width = max(1, int(counts.max()))
    shape = (*counts.shape, width)
    kept = torch.arange(width).where(torch.arange(width) >= width - counts[..., None], -1)
    positions = torch.arange(100 - width, 100).expand(shape)
    keys, values = (torch.randn(*shape, d, dtype=torch.float64).to(dtype) for d in (DIM, value_dim))
    return RaggedStorage.gather(
        Entries(keys, values, positions, columns={"attention_received": torch.rand(shape)}), kept
    )


def append(storage, new, padding=None, dtype=torch.float64, value_dim=VALUE_DIM):
    """Append `new` random tokens, of which the first `padding[row]` are padding."""
    shape = (len(storage.lengths), len(storage.lengths[0]), new)
    keys, values = (torch.randn(*shape, d, dtype=torch.float64).to(dtype) for d in (DIM, value_dim))
    positions = torch.arange(100 + storage.tail_length, 100 + storage.tail_length + new).expand(shape[0], -1).clone()
    for row, number in enumerate(padding or ()):
        positions[row, :number] = -1
    storage.append(keys, values, positions, padded=bool((positions < 0).any()))


def attend(query, storage, mask, scaling, softcap=None, sinks=None):
    """Compute attention over a ragged storage with the backend for its device."""
    backend = choose_backend(query, *storage.buffers)
    return backend.ragged_attention(query, storage, mask, scaling, softcap, sinks)


def dense_attention(query, storage, mask, scaling, softcap=None, sinks=None):
    """Compute attention in float64 over the right-aligned view of all entries, with keys expanded to query heads."""
    entries = storage.entries
    kv_heads, width = entries.keys.shape[1:3]
    group, new = query.shape[1] // kv_heads, query.shape[2]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (entries.keys, entries.values))
    readable = (entries.positions >= 0).repeat_interleave(group, 1)[:, :, None].expand(-1, -1, new, -1).clone()
    readable[..., width - new :] &= torch.ones(new, new, dtype=torch.bool).tril() if mask is None else mask
    logits = query.double() @ keys.mT * scaling
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = logits.masked_fill(~readable, float("-inf"))
    if sinks is not None:
        logits = torch.cat((logits, sinks.double()[:, None, None].expand(*logits.shape[:-1], 1)), dim=-1)
    return (logits.softmax(-1)[..., :width] @ values).transpose(1, 2)


@settings(max_examples=60, deadline=None)
@given(
    lengths=kv_lengths,
    group=st.integers(1, 3),
    earlier=st.lists(st.sampled_from([1, 1, 1, 5]), max_size=4),
    new=st.sampled_from([1, 1, 7]),
    dtype=st.sampled_from(list(TOLERANCE)),
    masked=st.booleans(),
    softcap=st.sampled_from([None, None, 1.5]),
    has_sinks=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_ragged_attention_equals_dense_attention_with_a_mask(
    lengths, group, earlier, new, dtype, masked, softcap, has_sinks, seed
):
    """Heads have any length, 0 included; new tokens come alone or in chunks; rows may be left-padded."""
    torch.manual_seed(seed)
    storage = ragged_storage(lengths, dtype)
    # A row without entries may have had only padding so far.
    padding = [int(torch.randint(0, sum(earlier) + 1, ())) if masked and not any(row) else 0 for row in lengths]
    for size in earlier:
        append(storage, size, [min(size, left) for left in padding], dtype)
        padding = [max(0, left - size) for left in padding]
    append(storage, new, None, dtype)
    query = torch.randn(len(lengths), len(lengths[0]) * group, new, DIM, dtype=torch.float64).to(dtype)
    mask = torch.ones(len(lengths), 1, new, new, dtype=torch.bool).tril() if masked else None
    sinks = torch.randn(query.shape[1]) if has_sinks else None
    got = attend(query, storage, mask, 0.4, softcap, sinks)
    assert got.dtype == dtype
    expected = dense_attention(query, storage, mask, 0.4, softcap, sinks)
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_attention_with_sinks_is_computed_in_blocks_of_queries(monkeypatch):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 37, 8).unbind()
    mask, sinks = torch.ones(1, 37, 37, dtype=torch.bool).tril(), torch.randn(3, 1, 1)
    mask[:, 5] = False
    options = {"scaling": 0.3, "softcap": 2.0, "sink_logits": sinks}
    whole = attend_with_sinks(query, key, value, mask, **options)
    assert whole[:, :, 5].eq(0).all()
    monkeypatch.setattr("suffice.kv.attention.softmax._MAX_LOGITS", 2 * 3 * 37 * 5)
    torch.testing.assert_close(attend_with_sinks(query, key, value, mask, **options), whole)


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_ragged_attention_ignores_padding(dtype, new):
    """The second row has only padding in the first chunk, and some in the next one."""
    torch.manual_seed(0)
    storage = ragged_storage([[9, 3], [0, 0]], dtype)
    append(storage, 4, [0, 4], dtype)
    append(storage, new, None, dtype)
    query = torch.randn(2, 6, new, DIM, dtype=torch.float64).to(dtype)
    mask = torch.ones(2, 1, new, new, dtype=torch.bool).tril()
    mask[1, :, :, : new // 2] = False
    valid = slice(new // 2, None)  # the output of padding queries is not defined
    got, expected = attend(query, storage, mask, 0.3), dense_attention(query, storage, mask, 0.3)
    torch.testing.assert_close(got[0].double(), expected[0], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(got[1, valid].double(), expected[1, valid], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("new", [1, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ragged_attention_on_a_gpu_equals_dense_attention(dtype, new):
    torch.manual_seed(0)
    storage = ragged_storage([[400, 30, 0], [170, 333, 20]], dtype, value_dim=DIM)
    append(storage, new, None, dtype, value_dim=DIM)
    query = torch.randn(2, 6, new, DIM, dtype=torch.float64).to(dtype)
    expected = dense_attention(query, storage, None, 0.3)
    packed, tail = storage.packed, storage.tail
    on_gpu = RaggedStorage(
        PackedEntries(packed.keys.cuda(), packed.values.cuda(), packed.positions.cuda(), packed.lengths),
        Tail(tail.keys.cuda(), tail.values.cuda(), tail.positions.cuda()),
    )
    got = attend(query.cuda(), on_gpu, None, 0.3).cpu()
    torch.testing.assert_close(got.double(), expected, atol=2e-2, rtol=2e-2)


def storage_of(storage_type):
    """Return a storage of 2 × 2 × 40 random entries."""
    torch.manual_seed(0)
    entries = Entries(
        torch.randn(2, 2, 40, DIM),
        torch.randn(2, 2, 40, VALUE_DIM),
        torch.arange(40).expand(2, 2, 40),
        columns={"attention_received": torch.rand(2, 2, 40)},
    )
    return storage_type.gather(entries, torch.arange(40).expand(2, 2, 40))


def new_tokens(position, new=1):
    """Return keys, values and positions of new tokens; keys and values depend only on the position."""
    generator = torch.Generator().manual_seed(position)
    keys, values = (torch.randn(2, 2, new, d, generator=generator) for d in (DIM, VALUE_DIM))
    return keys, values, torch.arange(position, position + new).expand(2, -1)


def assert_entries(entries, keys, positions):
    assert torch.equal(entries.keys, keys)
    assert torch.equal(entries.positions[:, 0], positions)
    assert entries.columns["attention_received"].shape == entries.positions.shape


def buffer_addresses(storage):
    return [x.data_ptr() for x in storage.buffers]


def buffer_bytes(storage):
    """Return the bytes of all memory behind keys and values, spare slots included."""
    return sum(x.untyped_storage().nbytes() for x in storage.buffers)


every_storage = pytest.mark.parametrize("storage_type", [UniformStorage, RaggedStorage])


@every_storage
def test_copies_append_independently(storage_type):
    storage = storage_of(storage_type)
    storage.append(*new_tokens(40))
    keys, positions = storage.entries.keys, storage.entries.positions[:, 0]
    copies = [storage.copy() for _ in range(3)]
    addresses = buffer_addresses(storage)
    for number, own in enumerate((storage, *copies)):
        own.append(*new_tokens(50 + number))
        own.append(*new_tokens(60 + number))
    for number, own in enumerate((storage, *copies)):
        newest = [new_tokens(50 + number), new_tokens(60 + number)]
        expected = torch.cat([keys, *(x[0] for x in newest)], 2)
        assert_entries(own.entries, expected, torch.cat([positions, *(x[2] for x in newest)], 1))
        # The first storage that appends uses the shared spare slots, the others copy.
        assert (buffer_addresses(own) == addresses) == (number == 0)


@every_storage
def test_dropped_entries_stay_in_a_copy(storage_type):
    storage = storage_of(storage_type)
    for position in (40, 41):
        storage.append(*new_tokens(position))
    other, before = storage.copy(), storage.entries
    storage.drop_last(1)
    storage.append(*new_tokens(77))
    assert_entries(other.entries, before.keys, before.positions[:, 0])
    expected = torch.cat((before.keys[:, :, :-1], new_tokens(77)[0]), 2)
    assert_entries(storage.entries, expected, torch.cat((before.positions[:, 0, :-1], new_tokens(77)[2]), 1))


@every_storage
def test_spare_slots_are_at_most_a_sixteenth_and_are_reported(storage_type):
    storage = storage_of(storage_type)
    for position in range(40, 140):
        storage.append(*new_tokens(position))
        assert storage.nbytes == 2 * 2 * (position + 1) * 4 * (DIM + VALUE_DIM)
        assert storage.nbytes <= buffer_bytes(storage) <= storage.nbytes * 17 / 16
        assert buffer_bytes(storage) - storage.nbytes <= storage.nbytes_index
    # A chunk leaves no spare slots, because an eviction or an answer follows it.
    storage.append(*new_tokens(140, new=30))
    assert buffer_bytes(storage) == storage.nbytes


@every_storage
def test_rows_are_reordered_with_their_new_tokens(storage_type):
    storage = storage_of(storage_type)
    storage.append(*new_tokens(40))
    before = storage.entries
    storage.select_rows(torch.tensor([1, 0, 1]))
    assert_entries(storage.entries, before.keys[[1, 0, 1]], before.positions[[1, 0, 1], 0])
    assert torch.equal(storage.entries.values, before.values[[1, 0, 1]])


@every_storage
def test_storage_is_rebuilt_from_its_state_dict(storage_type):
    storage = storage_of(storage_type)
    for position in (40, 41):
        storage.append(*new_tokens(position))
    rebuilt = storage_type.from_state_dict(storage.state_dict())
    for each in (storage, rebuilt):
        each.append(*new_tokens(50))
    entries, expected = rebuilt.entries, storage.entries
    for name in ("keys", "values", "positions"):
        assert torch.equal(getattr(entries, name), getattr(expected, name))
    assert torch.equal(entries.columns["attention_received"], expected.columns["attention_received"])
    assert torch.equal(rebuilt.num_kept, storage.num_kept)
    assert rebuilt.nbytes_by_head == storage.nbytes_by_head


@every_storage
def test_storages_are_not_compacted_in_place_on_the_cpu(storage_type):
    storage, kept = storage_of(storage_type), torch.arange(20, 40).expand(2, 2, 20)
    assert not storage.can_compact_in_place(kept, torch.full((2, 2), 20))


def test_ragged_storages_cannot_be_compacted_in_place():
    storage = storage_of(RaggedStorage)
    with pytest.raises(NotImplementedError, match="RaggedStorage does not compact in place"):
        storage.compact_in_place(storage.entries, torch.arange(20, 40).expand(2, 2, 20))


@pytest.mark.parametrize("allocation", ["equal", "adakv"])
def test_prefill_and_decoding_may_run_in_different_gradient_modes(allocation):
    """Tensors of inference mode cannot be written to outside of it, and tensors with gradients not at all."""
    model, ids = tiny("llama"), prompt(60)
    found = []
    no_grad, inference, gradients = torch.no_grad, torch.inference_mode, torch.enable_grad
    for prefill_mode, decoding_mode in ((no_grad, no_grad), (inference, no_grad), (no_grad, gradients)):
        cache = CompressedCache(model, "knorm", 40, allocation=allocation)
        with prefill_mode():
            model(ids, past_key_values=cache)
            model(ids[:, :1], past_key_values=cache)
        with decoding_mode():
            logits = [model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(1, 6)]
        if decoding_mode is gradients:
            torch.stack(logits).sum().backward()
            model.zero_grad()
        found.append(torch.cat(logits, 1).detach().clone())
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


@pytest.mark.parametrize("heads", [1, 2])
def test_removed_entries_of_a_full_storage_are_not_overwritten(heads):
    """Several caches may store the same tensors, which are those of the model."""
    keys, values = torch.randn(1, heads, 9, 4), torch.randn(1, heads, 9, 4)
    entries = Entries(keys.clone(), values.clone(), torch.arange(9).expand(1, 1, 9))
    storage, other = (UniformStorage.from_all(entries, padded=False) for _ in range(2))
    storage.drop_last(3)
    new = torch.randn(1, heads, 1, 4)
    storage.append(new, -new, torch.tensor([[6]]))
    assert storage.positions.tolist() == [[list(range(7))] * heads]
    assert torch.equal(storage.keys, torch.cat((keys[:, :, :6], new), dim=2))
    assert torch.equal(other.keys, keys)
    assert torch.equal(other.values, values)
