"""Attention over heads of unequal length by kernel, through Triton's interpreter, against float64."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from suffice.kv.kernels.decoding import Plan
from suffice.kv.storage import ragged_attention
from suffice.kv.storage.ragged import RaggedStorage

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def storage_of(lengths, tail_positions, dim, value_dim, dtype):
    generator = torch.Generator().manual_seed(0)
    batch, heads, new = len(lengths), len(lengths[0]), len(tail_positions[0])
    total = sum(itertools.chain(*lengths))
    keys, values = (torch.randn(total, d, generator=generator).to(dtype) for d in (dim, value_dim))
    tail = [torch.randn(batch, new, heads, d, generator=generator).to(dtype).transpose(1, 2) for d in (dim, value_dim)]
    positions = torch.tensor(tail_positions, dtype=torch.int32)
    return RaggedStorage(keys, values, torch.zeros(total, dtype=torch.int32), lengths, (*tail, positions))


def oracle(query, storage, scaling):
    batch, heads, _, _ = query.shape
    group = heads // storage.tail_keys.shape[1]
    out = torch.zeros(batch, 1, heads, storage.packed_values.shape[-1], dtype=torch.float64)
    sizes = list(itertools.chain(*storage.lengths))
    packed = list(zip(storage.packed_keys.split(sizes), storage.packed_values.split(sizes), strict=True))
    for row, head in itertools.product(range(batch), range(heads)):
        there = storage.tail_positions[row] >= 0
        own = packed[row * (heads // group) + head // group]
        tail = (storage.tail_keys[row, head // group][there], storage.tail_values[row, head // group][there])
        keys, values = (torch.cat(pair).double() for pair in zip(own, tail, strict=True))
        out[row, 0, head] = (scaling * keys @ query[row, head, 0].double()).softmax(0) @ values
    return out


@pytest.mark.parametrize(
    ("dtype", "lengths", "tail", "group", "dim", "value_dim"),
    [
        (torch.float32, [[300, 1]], [[5, 6, 7]], 4, 64, 64),
        (torch.bfloat16, [[129, 0, 77], [3, 257, 64]], [[9, 10], [-1, 0]], 3, 128, 128),
        (torch.float16, [[40, 200]], [list(range(70))], 1, 80, 64),
        (torch.float32, [[0], [5]], [[4], [5]], 20, 64, 80),
    ],
)
def test_attention_is_that_of_float64(monkeypatch, dtype, lengths, tail, group, dim, value_dim):
    storage = storage_of(lengths, tail, dim, value_dim, dtype)
    heads = group * len(lengths[0])
    query = torch.randn(len(lengths), heads, 1, dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    monkeypatch.setattr(ragged_attention, "usable", lambda *tensors: True)
    exact = oracle(query, storage, 0.2)
    for _ in range(2):  # with a plan that is made, and with one that is there
        found = ragged_attention.attend(query, storage, None, 0.2)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_plan_follows_the_heads(monkeypatch):
    storage = storage_of([[90, 10], [20, 60]], [[90], [60]], 64, 64, torch.float32)
    query = torch.randn(2, 2, 1, 64)
    monkeypatch.setattr(ragged_attention, "usable", lambda *tensors: True)
    ragged_attention.attend(query, storage, None, 0.1)
    storage.rows(torch.tensor([1, 0]))
    torch.testing.assert_close(ragged_attention.attend(query, storage, None, 0.1), oracle(query, storage, 0.1).float())
    # With new tokens the heads move apart, and with more of them they stay where they are.
    for _ in range(3):
        storage.append(*(torch.randn(2, 2, 1, 64) for _ in range(2)), torch.tensor([[91], [61]]))
        torch.testing.assert_close(
            ragged_attention.attend(query, storage, None, 0.1), oracle(query, storage, 0.1).float()
        )
    storage.keep(torch.arange(180) % 3 > 0)
    torch.testing.assert_close(ragged_attention.attend(query, storage, None, 0.1), oracle(query, storage, 0.1).float())


def test_row_that_may_read_nothing_gets_zeros(monkeypatch):
    storage = storage_of([[0], [7]], [[-1], [7]], 64, 64, torch.float32)
    monkeypatch.setattr(ragged_attention, "usable", lambda *tensors: True)
    found = ragged_attention.attend(torch.randn(2, 1, 1, 64), storage, None, 0.1)
    assert found[0].eq(0).all()
    assert found[1].isfinite().all()


@pytest.mark.parametrize("tail", [9, 700])
def test_plan_covers_every_entry_once(tail):
    lengths = [[700, 0, 129], [1, 5000, 128]]
    storage = storage_of(lengths, [list(range(tail))] * 2, 16, 16, torch.float32)
    packed = [(start, count - tail) for start, count in storage.spans]
    plan = Plan.of(packed, tail, torch.device("cpu"))
    seen = torch.zeros(len(storage.tensors[0]), dtype=torch.long)
    head_of = torch.full_like(seen, -1)
    for head, (start, count) in enumerate(storage.spans):
        head_of[start : start + count] = head
    longest = max(count for *_, count, _ in plan.items.tolist())
    for head, first, count, new in plan.items.tolist():
        start, packed_count = packed[head]
        assert new == (-1 if first < start + packed_count else first - start - packed_count)
        assert head == head_of[first]
        count = tail - new if count < 0 else count
        assert 0 < count <= longest
        seen[first : first + count] += 1
    assert torch.equal(seen, (head_of >= 0).long())
    ends = plan.items[plan.spans[1:].long() - 1]
    assert ends[:, 2].eq(-1).all()
    assert ends[:, 0].tolist() == list(range(6))


def test_long_tail_is_read_in_parts(monkeypatch):
    monkeypatch.setattr(ragged_attention, "usable", lambda *tensors: True)
    tail = [list(range(300)), [-1, -1, *range(298)]]
    storage = storage_of([[10], [20]], tail, 16, 16, torch.float32)
    query = torch.randn(2, 2, 1, 16)
    for _ in range(3):  # the plan stays where it is while the last part grows
        torch.testing.assert_close(
            ragged_attention.attend(query, storage, None, 0.1), oracle(query, storage, 0.1).float()
        )
        assert (storage.plan.items[:, 3] > 0).any()
        storage.append(*(torch.randn(2, 1, 1, 16) for _ in range(2)), torch.tensor([[300], [298]]))
