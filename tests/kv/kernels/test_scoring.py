"""Scores by kernel, through Triton's interpreter, against float64."""

import math
from functools import partial

import pytest
import torch
from suffice.kv.policy.fused import FusedFactor, fused_log_weights

from suffice.gpu import KernelFallbackError, disable_kernels, kernels_enabled, launch
from suffice.kv import Signals, get_policy
from suffice.kv.policy.attention_stats import Verdicts
from suffice.kv.policy.capacity_share import capacity_share
from suffice.kv.policy.weights import KeySalience, WindowAttention

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from suffice.kv.kernels.cholesky import inverse_factor
from suffice.kv.kernels.gram import weighted_gram
from suffice.kv.kernels.leverage import factorize, inner_products

# The interpreter computes with NumPy, which warns of log 0 and of NaN, where a GPU gives −inf and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Largest error of vᵀA⁻¹v, relative: the parts of a 16-bit factor hold 16 bits (bfloat16) or more.
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 3e-4, torch.float16: 1e-4}


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr("suffice.kv.policy.fused.usable", lambda *tensors: True)


class Kernel:
    """A kernel by name, launched as Triton's are."""

    def __init__(self, grids, name):
        self.grids, self.name = grids, name

    def __getitem__(self, grid):
        return self.grids[grid]

    def __hash__(self):
        return hash(self.name)

    def __eq__(self, other):
        return self.name == other.name


def values_of(batch, heads, tokens, dim, dtype, seed=0):
    """Values whose dimensions differ in scale and hang together, as real ones do; tokens before heads in memory."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator) * torch.logspace(0, -1.5, dim)
    values = torch.randn(batch, tokens, heads, dim, generator=generator) @ mixing
    return values.transpose(1, 2).to(dtype)


def leverage_oracle(values, log_weights, ridge):
    values, weights = values.double(), (log_weights - log_weights.amax(-1, keepdim=True)).double().exp()
    gram = values.mT @ (values * weights[..., None])
    noise = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    matrix = gram + noise[..., None, None] * torch.eye(values.shape[-1], dtype=torch.float64)
    return gram, (values * torch.linalg.solve(matrix, values.mT).mT).sum(-1)


@pytest.mark.parametrize(
    ("dtype", "tokens", "dim"),
    [
        (torch.float32, 301, 64),
        (torch.float32, 37, 40),
        (torch.bfloat16, 261, 128),
        (torch.bfloat16, 1, 16),
        (torch.float16, 133, 32),
    ],
)
def test_leverage_is_that_of_float64(dtype, tokens, dim):
    values = values_of(1, 1, tokens, dim, dtype)
    log_weights = torch.randn(1, 1, tokens, generator=torch.Generator().manual_seed(1)) * 4 - 30
    if tokens > 3:
        log_weights[..., :3] = -math.inf
        values[..., :3, :] = math.nan  # what does not exist is not looked at
    gram, inner = leverage_oracle(values.nan_to_num(0), log_weights, 0.1)
    found = weighted_gram(values, log_weights).double()
    found = (found + found.mT)[..., :dim, :dim] / 2
    largest = gram.diagonal(dim1=-2, dim2=-1).amax()
    assert (found - gram).abs().max() < TOLERANCE[dtype] / 5 * largest
    there = log_weights > -math.inf
    result = inner_products(values, log_weights, factorize(values, log_weights, 0.1))
    torch.testing.assert_close(result[there].double(), inner[there], rtol=TOLERANCE[dtype], atol=0)


def test_factor_is_inverted_block_by_block():
    gram = leverage_oracle(values_of(1, 1, 90, 64, torch.float32), torch.zeros(1, 1, 90), 0.1)[0]
    inverse, noise, failed = inverse_factor(gram.float(), 64, 0.01)
    matrix = torch.eye(64, dtype=torch.float64) + gram / noise.double()
    exact = torch.linalg.inv(torch.linalg.cholesky(matrix))
    torch.testing.assert_close(inverse.double(), exact, rtol=0, atol=1e-5)
    assert not failed.any()


@pytest.mark.parametrize("broken", [math.nan, math.inf, 0.0, 1e30])
def test_values_that_a_kernel_cannot_hold_are_left_to_torch(broken):
    values = torch.full((1, 1, 20, 16), broken)
    assert factorize(values, torch.zeros(1, 1, 20), 0.1).failed.all()


def test_values_that_a_kernel_cannot_hold_are_scored_all_the_same(on_cpu):
    values = torch.zeros(1, 1, 20, 16)
    values[..., 3, :] = 1e-9
    signals = Signals(values, values, values)
    policy = get_policy("capkv")
    assert FusedFactor.of(torch.zeros(1, 1, 20), 0.1, signals) is None
    assert policy.score(signals)[..., 3].isfinite().all()
    # Who settles what is asked learns of it then.
    verdicts = Verdicts()
    policy.score(Signals(values, values, values, verdicts=verdicts))
    with pytest.raises(KernelFallbackError):
        verdicts.settle()


def test_a_kernel_gets_as_many_stages_as_fit(monkeypatch):
    tried = []

    def small(*arguments, num_stages, **options):
        tried.append(num_stages)
        if num_stages > room:
            raise OutOfResources(200_000, 100_000, "shared memory")

    kernel, x = {(1,): small}, torch.zeros(1)
    monkeypatch.setattr("suffice.gpu._reduced_stages", {})
    room = 2
    launch(Kernel(kernel, "a"), (1,), x, num_stages=3)
    launch(Kernel(kernel, "a"), (1,), x, num_stages=3)
    assert tried == [3, 2, 2]
    room = 0
    with pytest.raises(KernelFallbackError):
        launch(Kernel(kernel, "b"), (1,), x, num_stages=2)


def test_what_no_device_has_room_for_is_left_to_torch(on_cpu, monkeypatch):
    def none(*arguments, **options):
        raise KernelFallbackError

    generator = torch.Generator().manual_seed(6)
    queries, keys = (torch.randn(1, heads, 60, 16, generator=generator) for heads in (4, 2))
    policy = get_policy("capkv-profile")
    with disable_kernels():
        monkeypatch.setattr("suffice.kv.policy.fused.usable", lambda *tensors: kernels_enabled())
        expected = policy.score(Signals(queries, keys, keys))
    monkeypatch.setattr("suffice.kv.kernels.leverage.launch", none)
    torch.testing.assert_close(policy.score(Signals(queries, keys, keys)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_of_the_capacity_is_that_of_plain_torch(monkeypatch, dtype):
    generator = torch.Generator().manual_seed(4)
    queries, keys = (2 * torch.randn(2, heads, 120, 32, generator=generator).to(dtype) for heads in (4, 2))
    signals = partial(Signals, queries, keys, values_of(2, 2, 120, 32, dtype))
    kept = torch.stack([torch.randperm(120, generator=generator)[:30].sort().values for _ in range(4)]).view(2, 2, -1)
    kept[0, 0, :12] = -1
    kept[1, 1] = -1
    exact = capacity_share(signals(), kept)
    assert 0 < exact[0, 0] < exact[0, 1] < 1
    monkeypatch.setattr("suffice.kv.policy.fused.usable", lambda *tensors: True)
    torch.testing.assert_close(capacity_share(signals(), kept), exact, rtol=1e-4, atol=1e-5)


def log_weight_oracle(queries, keys, start, window, pool, beta, skip, recent):
    """Log weights of the default policy for one head: queries [group, tokens, dim], keys [tokens, dim], float64."""
    tokens, dim = keys.shape
    logits = queries[:, -window:] @ keys.mT / math.sqrt(dim)
    number = torch.arange(tokens)
    for j in range(window):
        hidden = (number > tokens - window + j) | (number < start)
        logits[:, j, hidden] = -math.inf
    attention = logits.softmax(-1)[:, max(0, start - (tokens - window)) :].sum((0, 1)) / (len(queries) * window)
    near = torch.nn.functional.pad(attention, (pool // 2, pool // 2)).unfold(0, pool, 1).mean(-1)[start:]
    keys = keys[start:]
    asked = queries[:, max(tokens - recent, start + skip if tokens - start > skip else start) :].flatten(0, 1)
    expected = keys @ asked.mean(0) / math.sqrt(dim) + keys**2 @ asked.var(0, correction=0) / (2 * dim)
    unit = keys / keys.norm(dim=-1, keepdim=True)
    centre = unit.mean(0) / unit.mean(0).norm()
    salience = torch.exp(-beta * (unit @ centre))
    total = near / near.sum() + expected.softmax(0) + 2 * salience / salience.sum()
    return torch.cat((torch.full((start,), -math.inf, dtype=torch.float64), total.log()))


@pytest.mark.parametrize(
    ("dtype", "tokens", "dim", "heads", "group", "padding"),
    [
        (torch.bfloat16, 293, 64, 2, 2, None),
        (torch.float16, 293, 64, 1, 2, None),
        (torch.bfloat16, 130, 128, 1, 4, (0, 7)),
        (torch.float32, 130, 128, 1, 4, (0, 7)),
        (torch.bfloat16, 70, 80, 1, 1, (60, 0)),
        (torch.float32, 3, 64, 1, 3, None),
        (torch.bfloat16, 150, 64, 1, 8, None),
    ],
)
def test_log_weights_are_those_of_float64(on_cpu, dtype, tokens, dim, heads, group, padding):
    batch = len(padding or (0,))
    generator = torch.Generator().manual_seed(2)
    queries, keys = (
        (2 * torch.randn(batch, tokens, count, dim, generator=generator)).transpose(1, 2).to(dtype)
        for count in (heads * group, heads)
    )
    starts = torch.tensor(padding or (0,))
    valid = None if padding is None else torch.arange(tokens) >= starts[:, None]
    signals = Signals(queries, keys, keys, valid=valid)
    policy = get_policy("capkv")
    found = fused_log_weights(policy.weights, signals).double()
    window = min(16, tokens)
    for row in range(batch):
        for head in range(heads):
            own = queries[row, head * group : (head + 1) * group].double()
            exact = log_weight_oracle(own, keys[row, head].double(), int(starts[row]), window, 5, 4, 4, 512)
            torch.testing.assert_close(found[row, head], exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_key_of_no_length_is_like_any_other(monkeypatch, dtype):
    generator = torch.Generator().manual_seed(5)
    queries, keys = (torch.randn(1, heads, 90, 32, generator=generator).to(dtype) for heads in (4, 2))
    keys[0, 0, 7] = 0
    keys[0, 1, 8] = 1e-4
    weights = get_policy("capkv-profile").weights
    plain = weights.log(Signals(queries, keys, keys))
    monkeypatch.setattr("suffice.kv.policy.fused.usable", lambda *tensors: True)
    found = fused_log_weights(weights, Signals(queries, keys, keys))
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["capkv", "capkv-profile"])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("state", ["whole", "padded", "evicted", "short"])
def test_policy_scores_alike_with_and_without_kernels(monkeypatch, state, group, name):
    batch, heads, tokens, dim = 2, 2, 3 if state == "short" else 60, 16
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(batch, heads * group, 3 if state == "short" else 44, dim, generator=generator)
    keys = torch.randn(batch, heads, tokens, dim, generator=generator)
    values = values_of(batch, heads, tokens, dim, torch.float32)
    if state == "evicted":
        # 40 of 120 tokens kept, the newest 20 among them, and a row with ten places empty; a query is padding.
        kept = torch.stack([torch.randperm(100, generator=generator)[:40].sort().values for _ in range(batch)])
        positions = torch.cat((kept, torch.arange(100, 120).expand(batch, -1)), dim=1)[:, None]
        positions[1, 0] -= 100
        options = {"positions": positions, "query_positions": torch.arange(76, 120) - torch.tensor([[0], [100]])}
    else:
        options = {"valid": torch.arange(tokens) >= torch.tensor([[0], [11]])} if state == "padded" else {}
    policy = get_policy(name)
    plain = policy.score(Signals(queries, keys, values, **options))
    monkeypatch.setattr("suffice.kv.policy.fused.usable", lambda *tensors: True)
    signals = Signals(queries, keys, values, **options)
    assert fused_log_weights(policy.weights, signals) is not None
    assert signals.masked(policy.score(signals)).isfinite().eq(plain.isfinite()).all()
    torch.testing.assert_close(policy.score(signals), plain, rtol=1e-4, atol=1e-4)
    shares = policy.estimator.shares(policy.weights, policy.directions, signals)
    monkeypatch.undo()
    exact = policy.estimator.shares(policy.weights, policy.directions, Signals(queries, keys, values, **options))
    torch.testing.assert_close(shares, exact, rtol=1e-4, atol=1e-6)


def test_other_weights_are_left_to_torch(on_cpu):
    x = torch.randn(1, 1, 8, 16)
    signals = Signals(x, x, x)
    assert fused_log_weights(WindowAttention() + KeySalience(), signals) is None
    assert fused_log_weights(get_policy("snapkv").weights, signals) is None
    assert fused_log_weights(get_policy("capkv").weights, Signals(x, x, x, attention=torch.ones(1, 1, 8, 8))) is None
