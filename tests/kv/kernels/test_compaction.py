"""Compaction in place, through Triton's interpreter, against indexing."""

import pytest
import torch

pytest.importorskip("triton")

from retain.kv.kernels import compaction


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_kept_entries_stand_at_the_front(monkeypatch, dtype, tokens_first):
    monkeypatch.setattr(compaction, "_ROWS", 16)
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
    monkeypatch.setattr(compaction, "_ROWS", 16)
    x = torch.randn(1, 1, 40, 16)
    before = x.clone()
    compaction.move_to_front(x, torch.arange(40).view(1, 1, -1))
    assert x.equal(before)
