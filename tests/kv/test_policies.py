"""Each policy, weight and allocation against its paper's formula, written independently and naively."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from suffice.information import capacity, select_by_leverage
from suffice.kv.budget.allocation import AdaKV, BudgetRequest, Equal, MarginalCapacity, Pyramid
from suffice.kv.budget.head_profile import HeadProfile
from suffice.kv.budget.profile import Profile
from suffice.kv.budget.protection import Protection, num_allowed
from suffice.kv.hf.rotary import Frequencies, RotaryEmbedding
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.directions import Constant, OutputValue, Value
from suffice.kv.policy.estimators import Leverage, Objective, Trace
from suffice.kv.policy.layer_context import EntryPositions, LayerContext
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.registry import get_policy
from suffice.kv.policy.sampled_attention import sampled_attention
from suffice.kv.policy.selection import Greedy, LayerBudget, Rounds
from suffice.kv.policy.weights import (
    AccumulatedAttention,
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

HEADS, KV_HEADS, ENTRIES, HEAD_DIM, HIDDEN = 4, 2, 90, 8, 24
GROUPS = HEADS // KV_HEADS


FREQUENCIES = 10_000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)


def rotate(x, positions):
    """Apply Llama's rotary embedding: dimensions j and j + HEAD_DIM / 2 are a complex number, which is rotated."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.complex(first, second) * torch.exp(1j * positions[..., None] * FREQUENCIES)
    return torch.cat((rotated.real, rotated.imag), dim=-1)


@pytest.fixture
def tensors():
    """Queries, keys and values of one row, before (`raw`) and after the rotary embedding, and an output projection."""
    torch.manual_seed(4)
    raw_queries = 2 * torch.randn(1, HEADS, ENTRIES, HEAD_DIM) + 0.5
    raw_keys = 2 * torch.randn(1, KV_HEADS, ENTRIES, HEAD_DIM) + 0.3
    positions = torch.arange(ENTRIES)[None]
    return {
        "raw_queries": raw_queries,
        "raw_keys": raw_keys,
        "queries": rotate(raw_queries, positions),
        "keys": rotate(raw_keys, positions),
        "values": torch.randn(1, KV_HEADS, ENTRIES, HEAD_DIM) * torch.rand(1, KV_HEADS, ENTRIES, 1),
        "output_weight": torch.randn(HIDDEN, HEADS * HEAD_DIM),
    }


def stats_of(tensors, valid=None, **options):
    """Statistics of an attention call; `valid` marks left padding."""
    return AttentionStats(
        tensors["queries"],
        tensors["keys"],
        tensors["values"],
        output_weight=tensors.get("output_weight"),
        rotary=RotaryEmbedding.half_split(Frequencies(SimpleNamespace(inv_freq=FREQUENCIES))),
        positions=EntryPositions(valid=valid),
        **options,
    )


def causal_attention(tensors):
    """Attention matrix [heads, n, n], one query at a time."""
    attention = torch.zeros(HEADS, ENTRIES, ENTRIES)
    for head in range(HEADS):
        for query in range(ENTRIES):
            keys = tensors["keys"][0, head // GROUPS, : query + 1]
            logits = keys @ tensors["queries"][0, head, query] / math.sqrt(HEAD_DIM)
            attention[head, query, : query + 1] = logits.softmax(0)
    return attention


def window_attention(tensors, window_size, num_entries=ENTRIES):
    """Mean attention of the last queries, [kv_heads, num_entries]."""
    received = causal_attention(tensors)[:, -window_size:, :num_entries].mean(1)
    return received.view(KV_HEADS, GROUPS, num_entries).mean(1)


def assert_same_order(found, expected, entries=slice(None)):
    """Check that two scores [1, kv_heads, n] and [kv_heads, n] rank the entries of each head alike."""
    for head in range(KV_HEADS):
        assert spearmanr(found[0, head, entries], expected[head, entries]).statistic > 0.99999


def mean_pooled(x, kernel_size):
    half = kernel_size // 2
    padded = torch.nn.functional.pad(x, (half, half))
    return torch.stack([padded[..., shift : shift + x.shape[-1]] for shift in range(kernel_size)]).mean(0)


# ---- Policies -------------------------------------------------------------------------------------------------------


def test_h2o(tensors):
    received = causal_attention(tensors).sum(1).view(KV_HEADS, GROUPS, ENTRIES).mean(1)
    assert_same_order(get_policy("h2o").score(stats_of(tensors)), received)


def test_h2o_uses_the_attention_weights_that_eager_attention_returns(tensors):
    attention = causal_attention(tensors)[None]
    scores = get_policy("h2o").score(stats_of(tensors, attention=attention))
    assert_same_order(scores, attention[0].sum(1).view(KV_HEADS, GROUPS, ENTRIES).mean(1))


def test_tova(tensors):
    last = causal_attention(tensors)[:, -1].mean(0)
    assert_same_order(get_policy("tova").score(stats_of(tensors)), last.expand(KV_HEADS, ENTRIES))


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv"])
def test_snapkv(tensors, name):
    prefix = ENTRIES - 64
    expected = mean_pooled(window_attention(tensors, 64, prefix), 5)
    assert_same_order(get_policy(name).score(stats_of(tensors)), expected, slice(0, prefix))


def test_vatp(tensors):
    prefix = ENTRIES - 64
    attention = mean_pooled(window_attention(tensors, 64, prefix), 5)
    expected = attention * tensors["values"][0, :, :prefix].abs().sum(-1)
    assert_same_order(get_policy("vatp").score(stats_of(tensors)), expected, slice(0, prefix))


def test_criticalkv(tensors):
    prefix = ENTRIES - 64
    attention = mean_pooled(window_attention(tensors, 64, prefix), 5) + 1e-4
    norms = torch.zeros(HEADS, ENTRIES)
    for head in range(HEADS):
        weight = tensors["output_weight"][:, head * HEAD_DIM : (head + 1) * HEAD_DIM]
        for entry in range(ENTRIES):
            norms[head, entry] = (weight @ tensors["values"][0, head // GROUPS, entry]).abs().sum()
    expected = attention * norms.view(KV_HEADS, GROUPS, ENTRIES).mean(1)[:, :prefix]
    policy, stats = get_policy("criticalkv"), stats_of(tensors)
    assert_same_order(policy.score(stats), expected, slice(0, prefix))
    # Half of the budget is selected by attention alone.
    objective = policy.objective(stats)
    kept = policy.select(objective, policy.layer_budget(objective, [70], Protection(sinks=0, window=0)))
    for head in range(KV_HEADS):
        by_attention = set(attention[head].topk(20).indices.tolist())
        assert by_attention <= set(kept[0, head].tolist())


def test_expected_attention(tensors):
    """Mean and covariance of the unrotated queries, rotated by the mean rotation of the next 512 positions."""
    rotation = torch.zeros(HEAD_DIM, HEAD_DIM)
    for position in range(ENTRIES, ENTRIES + 512):
        rotation += rotate(torch.eye(HEAD_DIM), torch.tensor(position)).mT / 512
    expected = torch.zeros(HEADS, ENTRIES)
    for head in range(HEADS):
        queries = tensors["raw_queries"][0, head, 4:]
        mean = rotation @ queries.mean(0)
        covariance = rotation @ torch.cov(queries.mT, correction=0) @ rotation.mT
        keys = tensors["keys"][0, head // GROUPS]
        quadratic = torch.einsum("nd,de,ne->n", keys, covariance, keys)
        logits = keys @ mean / math.sqrt(HEAD_DIM) + quadratic / (2 * HEAD_DIM)
        expected[head, 4:] = logits[4:].softmax(0)
    expected = expected.view(KV_HEADS, GROUPS, ENTRIES).mean(1) * tensors["values"][0].norm(dim=-1)
    assert_same_order(get_policy("expected-attention").score(stats_of(tensors)), expected, slice(4, None))


def test_knorm(tensors):
    assert_same_order(get_policy("knorm").score(stats_of(tensors)), -tensors["keys"][0].norm(dim=-1))


def test_keydiff(tensors):
    keys = tensors["keys"][0]
    mean = (keys / keys.norm(dim=-1, keepdim=True)).mean(1, keepdim=True)
    expected = -torch.nn.functional.cosine_similarity(keys, mean, dim=-1)
    assert_same_order(get_policy("keydiff").score(stats_of(tensors)), expected)


def test_key_leverage(tensors):
    raw_keys = tensors["raw_keys"][0]
    centered = (raw_keys - raw_keys.mean(1, keepdim=True)).double()
    expected = torch.stack([(keys @ torch.linalg.pinv(keys.mT @ keys) * keys).sum(-1) for keys in centered])
    assert_same_order(get_policy("key-leverage").score(stats_of(tensors)), expected)


def test_streaming_llm_keeps_sinks_and_the_newest_entries(tensors):
    policy = get_policy("streaming-llm")
    objective = policy.objective(stats_of(tensors))
    kept = policy.select(objective, policy.layer_budget(objective, [20], Protection()))
    assert kept[0].tolist() == [[0, 1, 2, 3, *range(ENTRIES - 16, ENTRIES)]] * KV_HEADS


def test_capkv_paper_is_algorithm_1(tensors):
    """Leverage of values under A = I + Σ w v vᵀ, w = exp(τ k·μ/√d) with the largest weight 1; dense, float64."""
    expected = torch.zeros(KV_HEADS, ENTRIES)
    for head in range(KV_HEADS):
        mean = tensors["queries"][0, 2 * head : 2 * head + 2, -64:].mean((0, 1)).double()
        logits = 5 * (tensors["keys"][0, head].double() @ mean) / math.sqrt(HEAD_DIM)
        weights, values = (logits - logits.max()).exp(), tensors["values"][0, head].double()
        a = torch.eye(HEAD_DIM).double() + values.mT @ (weights[:, None] * values)
        expected[head] = weights * ((values @ torch.linalg.inv(a)) * values).sum(-1)
    assert_same_order(get_policy("capkv-paper").score(stats_of(tensors)), expected)


def test_capkv_window_orders_by_the_exact_deletion_cost(tensors):
    """Against the capacity of all entries but one, in float64."""
    weights = mean_pooled(window_attention(tensors, 32), 9).double()
    values = tensors["values"][0].double()
    expected = torch.zeros(KV_HEADS, ENTRIES)
    for entry in range(ENTRIES):
        others = torch.arange(ENTRIES) != entry
        expected[:, entry] = capacity(values, weights) - capacity(values, weights, subset=others)
    assert_same_order(get_policy("capkv-window").score(stats_of(tensors)), expected)


def test_padding_does_not_change_scores(tensors):
    """The scores of a left-padded row equal those of the row alone, whatever the padding contains."""
    padding = 13
    valid = torch.ones(1, ENTRIES + padding, dtype=torch.bool)
    valid[:, :padding] = False
    padded = {
        name: torch.cat((50 * torch.randn(*x.shape[:2], padding, HEAD_DIM), x), 2) if x.dim() == 4 else x
        for name, x in tensors.items()
    }
    for name in ("capkv", "capkv-window", "capkv-paper", "h2o", "tova", "snapkv", "expected-attention", "keydiff"):
        alone = get_policy(name).score(stats_of(tensors))
        scores = get_policy(name).score(stats_of(padded, valid))[..., padding:]
        assert_same_order(scores, alone[0], slice(4, ENTRIES - 64))


# ---- Weights --------------------------------------------------------------------------------------------------------


def naive_sampled_attention(tensors, count, min_distance):
    """Mean attention of `count` evenly spaced queries to entries `min_distance` or more before each, [kv_heads, n]."""
    num_queries = tensors["queries"].shape[2]
    total = torch.zeros(HEADS, num_queries)
    num_used = 0
    for step in range(1, count + 1):
        query = math.ceil(step * num_queries / count) - 1
        if query < min_distance:
            continue
        num_used += 1
        stop = query - min_distance + 1
        for head in range(HEADS):
            keys = tensors["keys"][0, head // GROUPS, :stop]
            total[head, :stop] += (keys @ tensors["queries"][0, head, query] / math.sqrt(HEAD_DIM)).softmax(0)
    return total.view(KV_HEADS, GROUPS, num_queries).mean(1) / max(num_used, 1)


@pytest.mark.parametrize(("count", "min_distance"), [(7, 20), (1, 1), (200, 5), (4, 85)])
def test_sampled_attention(tensors, count, min_distance):
    found = sampled_attention(stats_of(tensors), count, min_distance)[0]
    torch.testing.assert_close(found, naive_sampled_attention(tensors, count, min_distance), atol=1e-6, rtol=1e-4)


def test_sampled_attention_of_a_padded_row_equals_that_of_the_row_alone(tensors):
    names = ("queries", "keys", "values")
    short = {name: tensors[name][:, :, 30:] for name in names}
    both = {name: torch.cat((tensors[name], torch.nn.functional.pad(short[name], (0, 0, 30, 0)))) for name in names}
    valid = torch.ones(2, ENTRIES, dtype=torch.bool)
    valid[1, :30] = False
    found = sampled_attention(stats_of(both, valid), 6, 16)
    alone = sampled_attention(stats_of(short), 6, 16)
    torch.testing.assert_close(found[0], naive_sampled_attention(tensors, 6, 16), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found[1, :, 30:], alone[0])
    assert not found[1, :, :30].any()


def test_sampled_attention_is_zero_if_the_text_is_too_short(tensors):
    short = {name: tensors[name][:, :, :9] for name in ("queries", "keys", "values")}
    stats = stats_of(short)
    assert not sampled_attention(stats, 4, 9).any()
    weights = SampledAttention(4, 9) + KeySalience()
    torch.testing.assert_close(weights.log_weights(stats), KeySalience().log_weights(stats).log_softmax(-1))


def test_sampled_attention_requires_a_positive_distance():
    with pytest.raises(ValueError, match="min_distance must be at least 1, got 0"):
        SampledAttention(min_distance=0)


@pytest.mark.parametrize("diagonal", [False, True])
def test_pooled_expected_attention_is_one_gaussian_for_the_group(tensors, diagonal):
    found = ExpectedAttention(future=0, pooled=True, diagonal=diagonal).log_weights(stats_of(tensors))
    for head in range(KV_HEADS):
        queries = tensors["queries"][0, 2 * head : 2 * head + 2, 4:].reshape(-1, HEAD_DIM)
        keys = tensors["keys"][0, head]
        covariance = torch.cov(queries.mT, correction=0)
        covariance = covariance.diagonal().diag() if diagonal else covariance
        expected = keys @ queries.mean(0) / math.sqrt(HEAD_DIM)
        expected = expected + torch.einsum("nd,de,ne->n", keys, covariance, keys) / (2 * HEAD_DIM)
        torch.testing.assert_close(found[0, head], expected, rtol=1e-4, atol=1e-4)


def test_diagonal_expected_attention_of_each_query_head(tensors):
    found = ExpectedAttention(future=0, recent=30, diagonal=True).log_weights(stats_of(tensors))[0].softmax(-1)
    for head in range(KV_HEADS):
        attention = torch.zeros(ENTRIES)
        for query_head in (2 * head, 2 * head + 1):
            queries, keys = tensors["queries"][0, query_head, -30:], tensors["keys"][0, head]
            variance = queries.var(0, correction=0)
            logits = keys @ queries.mean(0) / math.sqrt(HEAD_DIM) + (keys**2 * variance).sum(-1) / (2 * HEAD_DIM)
            attention += (logits - logits[4:].logsumexp(0)).exp()
        torch.testing.assert_close(found[head], attention / attention.sum(), rtol=1e-4, atol=1e-6)


def test_diagonal_expected_attention_requires_queries_without_future_rotation():
    with pytest.raises(ValueError, match=r"future must be 0 if diagonal=True, got 512"):
        ExpectedAttention(diagonal=True)


def test_random_weights_depend_on_seed_and_layer(tensors):
    stats = stats_of(tensors)
    assert torch.equal(Random(3).log_weights(stats), Random(3).log_weights(stats))
    assert not torch.equal(Random(3).log_weights(stats), Random(4).log_weights(stats))
    next_layer = stats_of(tensors, context=LayerContext(layer=1, num_layers=2))
    assert not torch.equal(Random(3).log_weights(stats), Random(3).log_weights(next_layer))


def test_sums_normalize_each_term_and_products_multiply(tensors):
    stats = stats_of(tensors)
    first, second = KeyNorm(), KeySalience()
    total = (first + 2 * second).log_weights(stats).exp()
    parts = [term.log_weights(stats).exp() for term in (first, second)]
    expected = parts[0] / parts[0].mean(-1, keepdim=True) + 2 * parts[1] / parts[1].mean(-1, keepdim=True)
    torch.testing.assert_close(total / total.sum(-1, keepdim=True), expected / expected.sum(-1, keepdim=True))
    torch.testing.assert_close((first * second).log_weights(stats).exp(), parts[0] * parts[1])
    assert isinstance(first + second + 3 * first, Sum)
    assert isinstance(first * second, Product)
    assert str(first + 2 * second) == "exp(−‖k‖) + 2 exp(−4 cos(k, k̄))"


def test_factors_of_weights_must_be_positive():
    with pytest.raises(ValueError, match="factor of a weight must be above 0, got -1"):
        -1 * KeyNorm()


def test_combined_weights_merge_the_states_of_their_parts(tensors):
    stats = stats_of(tensors)
    weights = KeyNorm() * AccumulatedAttention() + MeanQuery(half_life=5) + ExpectedAttention(0, diagonal=True)
    state = weights.next_state(stats)
    assert torch.equal(state.attention_received, stats.attention_received())
    assert state.query_moments == {5: stats.query_moments(5)}
    assert weights.is_stateful
    assert weights.num_queries_needed is None
    assert not (KeyNorm() + WindowAttention()).is_stateful
    assert (KeyNorm() + WindowAttention(window_size=9)).num_queries_needed == 9


@pytest.mark.parametrize(
    ("window_size", "kernel_size", "message"),
    [
        (0, 5, "window_size must be at least 1, got 0"),
        (8, 4, "kernel_size must be a positive odd number, got 4"),
        (8, 0, "kernel_size must be a positive odd number, got 0"),
    ],
)
def test_window_attention_checks_its_sizes(window_size, kernel_size, message):
    with pytest.raises(ValueError, match=message):
        WindowAttention(window_size=window_size, kernel_size=kernel_size)


# ---- Directions, estimators, selections -----------------------------------------------------------------------------


def test_output_directions_have_the_inner_products_of_the_projection(tensors):
    vectors = OutputValue().vectors(stats_of(tensors))
    for head in range(KV_HEADS):
        projected = [
            tensors["values"][0, head] @ tensors["output_weight"][:, j * HEAD_DIM : (j + 1) * HEAD_DIM].mT
            for j in (2 * head, 2 * head + 1)
        ]
        expected = sum(p @ p.mT for p in projected) / 2
        torch.testing.assert_close(vectors[0, head] @ vectors[0, head].mT, expected, rtol=1e-3, atol=1e-2)


def test_output_directions_require_an_output_projection(tensors):
    with pytest.raises(ValueError, match="o_proj"):
        OutputValue().vectors(stats_of({**tensors, "output_weight": None}))


def test_trace_is_the_first_order_term(tensors):
    """w‖u‖² is what an entry adds to the capacity if the noise is large."""
    stats = stats_of(tensors)
    score = Trace().score(Objective(MeanQuery(), Value(), stats)).exp()
    weights = MeanQuery().log_weights(stats).exp()
    values, exact = tensors["values"].double(), weights.double()
    alone = [capacity(values, exact, subset=torch.tensor([j]), ridge=1e4, relative=False) for j in range(ENTRIES)]
    torch.testing.assert_close(torch.stack(alone, -1).float() * 2e4, score, rtol=1e-2, atol=1e-6)


def test_greedy_keeps_more_capacity_than_top_k_among_duplicates(tensors):
    """Two copies of an entry halve each other's leverage, so that top-k may drop both or keep both."""
    twice = {name: torch.cat((tensors[name], tensors[name]), 2) for name in ("queries", "keys", "values")}
    stats = stats_of(twice)
    top_k = Policy(weights=Uniform(), estimator=Leverage())
    budget = LayerBudget(torch.full((1, KV_HEADS), 12), torch.zeros(1, 1, 2 * ENTRIES, dtype=torch.bool))
    kept = [policy.select(policy.objective(stats), budget) for policy in (top_k, replace(top_k, selection=Greedy()))]
    by_top_k, by_greedy = (capacity(twice["values"], subset=index) for index in kept)
    assert bool((by_greedy > by_top_k).all())


def test_rounds_select_what_select_by_leverage_selects_in_each_row(tensors):
    valid = torch.ones(2, ENTRIES, dtype=torch.bool)
    valid[1, :30] = False
    names = ("queries", "keys", "values")
    rows = {name: torch.cat((tensors[name], tensors[name].flip(2))) for name in names}
    policy = Policy(weights=Uniform(), estimator=Leverage(ridge=0.3), selection=Rounds(3))
    protected = torch.zeros(2, ENTRIES, dtype=torch.bool)
    protected[:, -2:] = True
    budget = LayerBudget(torch.tensor([[20] * KV_HEADS, [11] * KV_HEADS]), protected[:, None])
    kept = policy.select(policy.objective(stats_of(rows, valid)), budget)
    whole, padded = rows["values"][0], rows["values"][1, :, 30:]
    first = select_by_leverage(whole, None, 20, rounds=3, protected=protected[0].expand(KV_HEADS, -1), ridge=0.3)
    second = select_by_leverage(padded, None, 11, rounds=3, protected=protected[1, 30:].expand(KV_HEADS, -1), ridge=0.3)
    assert torch.equal(kept[0], first)
    assert torch.equal(kept[1, :, 9:], second + 30)
    assert bool((kept[1, :, :9] == -1).all())


def test_capacity_selections_require_the_estimator_leverage():
    with pytest.raises(ValueError, match="estimator must be Leverage"):
        Policy(weights=Uniform(), estimator=Trace(), directions=Constant(), selection=Greedy())


# ---- Allocations and protection -------------------------------------------------------------------------------------


def requests(budget, num_seen, num_layers, min_entries, contributions=None, heads=2):
    """Return the request of each layer, for one row."""
    for layer in range(num_layers):
        yield BudgetRequest(
            budget=(budget,),
            num_seen=(num_seen,),
            min_entries=(min_entries,),
            num_valid=torch.full((1, heads), num_seen),
            contributions=lambda layer=layer: contributions[layer],
            context=LayerContext(layer=layer, num_layers=num_layers),
        )


@given(
    budget=st.integers(8, 300),
    num_seen=st.integers(8, 400),
    num_layers=st.integers(1, 40),
    beta=st.floats(1, 50),
    min_entries=st.integers(0, 80),
)
def test_layer_allocations_spend_the_budget_exactly(budget, num_seen, num_layers, beta, min_entries):
    budget = min(budget, num_seen)
    for allocation in (Equal(), Pyramid(beta)):
        layers = [
            allocation.entries_per_head(request) for request in requests(budget, num_seen, num_layers, min_entries)
        ]
        assert all(int(entries.min()) == int(entries.max()) for entries in layers)
        kept = [int(entries[0, 0]) for entries in layers]
        assert sum(kept) == budget * num_layers
        assert all(min(min_entries, budget) <= entries <= num_seen for entries in kept)
        assert all(earlier >= later - 1 for earlier, later in itertools.pairwise(kept))


@given(
    seed=st.integers(0, 1000),
    budget=st.integers(8, 300),
    num_seen=st.integers(8, 400),
    num_layers=st.integers(1, 12),
    heads=st.integers(1, 8),
    min_entries=st.integers(0, 80),
    power=st.floats(0, 3),
)
def test_head_profile_spends_the_budget_exactly(seed, budget, num_seen, num_layers, heads, min_entries, power):
    budget = min(budget, num_seen)
    attention = torch.rand(num_layers, heads, generator=torch.Generator().manual_seed(seed)) + 1e-3
    allocation = HeadProfile(Profile(tuple(map(tuple, attention.tolist())), "m", "test"), power=power)
    layers = requests(budget, num_seen, num_layers, min_entries, heads=heads)
    kept = torch.cat([allocation.entries_per_head(request) for request in layers])
    assert int(kept.sum()) == budget * num_layers * heads
    assert int(kept.min()) >= min(budget, max(min_entries, int(0.2 * budget)))
    assert int(kept.max()) <= num_seen
    # Apart from rounding, a head with a larger number never keeps fewer entries.
    assert bool((kept.flatten()[attention.flatten().argsort()].diff() >= -1).all())


@given(seed=st.integers(0, 1000), budget=st.integers(4, 40), heads=st.integers(1, 4), safeguard=st.floats(0, 1))
def test_adakv_gives_each_head_its_safeguard_and_the_rest_to_the_largest_contributions(seed, budget, heads, safeguard):
    """Against the choice written out: the first entries of each head, then the largest contributions of all others."""
    num_seen, min_entries = 40, 3
    contributions = torch.rand(1, heads, num_seen, generator=torch.Generator().manual_seed(seed)) ** 4
    request = next(requests(budget, num_seen, 1, min_entries, [contributions], heads))
    kept = AdaKV(safeguard).entries_per_head(request)[0].tolist()
    guaranteed = min(max(min_entries, int(safeguard * budget)), num_seen)
    ranked = [sorted(row.tolist(), reverse=True) for row in contributions[0]]
    rest = sorted(((x, head) for head, row in enumerate(ranked) for x in row[guaranteed:]), reverse=True)
    expected = [guaranteed] * heads
    for _, head in rest[: budget * heads - sum(expected)]:
        expected[head] += 1
    if sum(expected) == budget * heads:
        assert kept == expected
    assert sum(kept) == budget * heads


@pytest.mark.parametrize("allocation", [AdaKV, MarginalCapacity])
def test_safeguard_must_be_a_fraction(allocation):
    with pytest.raises(ValueError, match=r"safeguard must be from 0 to 1 \(a fraction of the mean budget\), got 1\.5"):
        allocation(1.5)


@given(fraction=st.floats(0.001, 1), num_seen=st.integers(1, 10_000))
def test_fraction_is_never_exceeded(fraction, num_seen):
    allowed = num_allowed(fraction, num_seen)
    assert 1 <= allowed <= num_seen
    assert allowed <= max(1, fraction * num_seen + 1e-6)
    assert num_allowed(1.0, num_seen) == num_seen


@given(budget=st.integers(1, 5000))
def test_default_protection_fits_into_any_budget(budget):
    sinks, window = Protection().sizes(budget)
    assert sinks >= 0
    assert window >= 0
    assert sinks + window <= budget
