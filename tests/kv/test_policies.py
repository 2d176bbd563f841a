"""Each policy against its paper's formula, written independently and naively."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from suffice.information import capacity, select_by_leverage
from suffice.kv import Greedy, Policy, Rounds, Signals, get_policy
from suffice.kv.budget.allocation import Equal, MarginalCapacity, PooledScores, Pyramid, Request
from suffice.kv.budget.head_profile import HeadProfile, Profile
from suffice.kv.budget.protection import Protection, tokens_allowed
from suffice.kv.hf.rotary import rotate_half
from suffice.kv.policy.directions import Constant, OutputValue, Value
from suffice.kv.policy.estimators import Leverage, Trace
from suffice.kv.policy.sampled_attention import sampled_attention
from suffice.kv.policy.selection import Budget
from suffice.kv.policy.weights import (
    ExpectedAttention,
    KeyNorm,
    KeySalience,
    MeanQuery,
    Product,
    Random,
    SampledAttention,
    Sum,
    Uniform,
    WindowAttention,
)

HEADS, KV, N, D, HIDDEN = 4, 2, 90, 8, 24


def angles(positions):
    frequencies = 10_000.0 ** (-torch.arange(0, D, 2) / D)
    turned = positions[..., None].float() * frequencies
    return torch.cat((turned, turned), -1)


def rotary(positions):
    return angles(positions).cos(), angles(positions).sin()


def rotate(x, positions):
    cos, sin = rotary(positions)
    return x * cos + rotate_half(x) * sin


@pytest.fixture
def data():
    torch.manual_seed(4)
    raw = {"q": 2 * torch.randn(1, HEADS, N, D) + 0.5, "k": 2 * torch.randn(1, KV, N, D) + 0.3}
    positions = torch.arange(N)[None]
    return {
        "raw_q": raw["q"],
        "raw_k": raw["k"],
        "q": rotate(raw["q"], positions),
        "k": rotate(raw["k"], positions),
        "v": torch.randn(1, KV, N, D) * torch.rand(1, KV, N, 1),
        "o": torch.randn(HIDDEN, HEADS * D),
    }


def signals_of(data, **changes):
    return Signals(data["q"], data["k"], data["v"], output=data["o"], rotary=rotary, **changes)


def attention(data):
    """Causal attention, [heads, n, n], one query at a time."""
    out = torch.zeros(HEADS, N, N)
    for head in range(HEADS):
        for query in range(N):
            logits = data["k"][0, head // 2, : query + 1] @ data["q"][0, head, query] / math.sqrt(D)
            out[head, query, : query + 1] = logits.softmax(0)
    return out


def same_order(ours, theirs, tokens=slice(None)):
    for head in range(KV):
        assert spearmanr(ours[0, head, tokens], theirs[head, tokens]).statistic > 0.99999


def pooled(x, width):
    half = width // 2
    padded = torch.nn.functional.pad(x, (half, half))
    return torch.stack([padded[..., j : j + x.shape[-1]] for j in range(width)]).mean(0)


def test_h2o(data):
    received = attention(data).sum(1).view(KV, 2, N).mean(1)
    same_order(get_policy("h2o").score(signals_of(data)), received)


def test_h2o_takes_attention_that_eager_has_computed(data):
    given_attention = attention(data)[None]
    ours = get_policy("h2o").score(signals_of(data, attention=given_attention))
    same_order(ours, given_attention[0].sum(1).view(KV, 2, N).mean(1))


def sampled(data, count, apart):
    """Attention of `count` evenly spaced queries over what lies `apart` or more behind each, [kv_heads, n]."""
    n = data["q"].shape[2]
    total = torch.zeros(HEADS, n)
    asked = 0
    for step in range(1, count + 1):
        query = math.ceil(step * n / count) - 1
        if query < apart:
            continue
        asked += 1
        for head in range(HEADS):
            logits = data["k"][0, head // 2, : query - apart + 1] @ data["q"][0, head, query] / math.sqrt(D)
            total[head, : query - apart + 1] += logits.softmax(0)
    return total.view(KV, 2, n).mean(1) / max(asked, 1)


@pytest.mark.parametrize(("count", "apart"), [(7, 20), (1, 1), (200, 5), (4, 85)])
def test_sampled_attention(data, count, apart):
    ours = sampled_attention(signals_of(data), count, apart)[0]
    torch.testing.assert_close(ours, sampled(data, count, apart), atol=1e-6, rtol=1e-4)


def test_sampled_attention_of_a_padded_row_is_that_of_its_text(data):
    short = {name: data[name][:, :, 30:] for name in ("q", "k", "v")}
    both = {name: torch.cat((data[name], torch.nn.functional.pad(short[name], (0, 0, 30, 0)))) for name in short}
    valid = torch.ones(2, N, dtype=torch.bool)
    valid[1, :30] = False
    ours = sampled_attention(Signals(both["q"], both["k"], both["v"], valid=valid), 6, 16)
    alone = sampled_attention(Signals(short["q"], short["k"], short["v"]), 6, 16)
    torch.testing.assert_close(ours[0], sampled(data, 6, 16), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(ours[1, :, 30:], alone[0])
    assert not ours[1, :, :30].any()


def test_sampled_attention_of_a_text_too_short_is_nothing(data):
    first = {name: data[name][:, :, :9] for name in ("q", "k", "v")}
    signals = Signals(first["q"], first["k"], first["v"])
    assert not sampled_attention(signals, 4, 9).any()
    weights = SampledAttention(4, 9) + KeySalience()
    torch.testing.assert_close(weights.log(signals), KeySalience().log(signals).log_softmax(-1))
    with pytest.raises(ValueError, match="apart is 0; accepted: at least 1"):
        SampledAttention(apart=0)


def test_tova(data):
    last = attention(data)[:, -1].mean(0)
    same_order(get_policy("tova").score(signals_of(data)), last.expand(KV, N))


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv"])
def test_snapkv(data, name):
    prefix = N - 64
    observed = attention(data)[:, -64:, :prefix].mean(1).view(KV, 2, prefix).mean(1)
    same_order(get_policy(name).score(signals_of(data)), pooled(observed, 5), slice(0, prefix))


def test_vatp(data):
    prefix = N - 64
    observed = pooled(attention(data)[:, -64:, :prefix].mean(1).view(KV, 2, prefix).mean(1), 5)
    expected = observed * data["v"][0, :, :prefix].abs().sum(-1)
    same_order(get_policy("vatp").score(signals_of(data)), expected, slice(0, prefix))


def test_criticalkv(data):
    prefix = N - 64
    observed = pooled(attention(data)[:, -64:, :prefix].mean(1).view(KV, 2, prefix).mean(1), 5) + 1e-4
    norms = torch.zeros(HEADS, N)
    for head in range(HEADS):
        for token in range(N):
            norms[head, token] = (data["o"][:, head * D : (head + 1) * D] @ data["v"][0, head // 2, token]).abs().sum()
    expected = observed * norms.view(KV, 2, N).mean(1)[:, :prefix]
    same_order(get_policy("criticalkv").score(signals_of(data)), expected, slice(0, prefix))
    # Half of the budget by attention alone.
    policy, signals = get_policy("criticalkv"), signals_of(data)
    budget = policy.budget(signals, [70], Protection(sinks=0, window=0))
    kept = policy.select(signals, budget)
    for head in range(KV):
        by_attention = set(observed[head].topk(20).indices.tolist())
        assert by_attention <= set(kept[0, head].tolist())


def test_expected_attention(data):
    """Mean and covariance of the queries before rotation, turned by the mean rotation of 512 positions."""
    rotation = torch.zeros(D, D)
    for position in range(N, N + 512):
        rotation += rotate(torch.eye(D), torch.tensor(position)).mT / 512
    expected = torch.zeros(HEADS, N)
    for head in range(HEADS):
        queries = data["raw_q"][0, head, 4:]
        mean = rotation @ queries.mean(0)
        covariance = rotation @ torch.cov(queries.mT, correction=0) @ rotation.mT
        keys = data["k"][0, head // 2]
        logits = keys @ mean / math.sqrt(D) + torch.einsum("nd,de,ne->n", keys, covariance, keys) / (2 * D)
        expected[head, 4:] = logits[4:].softmax(0)
    expected = expected.view(KV, 2, N).mean(1) * data["v"][0].norm(dim=-1)
    same_order(get_policy("expected-attention").score(signals_of(data)), expected, slice(4, None))


@pytest.mark.parametrize("diagonal", [False, True])
def test_pooled_expected_attention_is_one_gaussian_for_the_group(data, diagonal):
    ours = ExpectedAttention(future=0, pooled=True, diagonal=diagonal).log(signals_of(data))
    for head in range(KV):
        queries = data["q"][0, 2 * head : 2 * head + 2, 4:].reshape(-1, D)
        keys = data["k"][0, head]
        covariance = torch.cov(queries.mT, correction=0)
        covariance = covariance.diagonal().diag() if diagonal else covariance
        expected = keys @ queries.mean(0) / math.sqrt(D)
        expected = expected + torch.einsum("nd,de,ne->n", keys, covariance, keys) / (2 * D)
        torch.testing.assert_close(ours[0, head], expected, rtol=1e-4, atol=1e-4)


def test_diagonal_expected_attention_of_each_query_head(data):
    ours = ExpectedAttention(future=0, recent=30, diagonal=True).log(signals_of(data))[0].softmax(-1)
    for head in range(KV):
        attention = torch.zeros(N)
        for own in (2 * head, 2 * head + 1):
            queries, keys = data["q"][0, own, -30:], data["k"][0, head]
            variance = queries.var(0, correction=0)
            logits = keys @ queries.mean(0) / math.sqrt(D) + (keys**2 * variance).sum(-1) / (2 * D)
            attention += (logits - logits[4:].logsumexp(0)).exp()
        torch.testing.assert_close(ours[head], attention / attention.sum(), rtol=1e-4, atol=1e-6)


def test_diagonal_needs_queries_as_they_are():
    with pytest.raises(ValueError, match=r"diagonal is True with future=512"):
        ExpectedAttention(diagonal=True)


def test_knorm(data):
    same_order(get_policy("knorm").score(signals_of(data)), -data["k"][0].norm(dim=-1))


def test_keydiff(data):
    unit = data["k"][0] / data["k"][0].norm(dim=-1, keepdim=True)
    anchor = unit.mean(1, keepdim=True)
    expected = -torch.nn.functional.cosine_similarity(data["k"][0], anchor, dim=-1)
    same_order(get_policy("keydiff").score(signals_of(data)), expected)


def test_key_leverage(data):
    keys = (data["raw_k"][0] - data["raw_k"][0].mean(1, keepdim=True)).double()
    expected = torch.stack([(k @ torch.linalg.pinv(k.mT @ k) * k).sum(-1) for k in keys])
    same_order(get_policy("key-leverage").score(signals_of(data)), expected)


def test_streaming_llm_keeps_sinks_and_the_newest(data):
    policy, signals = get_policy("streaming-llm"), signals_of(data)
    kept = policy.select(signals, policy.budget(signals, [20], Protection()))
    assert kept[0].tolist() == [[0, 1, 2, 3, *range(N - 16, N)]] * KV


def test_random_is_uniform_and_seeded(data):
    signals = signals_of(data)
    assert torch.equal(Random(3).log(signals), Random(3).log(signals))
    assert not torch.equal(Random(3).log(signals), Random(4).log(signals))
    assert not torch.equal(Random(3).log(signals), Random(3).log(signals_of(data, layer=1, layers=2)))


def test_capkv_paper_is_algorithm_1(data):
    """Leverage of values under A = I + Σ w v vᵀ, w = exp(τ k·μ/√d), shifted by its maximum; dense, float64."""
    expected = torch.zeros(KV, N)
    for head in range(KV):
        mean = data["q"][0, 2 * head : 2 * head + 2, -64:].mean((0, 1)).double()
        logits = 5 * (data["k"][0, head].double() @ mean) / math.sqrt(D)
        weights, values = (logits - logits.max()).exp(), data["v"][0, head].double()
        a = torch.eye(D).double() + values.mT @ (weights[:, None] * values)
        expected[head] = weights * ((values @ torch.linalg.inv(a)) * values).sum(-1)
    same_order(get_policy("capkv-paper").score(signals_of(data)), expected)


def test_capkv_window_orders_by_the_exact_cost_of_deletion(data):
    """Against the capacity of everything but one token, in float64."""
    observed = pooled(attention(data)[:, -32:].mean(1).view(KV, 2, N).mean(1), 9).double()
    values = data["v"][0].double()
    expected = torch.zeros(KV, N)
    for token in range(N):
        rest = torch.arange(N) != token
        expected[:, token] = capacity(values, observed) - capacity(values, observed, subset=rest)
    same_order(get_policy("capkv-window").score(signals_of(data)), expected)


def test_output_directions_have_the_inner_products_of_the_projection(data):
    signals = signals_of(data)
    vectors = OutputValue().vectors(signals)
    for head in range(KV):
        projected = [data["v"][0, head] @ data["o"][:, j * D : (j + 1) * D].mT for j in (2 * head, 2 * head + 1)]
        expected = sum(p @ p.mT for p in projected) / 2
        torch.testing.assert_close(vectors[0, head] @ vectors[0, head].mT, expected, rtol=1e-3, atol=1e-2)
    with pytest.raises(ValueError, match="o_proj"):
        OutputValue().vectors(Signals(data["q"], data["k"], data["v"]))


def test_trace_is_the_first_order_term(data):
    """w‖u‖² is what capacity gains per token when the noise is large."""
    signals = signals_of(data)
    score = Trace().score(MeanQuery(), Value(), signals).exp()
    weights = MeanQuery().log(signals).exp()
    values, exact = data["v"].double(), weights.double()
    alone = [capacity(values, exact, subset=torch.tensor([j]), ridge=1e4, relative=False) for j in range(N)]
    torch.testing.assert_close(torch.stack(alone, -1).float() * 2e4, score, rtol=1e-2, atol=1e-6)


def test_sums_normalise_each_term_and_products_multiply(data):
    signals = signals_of(data)
    first, second = KeyNorm(), KeySalience()
    total = (first + 2 * second).log(signals).exp()
    parts = [term.log(signals).exp() for term in (first, second)]
    expected = parts[0] / parts[0].mean(-1, keepdim=True) + 2 * parts[1] / parts[1].mean(-1, keepdim=True)
    torch.testing.assert_close(total / total.sum(-1, keepdim=True), expected / expected.sum(-1, keepdim=True))
    torch.testing.assert_close((first * second).log(signals).exp(), parts[0] * parts[1])
    assert isinstance(first + second + 3 * first, Sum)
    assert isinstance(first * second, Product)
    assert str(first + 2 * second) == "exp(−‖k‖) + 2 exp(−4 cos(k, k̄))"
    with pytest.raises(ValueError, match="factor of a weight is -1"):
        -1 * first


def test_greedy_beats_one_shot_on_duplicates(data):
    """Two copies of a token halve each other's leverage: one shot may drop both or keep both."""
    twice = {name: torch.cat((data[name], data[name]), 2) for name in ("q", "k", "v")}
    signals = Signals(twice["q"], twice["k"], twice["v"])
    plain = Policy(weights=Uniform(), estimator=Leverage())
    budget = Budget(torch.full((1, KV), 12), torch.zeros(1, 1, 2 * N, dtype=torch.bool))
    kept = [policy.select(signals, budget) for policy in (plain, plain.with_(selection=Greedy()))]
    one_shot, greedy = (capacity(twice["v"], subset=index) for index in kept)
    assert bool((greedy > one_shot).all())


def test_rounds_choose_as_the_information_core_in_each_row(data):
    valid = torch.ones(2, N, dtype=torch.bool)
    valid[1, :30] = False
    rows = {name: torch.cat((data[name], data[name].flip(2))) for name in ("q", "k", "v")}
    signals = Signals(rows["q"], rows["k"], rows["v"], valid=valid)
    policy = Policy(weights=Uniform(), estimator=Leverage(ridge=0.3), selection=Rounds(3))
    protected = torch.zeros(2, N, dtype=torch.bool)
    protected[:, -2:] = True
    kept = policy.select(signals, Budget(torch.tensor([[20] * KV, [11] * KV]), protected[:, None]))
    first = select_by_leverage(rows["v"][0], None, 20, rounds=3, protected=protected[0].expand(KV, -1), ridge=0.3)
    alone = rows["v"][1, :, 30:]
    second = select_by_leverage(alone, None, 11, rounds=3, protected=protected[1, 30:].expand(KV, -1), ridge=0.3)
    assert torch.equal(kept[0], first)
    assert torch.equal(kept[1, :, 9:], second + 30)
    assert bool((kept[1, :, :9] == -1).all())


def test_selection_on_the_objective_needs_leverage():
    with pytest.raises(ValueError, match="needs the estimator Leverage"):
        Policy(weights=Uniform(), estimator=Trace(), directions=Constant(), selection=Greedy())


def test_padding_counts_for_nothing(data):
    """Scores of a left-padded row equal those of the row alone, whatever stands on the padding."""
    pad = 13
    valid = torch.ones(1, N + pad, dtype=torch.bool)
    valid[:, :pad] = False
    wide = {name: torch.cat((50 * torch.randn(*x.shape[:2], pad, D), x), 2) for name, x in data.items() if x.dim() == 4}
    for name in ("capkv", "capkv-window", "capkv-paper", "h2o", "tova", "snapkv", "expected-attention", "keydiff"):
        alone = get_policy(name).score(signals_of(data))
        padded = get_policy(name).score(signals_of({**data, **wide}, valid=valid))[..., pad:]
        same_order(padded, alone[0], slice(4, N - 64))


def requests(budget, seen, layers, least, shares=None, heads=2):
    """What each layer asks of an allocation, one row."""
    for layer in range(layers):
        yield Request(
            budget=(budget,),
            seen=(seen,),
            least=(least,),
            room=torch.full((1, heads), seen),
            layer=layer,
            layers=layers,
            shares=lambda layer=layer: shares[layer],
        )


@given(
    budget=st.integers(8, 300),
    seen=st.integers(8, 400),
    layers=st.integers(1, 40),
    beta=st.floats(1, 50),
    least=st.integers(0, 80),
)
def test_layer_allocations_spend_the_budget_exactly(budget, seen, layers, beta, least):
    budget = min(budget, seen)
    for allocation in (Equal(), Pyramid(beta)):
        tokens = [allocation.tokens(request) for request in requests(budget, seen, layers, least)]
        assert all(int(own.min()) == int(own.max()) for own in tokens)
        kept = [int(own[0, 0]) for own in tokens]
        assert sum(kept) == budget * layers
        assert all(min(least, budget) <= own <= seen for own in kept)
        assert all(a >= b - 1 for a, b in itertools.pairwise(kept))


@given(
    seed=st.integers(0, 1000),
    budget=st.integers(8, 300),
    seen=st.integers(8, 400),
    layers=st.integers(1, 12),
    heads=st.integers(1, 8),
    least=st.integers(0, 80),
    power=st.floats(0, 3),
)
def test_head_profile_spends_the_budget_exactly(seed, budget, seen, layers, heads, least, power):
    budget = min(budget, seen)
    attention = torch.rand(layers, heads, generator=torch.Generator().manual_seed(seed)) + 1e-3
    allocation = HeadProfile(Profile(tuple(map(tuple, attention.tolist())), "m", "test"), power=power)
    kept = torch.cat([allocation.tokens(own) for own in requests(budget, seen, layers, least, heads=heads)])
    assert int(kept.sum()) == budget * layers * heads
    assert int(kept.min()) >= min(budget, max(least, int(0.2 * budget)))
    assert int(kept.max()) <= seen
    # A head that needs more never keeps fewer, rounding aside.
    assert bool((kept.flatten()[attention.flatten().argsort()].diff() >= -1).all())


@given(seed=st.integers(0, 1000), budget=st.integers(4, 40), heads=st.integers(1, 4), safeguard=st.floats(0, 1))
def test_pooled_scores_are_the_largest_of_the_layer_beside_each_heads_own(seed, budget, heads, safeguard):
    """Against the choice written out: each head's first ones, then the largest of all the others."""
    seen, least = 40, 3
    shares = torch.rand(1, heads, seen, generator=torch.Generator().manual_seed(seed)) ** 4
    request = next(requests(budget, seen, 1, least, [shares], heads))
    kept = PooledScores(safeguard).tokens(request)[0].tolist()
    floor = min(max(least, int(safeguard * budget)), seen)
    own = [sorted(row.tolist(), reverse=True) for row in shares[0]]
    rest = sorted(((x, head) for head, row in enumerate(own) for x in row[floor:]), reverse=True)
    expected = [min(floor, seen)] * heads
    for _, head in rest[: budget * heads - sum(expected)]:
        expected[head] += 1
    if sum(expected) == budget * heads:
        assert kept == expected
    assert sum(kept) == budget * heads


@pytest.mark.parametrize("make", [PooledScores, MarginalCapacity])
def test_safeguard_is_a_part(make):
    with pytest.raises(ValueError, match=r"safeguard is 1.5; accepted: 0 to 1"):
        make(1.5)


@given(fraction=st.floats(0.001, 1), seen=st.integers(1, 10_000))
def test_fraction_is_never_exceeded(fraction, seen):
    allowed = tokens_allowed(fraction, seen)
    assert 1 <= allowed <= seen
    assert allowed <= max(1, fraction * seen + 1e-6)
    assert tokens_allowed(1.0, seen) == seen


@given(budget=st.integers(1, 5000))
def test_default_protection_fits_any_budget(budget):
    sinks, window = Protection().sizes(budget)
    assert sinks >= 0
    assert window >= 0
    assert sinks + window <= budget


@pytest.mark.parametrize(("window", "pool"), [(0, 5), (8, 4), (8, 0)])
def test_impossible_window(window, pool):
    with pytest.raises(ValueError, match="accepted"):
        WindowAttention(window=window, pool=pool)
