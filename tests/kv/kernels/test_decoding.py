"""Attention over heads of unequal length by kernels, run by Triton's interpreter; the oracle is float64."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from suffice.gpu import KernelFallbackError
from suffice.kv.backend.triton_backend import TRITON_BACKEND
from suffice.kv.kernels.decode_plan import DecodePlan
from suffice.kv.storage.base import LOGIT_BIAS
from suffice.kv.storage.ragged import PackedEntries, RaggedStorage, Tail

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def attend(query, storage, scaling, softcap=None, sinks=None):
    """Compute the attention of one new token by the kernels."""
    output = TRITON_BACKEND.ragged_attention(query, storage, None, scaling, softcap, sinks)
    assert storage.decode_plan is not None  # plain torch makes none
    return output


def storage_of(lengths, tail_positions, dim, value_dim, dtype, biased=False):
    generator = torch.Generator().manual_seed(0)
    batch, heads, new = len(lengths), len(lengths[0]), len(tail_positions[0])
    total = sum(itertools.chain(*lengths))
    keys, values = (torch.randn(total, d, generator=generator).to(dtype) for d in (dim, value_dim))
    tail = [torch.randn(batch, new, heads, d, generator=generator).to(dtype).transpose(1, 2) for d in (dim, value_dim)]
    columns = {LOGIT_BIAS: 2 * torch.randn(total, generator=generator)} if biased else {}
    packed = PackedEntries(keys, values, torch.zeros(total, dtype=torch.int32), lengths, columns=columns)
    return RaggedStorage(packed, Tail(*tail, torch.tensor(tail_positions, dtype=torch.int32)))


def exact_attention(query, storage, scaling, softcap=None, sinks=None):
    batch, heads, _, _ = query.shape
    packed, tail = storage.packed, storage.tail
    groups = heads // tail.keys.shape[1]
    out = torch.zeros(batch, 1, heads, packed.values.shape[-1], dtype=torch.float64)
    sizes = list(itertools.chain(*storage.lengths))
    packed_heads = list(zip(packed.keys.split(sizes), packed.values.split(sizes), strict=True))
    for row, head in itertools.product(range(batch), range(heads)):
        valid = tail.positions[row] >= 0
        packed_head = packed_heads[row * (heads // groups) + head // groups]
        tail_head = (tail.keys[row, head // groups][valid], tail.values[row, head // groups][valid])
        keys, values = (torch.cat(pair).double() for pair in zip(packed_head, tail_head, strict=True))
        logits = scaling * keys @ query[row, head, 0].double()
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        if packed.columns:
            bias = packed.columns[LOGIT_BIAS].split(sizes)[row * (heads // groups) + head // groups]
            logits[: len(bias)] += bias
        if sinks is not None:
            logits = torch.cat((logits, sinks[head : head + 1].double()))
        out[row, 0, head] = logits.softmax(0)[: len(values)] @ values
    return out


CASES = pytest.mark.parametrize(
    ("dtype", "lengths", "tail", "groups", "dim", "value_dim"),
    [
        (torch.float32, [[300, 1]], [[5, 6, 7]], 4, 64, 64),
        (torch.bfloat16, [[129, 0, 77], [3, 257, 64]], [[9, 10], [-1, 0]], 3, 128, 128),
        (torch.float16, [[40, 200]], [list(range(70))], 1, 80, 64),
        (torch.float32, [[0], [5]], [[4], [5]], 20, 64, 80),
    ],
)


@CASES
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_bias_of_packed_entries_is_added_to_the_logits(dtype, lengths, tail, groups, dim, value_dim, softcap):
    storage = storage_of(lengths, tail, dim, value_dim, dtype, biased=True)
    query = torch.randn(len(lengths), groups * len(lengths[0]), 1, dim, generator=torch.Generator().manual_seed(1))
    query = query.to(dtype)
    exact = exact_attention(query, storage, 0.2, softcap)
    torch.testing.assert_close(
        attend(query, storage, 0.2, softcap).double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )
    # Spare slots between the heads do not move the bias.
    for value in range(2):
        new = torch.full((len(lengths), len(lengths[0]), 1, dim), float(value), dtype=dtype)
        storage.append(new, new[..., :1].expand(-1, -1, -1, value_dim), torch.full((len(lengths), 1), 99))
        exact = exact_attention(query, storage, 0.2, softcap)
        torch.testing.assert_close(
            attend(query, storage, 0.2, softcap).double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


@CASES
def test_attention_equals_that_of_float64(dtype, lengths, tail, groups, dim, value_dim):
    storage = storage_of(lengths, tail, dim, value_dim, dtype)
    heads = groups * len(lengths[0])
    query = torch.randn(len(lengths), heads, 1, dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = exact_attention(query, storage, 0.2)
    for _ in range(2):  # the first call makes the plan, the second one uses it
        output = attend(query, storage, 0.2)
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@CASES
@pytest.mark.parametrize(("softcap", "has_sinks"), [(2.5, False), (None, True), (30.0, True)])
def test_softcap_and_sinks_equal_those_of_float64(dtype, lengths, tail, groups, dim, value_dim, softcap, has_sinks):
    storage = storage_of(lengths, tail, dim, value_dim, dtype)
    heads = groups * len(lengths[0])
    generator = torch.Generator().manual_seed(1)
    query = (3 * torch.randn(len(lengths), heads, 1, dim, generator=generator)).to(dtype)
    # Some sinks take nearly all attention, some nearly none.
    sinks = 8 * torch.randn(heads, generator=generator).to(dtype) if has_sinks else None
    exact = exact_attention(query, storage, 0.2, softcap, sinks)
    output = attend(query, storage, 0.2, softcap, sinks)
    torch.testing.assert_close(output.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_tanh_is_exact_for_small_and_large_numbers():
    """With one entry and a sink of 0, the output is sigmoid(softcap · tanh(logit / softcap))."""
    for logit in (1e-6, -1e-3, 0.02, -0.19, 0.2, -0.21, 1.0, -5.0, 90.0):
        keys, values = torch.zeros(1, 16), torch.ones(1, 16)
        keys[0, 0] = logit
        packed = PackedEntries(keys, values, torch.zeros(1, dtype=torch.int32), [[1]])
        storage = RaggedStorage(packed)
        output = attend(torch.ones(1, 1, 1, 16), storage, 1.0, 0.5, torch.zeros(1))
        exact = (torch.tensor(logit).double() / 0.5).tanh().mul(0.5).sigmoid()
        torch.testing.assert_close(output.double(), exact.expand(1, 1, 1, 16), rtol=2e-7, atol=0)


def test_plan_follows_changes_of_the_storage():
    storage = storage_of([[90, 10], [20, 60]], [[90], [60]], 64, 64, torch.float32)
    query = torch.randn(2, 2, 1, 64)
    attend(query, storage, 0.1)
    storage.select_rows(torch.tensor([1, 0]))
    torch.testing.assert_close(attend(query, storage, 0.1), exact_attention(query, storage, 0.1).float())
    # The first new token moves the heads apart, the next ones use the spare slots behind them.
    for _ in range(3):
        storage.append(*(torch.randn(2, 2, 1, 64) for _ in range(2)), torch.tensor([[91], [61]]))
        torch.testing.assert_close(attend(query, storage, 0.1), exact_attention(query, storage, 0.1).float())
    sizes = [sum(heads) for heads in storage.lengths]
    storage.keep_by_row(list((torch.arange(180) % 3 > 0).split(sizes)))
    torch.testing.assert_close(attend(query, storage, 0.1), exact_attention(query, storage, 0.1).float())


def test_row_without_readable_entries_gets_zeros():
    storage = storage_of([[0], [7]], [[-1], [7]], 64, 64, torch.float32)
    output = attend(torch.randn(2, 1, 1, 64), storage, 0.1)
    assert output[0].eq(0).all()
    assert output[1].isfinite().all()


@pytest.mark.parametrize("tail", [9, 700])
def test_plan_covers_every_entry_once(tail):
    lengths = [[700, 0, 129], [1, 5000, 128]]
    storage = storage_of(lengths, [list(range(tail))] * 2, 16, 16, torch.float32)
    packed = [(start, count - tail) for start, count in storage.spans]
    plan = DecodePlan.from_heads(packed, tail, torch.device("cpu"))
    times_covered = torch.zeros(len(storage.buffers[0]), dtype=torch.long)
    head_of = torch.full_like(times_covered, -1)
    for head, (start, count) in enumerate(storage.spans):
        head_of[start : start + count] = head
    longest = int(plan.items[:, 2].max())
    index = torch.full_like(times_covered, -1)  # of each entry among the packed ones
    index[head_of >= 0] = torch.cat([torch.arange(count) for _, count in storage.spans])
    for head, first, count, tail_start, packed_start in plan.items.tolist():
        start, num_packed = packed[head]
        assert tail_start == (-1 if first < start + num_packed else first - start - num_packed)
        assert head == head_of[first]
        if tail_start < 0:
            assert packed_start == index[first] + sum(length for _, length in packed[:head])
        count = tail - tail_start if count < 0 else count
        assert 0 < count <= longest
        times_covered[first : first + count] += 1
    assert torch.equal(times_covered, (head_of >= 0).long())
    last_parts = plan.items[plan.spans[1:].long() - 1]
    assert last_parts[:, 2].eq(-1).all()
    assert last_parts[:, 0].tolist() == list(range(6))


def test_long_tail_is_divided_into_parts():
    tail = [list(range(300)), [-1, -1, *range(298)]]
    storage = storage_of([[10], [20]], tail, 16, 16, torch.float32)
    query = torch.randn(2, 2, 1, 16)
    for _ in range(3):  # the plan stays the same while the last part grows
        torch.testing.assert_close(attend(query, storage, 0.1), exact_attention(query, storage, 0.1).float())
        assert (storage.decode_plan.items[:, 3] > 0).any()
        storage.append(*(torch.randn(2, 1, 1, 16) for _ in range(2)), torch.tensor([[300], [298]]))


def test_attention_is_computed_by_torch_if_the_kernels_do_not_fit_the_device(monkeypatch):
    def fail(*arguments, **options):
        raise KernelFallbackError

    storage = storage_of([[30, 2]], [[5, 6]], 16, 16, torch.float32)
    query = torch.randn(1, 4, 1, 16, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("suffice.kv.kernels.decoding.launch", fail)
    torch.testing.assert_close(attend(query, storage, 0.2), exact_attention(query, storage, 0.2).float())
