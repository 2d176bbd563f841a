"""Compaction in place, through Triton's interpreter, against indexing."""

import pytest
import torch

pytest.importorskip("triton")

from suffice.kv.kernels import compaction
from suffice.kv.storage.uniform import UniformStorage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_kept_entries_stand_at_the_front(monkeypatch, dtype, tokens_first):
    monkeypatch.setattr(compaction, "_BLOCK_N", 16)
    generator = torch.Generator().manual_seed(0)
    batch, heads, tokens, dim, width = 2, 3, 90, 40, 50
    x = torch.randn(batch, heads, tokens, dim, generator=generator).to(dtype)
    if tokens_first:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    kept = torch.full((batch, heads, width), -1)
    counts = [[50, 1, 0], [33, 16, 17]]
    for row, own in enumerate(counts):
        for head, count in enumerate(own):
            kept[row, head, width - count :] = torch.randperm(tokens, generator=generator)[:count].sort().values
    before, buffer = x.clone(), x.data_ptr()
    compaction.move_to_front(x, kept)
    assert x.data_ptr() == buffer
    for row, own in enumerate(counts):
        for head, count in enumerate(own):
            index = kept[row, head, width - count :]
            assert x[row, head, :count].equal(before[row, head, index])


def test_all_entries_stay_where_they_are(monkeypatch):
    monkeypatch.setattr(compaction, "_BLOCK_N", 16)
    x = torch.randn(1, 1, 40, 16)
    before = x.clone()
    compaction.move_to_front(x, torch.arange(40).view(1, 1, -1))
    assert x.equal(before)


@pytest.fixture
def storage(monkeypatch):
    """Keys, values and a column of 24 entries, five of them appended, in buffers with room for more."""
    monkeypatch.setattr("suffice.kv.storage.uniform.usable", lambda *tensors: True)
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 2, 3, 19, 16, generator=generator)
    positions = torch.arange(19, dtype=torch.int32).expand(2, 3, -1).clone()
    made = UniformStorage(keys, values, positions, columns={"received": torch.rand(2, 3, 19, generator=generator)})
    for number in range(19, 24):
        entry = torch.randn(2, 3, 1, 16, generator=generator)
        made.append(entry, -entry, torch.full((2, 1), number))
    return made


def test_a_storage_keeps_entries_in_its_buffers(storage):
    kept = torch.stack(
        [torch.randperm(24, generator=torch.Generator().manual_seed(i))[:20].sort().values for i in range(6)]
    )
    kept = kept.view(2, 3, -1)
    counts = torch.full((2, 3), 20)
    expected = UniformStorage.gather(storage.entries, kept, counts)
    buffers = [x.data_ptr() for x in storage.tensors]
    assert storage.keep(storage.entries, kept, counts)
    assert storage.full
    for name in ("keys", "values", "positions"):
        assert getattr(storage, name).equal(getattr(expected, name))
    assert storage.columns["received"].equal(expected.columns["received"])
    entry = torch.ones(2, 3, 1, 16)
    storage.append(entry, entry, torch.full((2, 1), 24))
    assert [x.data_ptr() for x in storage.tensors] == buffers
    assert storage.keys[:, :, -1].eq(1).all()
    assert storage.columns["received"][..., -1].eq(0).all()


def test_buffers_that_a_copy_has_too_stay_as_they_are(storage):
    before, copied = storage.keys.clone(), storage.copy()
    kept = torch.arange(4, 24).expand(2, 3, -1)
    assert not storage.keep(storage.entries, kept, torch.full((2, 3), 20))
    assert not copied.keep(copied.entries, kept, torch.full((2, 3), 20))
    assert storage.keys.equal(before)


def test_heads_that_keep_unequally_are_gathered(storage):
    kept = torch.arange(4, 24).expand(2, 3, -1).clone()
    kept[0, 0, 0] = -1
    assert not storage.keep(storage.entries, kept, (kept >= 0).sum(-1))
    assert not storage.keep(storage.entries, kept, None)
