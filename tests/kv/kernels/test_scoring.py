"""Scores and capacities by kernels, run by Triton's interpreter; the oracles are float64 and plain torch."""

import math
from functools import partial

import pytest
import torch

from suffice.gpu import KernelFallbackError, disable_kernels, kernels_enabled, launch
from suffice.kv import get_policy
from suffice.kv.backend.torch_backend import TORCH_BACKEND, TorchFactor
from suffice.kv.backend.triton_backend import TRITON_BACKEND, choose_backend, fused_log_weights
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.capacity_share import capacity_share
from suffice.kv.policy.deferred_checks import DeferredChecks
from suffice.kv.policy.directions import Value
from suffice.kv.policy.layer_context import EntryPositions
from suffice.kv.policy.weights import KeySalience, WindowAttention

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from suffice.kv.kernels.cholesky import inverse_factor
from suffice.kv.kernels.gram import weighted_gram
from suffice.kv.kernels.leverage import factorize, quadratic_forms

# The interpreter computes with NumPy, which warns where a GPU silently returns −inf or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Largest relative error of vᵀA⁻¹v. The two parts of a 16-bit factor together have at least 16 bits (bfloat16).
TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 3e-4, torch.float16: 1e-4}


class FakeKernel:
    """A kernel that is launched like those of Triton."""

    def __init__(self, grids, name):
        self.grids, self.name = grids, name

    def __getitem__(self, grid):
        return self.grids[grid]

    def __hash__(self):
        return hash(self.name)

    def __eq__(self, other):
        return self.name == other.name


def random_values(batch, heads, tokens, dim, dtype, seed=0):
    """Return values whose dimensions differ in scale and correlate; in memory, tokens come before heads."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator) * torch.logspace(0, -1.5, dim)
    values = torch.randn(batch, tokens, heads, dim, generator=generator) @ mixing
    return values.transpose(1, 2).to(dtype)


def exact_leverage(values, log_weights, ridge):
    """Return the Gram matrix Σ w v vᵀ and vᵀA⁻¹v in float64."""
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
def test_leverage_equals_that_of_float64(dtype, tokens, dim):
    values = random_values(1, 1, tokens, dim, dtype)
    log_weights = torch.randn(1, 1, tokens, generator=torch.Generator().manual_seed(1)) * 4 - 30
    if tokens > 3:
        log_weights[..., :3] = -math.inf
        values[..., :3, :] = math.nan  # entries that do not exist are not used
    exact_gram, exact = exact_leverage(values.nan_to_num(0), log_weights, 0.1)
    gram = weighted_gram(values, log_weights).double()
    gram = (gram + gram.mT)[..., :dim, :dim] / 2
    largest = exact_gram.diagonal(dim1=-2, dim2=-1).amax()
    assert (gram - exact_gram).abs().max() < TOLERANCE[dtype] / 5 * largest
    valid = log_weights > -math.inf
    result = quadratic_forms(values, log_weights, factorize(values, log_weights, 0.1))
    torch.testing.assert_close(result[valid].double(), exact[valid], rtol=TOLERANCE[dtype], atol=0)


def test_blocked_inverse_factor_equals_that_of_float64():
    gram = exact_leverage(random_values(1, 1, 90, 64, torch.float32), torch.zeros(1, 1, 90), 0.1)[0]
    inverse, noise, failed = inverse_factor(gram.float(), 64, 0.01)
    matrix = torch.eye(64, dtype=torch.float64) + gram / noise.double()
    exact = torch.linalg.inv(torch.linalg.cholesky(matrix))
    torch.testing.assert_close(inverse.double(), exact, rtol=0, atol=1e-5)
    assert not failed.any()


@pytest.mark.parametrize("number", [math.nan, math.inf, 0.0, 1e30])
def test_values_that_need_more_than_float32_are_reported(number):
    values = torch.full((1, 1, 20, 16), number)
    assert factorize(values, torch.zeros(1, 1, 20), 0.1).failed.all()


def test_values_that_need_more_than_float32_are_scored_by_torch():
    values = torch.zeros(1, 1, 20, 16)
    values[..., 3, :] = 1e-9
    stats = AttentionStats(values, values, values)
    policy = get_policy("capkv")
    factor = TRITON_BACKEND.factorize(torch.zeros(1, 1, 20), Value(), stats, 0.1, relative=True)
    assert type(factor) is TorchFactor
    assert policy.score(stats, TRITON_BACKEND)[..., 3].isfinite()
    # With deferred checks, the caller learns of it when it checks.
    checks = DeferredChecks()
    policy.score(AttentionStats(values, values, values, checks=checks), TRITON_BACKEND)
    with pytest.raises(KernelFallbackError):
        checks.raise_if_failed()


def test_launch_reduces_the_stages_until_a_kernel_fits(monkeypatch):
    tried = []

    def small(*arguments, num_stages, **options):
        tried.append(num_stages)
        if num_stages > largest:
            raise OutOfResources(200_000, 100_000, "shared memory")

    grids, x = {(1,): small}, torch.zeros(1)
    monkeypatch.setattr("suffice.gpu._reduced_stages", {})
    largest = 2
    launch(FakeKernel(grids, "a"), (1,), x, num_stages=3)
    launch(FakeKernel(grids, "a"), (1,), x, num_stages=3)
    assert tried == [3, 2, 2]
    largest = 0
    with pytest.raises(KernelFallbackError):
        launch(FakeKernel(grids, "b"), (1,), x, num_stages=2)


@pytest.mark.parametrize("module", ["mixture", "gram", "cholesky", "leverage"])
def test_scores_are_computed_by_torch_if_a_kernel_does_not_fit_the_device(monkeypatch, module):
    def fail(*arguments, **options):
        raise KernelFallbackError

    generator = torch.Generator().manual_seed(6)
    queries, keys = (torch.randn(1, heads, 60, 16, generator=generator) for heads in (4, 2))
    policy = get_policy("capkv-profile")
    expected = policy.score(AttentionStats(queries, keys, keys))
    monkeypatch.setattr(f"suffice.kv.kernels.{module}.launch", fail)
    scores = policy.score(AttentionStats(queries, keys, keys), TRITON_BACKEND)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_backend_is_chosen_by_the_device_and_can_be_disabled(monkeypatch):
    x = torch.zeros(1, 1, 4, 16)
    assert choose_backend(x) is TORCH_BACKEND
    monkeypatch.setattr("suffice.kv.backend.triton_backend.can_use_kernels", lambda *tensors: kernels_enabled())
    assert choose_backend(x) is TRITON_BACKEND
    with disable_kernels():
        assert choose_backend(x) is TORCH_BACKEND


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_capacity_share_equals_that_of_torch(monkeypatch, dtype):
    generator = torch.Generator().manual_seed(4)
    queries, keys = (2 * torch.randn(2, heads, 120, 32, generator=generator).to(dtype) for heads in (4, 2))
    make_stats = partial(AttentionStats, queries, keys, random_values(2, 2, 120, 32, dtype))
    kept = torch.stack([torch.randperm(120, generator=generator)[:30].sort().values for _ in range(4)]).view(2, 2, -1)
    kept[0, 0, :12] = -1
    kept[1, 1] = -1
    exact = capacity_share(make_stats(), kept)
    assert 0 < exact[0, 0] < exact[0, 1] < 1
    monkeypatch.delattr("suffice.kv.backend.torch_backend.factorize")  # so that a fallback would raise
    torch.testing.assert_close(capacity_share(make_stats(), kept, TRITON_BACKEND), exact, rtol=1e-4, atol=1e-5)


def exact_log_weights(queries, keys, start, window_size, kernel_size, beta, skip, recent):
    """Return the log weights of the policy `capkv` for one KV head in float64.

    Args:
        queries: [groups, tokens, dim].
        keys: [tokens, dim].
        start: index of the first token that is not padding.
        window_size: of window attention.
        kernel_size: of its pooling.
        beta: of salience.
        skip: number of first tokens whose queries are left out of expected attention.
        recent: number of newest queries that it uses.

    """
    tokens, dim = keys.shape
    logits = queries[:, -window_size:] @ keys.mT / math.sqrt(dim)
    index = torch.arange(tokens)
    for j in range(window_size):
        hidden = (index > tokens - window_size + j) | (index < start)
        logits[:, j, hidden] = -math.inf
    first = max(0, start - (tokens - window_size))
    attention = logits.softmax(-1)[:, first:].sum((0, 1)) / (len(queries) * window_size)
    padding = (kernel_size // 2, kernel_size // 2)
    pooled = torch.nn.functional.pad(attention, padding).unfold(0, kernel_size, 1).mean(-1)[start:]
    keys = keys[start:]
    first = max(tokens - recent, start + skip if tokens - start > skip else start)
    used = queries[:, first:].flatten(0, 1)
    expected = keys @ used.mean(0) / math.sqrt(dim) + keys**2 @ used.var(0, correction=0) / (2 * dim)
    unit = keys / keys.norm(dim=-1, keepdim=True)
    centre = unit.mean(0) / unit.mean(0).norm()
    salience = torch.exp(-beta * (unit @ centre))
    total = pooled / pooled.sum() + expected.softmax(0) + 2 * salience / salience.sum()
    return torch.cat((torch.full((start,), -math.inf, dtype=torch.float64), total.log()))


@pytest.mark.parametrize(
    ("dtype", "tokens", "dim", "heads", "groups", "padding"),
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
def test_log_weights_equal_those_of_float64(dtype, tokens, dim, heads, groups, padding):
    batch = len(padding or (0,))
    generator = torch.Generator().manual_seed(2)
    queries, keys = (
        (2 * torch.randn(batch, tokens, count, dim, generator=generator)).transpose(1, 2).to(dtype)
        for count in (heads * groups, heads)
    )
    starts = torch.tensor(padding or (0,))
    valid = None if padding is None else torch.arange(tokens) >= starts[:, None]
    stats = AttentionStats(queries, keys, keys, positions=EntryPositions(valid=valid))
    log_weights = fused_log_weights(get_policy("capkv").weights, stats).double()
    window_size = min(16, tokens)
    for row in range(batch):
        for head in range(heads):
            group = queries[row, head * groups : (head + 1) * groups].double()
            exact = exact_log_weights(group, keys[row, head].double(), int(starts[row]), window_size, 5, 4, 4, 512)
            torch.testing.assert_close(log_weights[row, head], exact, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_weights_of_keys_of_length_zero_equal_those_of_torch(dtype):
    generator = torch.Generator().manual_seed(5)
    queries, keys = (torch.randn(1, heads, 90, 32, generator=generator).to(dtype) for heads in (4, 2))
    keys[0, 0, 7] = 0
    keys[0, 1, 8] = 1e-4
    weights = get_policy("capkv-profile").weights
    expected = weights.log_weights(AttentionStats(queries, keys, keys))
    log_weights = fused_log_weights(weights, AttentionStats(queries, keys, keys))
    torch.testing.assert_close(log_weights, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["capkv", "capkv-profile"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("case", ["complete", "padded", "evicted", "short"])
def test_scores_and_contributions_equal_those_of_torch(case, groups, name):
    batch, heads, tokens, dim = 2, 2, 3 if case == "short" else 60, 16
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(batch, heads * groups, 3 if case == "short" else 44, dim, generator=generator)
    keys = torch.randn(batch, heads, tokens, dim, generator=generator)
    values = random_values(batch, heads, tokens, dim, torch.float32)
    where = None
    if case == "evicted":
        # 40 of the first 100 tokens and the newest 20 are kept. The second row has 10 empty slots and a padding query.
        kept = torch.stack([torch.randperm(100, generator=generator)[:40].sort().values for _ in range(batch)])
        positions = torch.cat((kept, torch.arange(100, 120).expand(batch, -1)), dim=1)[:, None]
        positions[1, 0] -= 100
        where = EntryPositions(entries=positions, queries=torch.arange(76, 120) - torch.tensor([[0], [100]]))
    elif case == "padded":
        where = EntryPositions(valid=torch.arange(tokens) >= torch.tensor([[0], [11]]))
    policy = get_policy(name)
    stats, exact_stats = (AttentionStats(queries, keys, values, positions=where) for _ in range(2))
    exact = policy.score(exact_stats)
    assert fused_log_weights(policy.weights, stats) is not None
    scores = policy.score(stats, TRITON_BACKEND)
    assert stats.mask_invalid(scores).isfinite().eq(exact.isfinite()).all()
    torch.testing.assert_close(scores, exact, rtol=1e-4, atol=1e-4)
    objectives = policy.objective(stats, TRITON_BACKEND), policy.objective(exact_stats)
    contributions, exact_contributions = map(policy.estimator.contributions, objectives)
    torch.testing.assert_close(contributions, exact_contributions, rtol=1e-4, atol=1e-6)


def test_factors_of_a_product_are_computed_by_kernels(monkeypatch):
    generator = torch.Generator().manual_seed(7)
    queries, keys = (torch.randn(1, heads, 60, 16, generator=generator) for heads in (4, 2))
    policy = get_policy("capkv-salience")
    expected = policy.score(AttentionStats(queries, keys, keys))
    found = []

    def record(weights, stats):
        result = fused_log_weights(weights, stats)
        found.append(result is not None)
        return result

    monkeypatch.setattr("suffice.kv.backend.triton_backend.fused_log_weights", record)
    scores = policy.score(AttentionStats(queries, keys, keys), TRITON_BACKEND)
    assert found == [True, False]  # the sum, and the salience
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_other_weights_are_not_computed_by_kernels():
    x = torch.randn(1, 1, 8, 16)
    stats = AttentionStats(x, x, x)
    with_attention = AttentionStats(x, x, x, attention=torch.ones(1, 1, 8, 8))
    assert fused_log_weights(WindowAttention() + KeySalience(), stats) is None
    assert fused_log_weights(get_policy("snapkv").weights, stats) is None
    assert fused_log_weights(get_policy("capkv").weights, with_attention) is None
