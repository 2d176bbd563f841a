"""Compaction in place by a kernel, run by Triton's interpreter; the oracle is indexing."""

import pytest
import torch

pytest.importorskip("triton")

from suffice.kv.kernels import compaction
from suffice.kv.storage.base import Entries
from suffice.kv.storage.uniform import UniformStorage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_kept_entries_move_to_the_front(monkeypatch, dtype, tokens_first):
    monkeypatch.setattr(compaction, "_BLOCK_N", 16)
    generator = torch.Generator().manual_seed(0)
    batch, heads, tokens, dim, width = 2, 3, 90, 40, 50
    x = torch.randn(batch, heads, tokens, dim, generator=generator).to(dtype)
    if tokens_first:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    kept = torch.full((batch, heads, width), -1)
    counts = [[50, 1, 0], [33, 16, 17]]
    for row, row_counts in enumerate(counts):
        for head, count in enumerate(row_counts):
            kept[row, head, width - count :] = torch.randperm(tokens, generator=generator)[:count].sort().values
    before, address = x.clone(), x.data_ptr()
    compaction.move_to_front(x, kept)
    assert x.data_ptr() == address
    for row, row_counts in enumerate(counts):
        for head, count in enumerate(row_counts):
            index = kept[row, head, width - count :]
            assert x[row, head, :count].equal(before[row, head, index])


def test_nothing_moves_if_all_entries_are_kept(monkeypatch):
    monkeypatch.setattr(compaction, "_BLOCK_N", 16)
    x = torch.randn(1, 1, 40, 16)
    before = x.clone()
    compaction.move_to_front(x, torch.arange(40).view(1, 1, -1))
    assert x.equal(before)


@pytest.fixture
def storage(monkeypatch):
    """A storage of 24 entries, five of them appended, in buffers with spare slots."""
    monkeypatch.setattr("suffice.kv.storage.uniform.usable", lambda *tensors: True)
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 2, 3, 19, 16, generator=generator)
    positions = torch.arange(19, dtype=torch.int32).expand(2, 3, -1).clone()
    received = torch.rand(2, 3, 19, generator=generator)
    storage = UniformStorage(Entries(keys, values, positions, columns={"attention_received": received}))
    for position in range(19, 24):
        entry = torch.randn(2, 3, 1, 16, generator=generator)
        storage.append(entry, -entry, torch.full((2, 1), position))
    return storage


def test_storage_is_compacted_in_its_buffers(storage):
    kept = torch.stack(
        [torch.randperm(24, generator=torch.Generator().manual_seed(i))[:20].sort().values for i in range(6)]
    )
    kept = kept.view(2, 3, -1)
    counts = torch.full((2, 3), 20)
    expected = UniformStorage.gather(storage.entries, kept, counts)
    addresses = [x.data_ptr() for x in storage.buffers]
    assert storage.can_compact_in_place(kept, counts)
    storage.compact_in_place(storage.entries, kept)
    assert storage.is_full
    for name in ("keys", "values", "positions"):
        assert getattr(storage, name).equal(getattr(expected, name))
    assert storage.columns["attention_received"].equal(expected.columns["attention_received"])
    entry = torch.ones(2, 3, 1, 16)
    storage.append(entry, entry, torch.full((2, 1), 24))
    assert [x.data_ptr() for x in storage.buffers] == addresses
    assert storage.keys[:, :, -1].eq(1).all()
    assert storage.columns["attention_received"][..., -1].eq(0).all()


def test_buffers_that_a_copy_shares_are_not_compacted(storage):
    before, copied = storage.keys.clone(), storage.copy()
    kept, counts = torch.arange(4, 24).expand(2, 3, -1), torch.full((2, 3), 20)
    assert not storage.can_compact_in_place(kept, counts)
    assert not copied.can_compact_in_place(kept, counts)
    assert storage.keys.equal(before)


def test_heads_that_keep_different_numbers_are_not_compacted(storage):
    kept = torch.arange(4, 24).expand(2, 3, -1).clone()
    kept[0, 0, 0] = -1
    assert not storage.can_compact_in_place(kept, (kept >= 0).sum(-1))
    assert not storage.can_compact_in_place(kept, None)
