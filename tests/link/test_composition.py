import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.data import Data
from torch_geometric.loader import LinkLoader
from torch_geometric.sampler import BaseSampler, SamplerOutput

from suffice.link.batches import negatives
from suffice.link.batches.composition import Fixed, Random, Separate, balanced_weights, parse_composition
from suffice.link.batches.negatives import NegativeSampler, TooFewNegativesError, edge_keys, sample_negatives
from suffice.link.batches.sampler import CompositionBatchSampler, EdgeBatches

COMPOSITIONS = [Fixed(0.5), Fixed(0.1), Separate(), Random(0.05, 0.95), Random(0.0, 1.0)]


def _edges(nodes: int, count: int, seed: int = 0) -> torch.Tensor:
    return sample_negatives(torch.empty(2, 0, dtype=torch.long), nodes, count, seed)


@pytest.mark.parametrize("composition", COMPOSITIONS, ids=str)
@given(positives=st.integers(1, 200), batch_size=st.integers(4, 64), seed=st.integers(0, 9))
def test_every_plan_uses_each_positive_once_and_no_batch_is_too_large(composition, positives, batch_size, seed):
    plan = composition.plan(positives, batch_size, torch.Generator().manual_seed(seed))
    assert sum(own for own, _ in plan) == positives
    assert all(0 < own + other <= batch_size for own, other in plan)


@given(low=st.floats(0, 0.9), width=st.floats(0.1, 1), seed=st.integers(0, 9))
def test_random_fractions_are_within_their_bounds(low, width, seed):
    high = min(1.0, low + width)
    plan = Random(low, high).plan(2000, 100, torch.Generator().manual_seed(seed))
    fractions = [own / (own + other) for own, other in plan[:-1]]
    assert all(low - 0.006 <= fraction <= high + 0.006 for fraction in fractions)


@pytest.mark.parametrize("composition", COMPOSITIONS, ids=str)
@pytest.mark.parametrize("balanced", [False, True])
def test_batches_contain_each_positive_once_and_no_known_edge_as_negative(composition, balanced):
    edges = _edges(60, 300)
    positives, other = edges[:, :200], edges[:, 200:]
    batches = EdgeBatches(positives, 60, composition, batch_size=40, known=other, balanced=balanced, seed=3)
    known = set(edge_keys(edges, 60).tolist())
    seen, fractions = [], []
    for batch in batches:
        keys = edge_keys(batch.pairs, 60)
        own = batch.labels == 1
        assert torch.equal(batch.pairs[:, own], positives[:, batch.positive_index])
        assert not known & set(keys[~own].tolist())
        assert keys.unique().numel() == keys.numel()
        assert (batch.pairs[0] < batch.pairs[1]).all()
        seen += batch.positive_index.tolist()
        fractions.append(float(batch.labels.mean()))
        if balanced and own.any() and not own.all():
            assert torch.isclose(batch.weights[own].sum(), batch.weights[~own].sum())
    assert sorted(seen) == list(range(200))
    assert batches.fractions == pytest.approx(fractions)
    assert len(batches) == len(fractions)


def test_negatives_change_with_the_epoch_and_repeat_with_the_seed():
    batches = EdgeBatches(_edges(200, 300), 200, Fixed(), batch_size=64, seed=1)
    state = torch.get_rng_state()

    def negatives(epoch: int) -> list[int]:
        batches.set_epoch(epoch)
        return [key for b in batches for key in edge_keys(b.pairs, 200)[b.labels == 0].tolist()]

    first, second = negatives(0), negatives(1)
    assert first == negatives(0)
    assert len(set(first) & set(second)) < len(first) / 4
    assert torch.equal(state, torch.get_rng_state())


def test_ranks_have_the_same_fractions_and_different_edges():
    edges = _edges(200, 301)
    ranks = [EdgeBatches(edges, 200, Random(), batch_size=32, seed=5, rank=rank, world_size=2) for rank in (0, 1)]
    pairs = list(zip(*(list(rank) for rank in ranks), strict=True))
    assert all(abs(one.fraction - two.fraction) < 0.1 for one, two in pairs[:-1])
    seen = [set(torch.cat([b.positive_index for b in batches]).tolist()) for batches in zip(*pairs, strict=True)]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(range(301))
    drawn = [
        {key for b in batches for key in edge_keys(b.pairs, 200)[b.labels == 0].tolist()}
        for batches in zip(*pairs, strict=True)
    ]
    assert not drawn[0] & drawn[1]


@given(nodes=st.integers(3, 12), seed=st.integers(0, 20), share=st.floats(0, 1))
def test_sampling_all_negatives_returns_the_complement_of_the_graph(nodes, seed, share):
    every = torch.combinations(torch.arange(nodes)).T
    kept = torch.randperm(every.size(1), generator=torch.Generator().manual_seed(seed))
    known = every[:, kept[: int(share * (every.size(1) - 1))]].flip(0)
    free = every.size(1) - known.size(1)
    drawn = sample_negatives(known, nodes, free, seed)
    expected = set(edge_keys(every, nodes).tolist()) - set(edge_keys(known, nodes).tolist())
    assert set(edge_keys(drawn, nodes).tolist()) == expected
    with pytest.raises(TooFewNegativesError, match=f"count must be at most {free}, .* got {free + 1}"):
        sample_negatives(known, nodes, free + 1, seed)


@given(nodes=st.integers(3, 12), seed=st.integers(0, 20), share=st.floats(0, 1), data=st.data())
def test_many_negatives_are_drawn_with_torch_as_few_are_with_pyg(nodes, seed, share, data):
    every = torch.combinations(torch.arange(nodes)).T
    kept = torch.randperm(every.size(1), generator=torch.Generator().manual_seed(seed))
    known = every[:, kept[: int(share * (every.size(1) - 1))]].flip(0)
    free = set(edge_keys(every, nodes).tolist()) - set(edge_keys(known, nodes).tolist())
    count = data.draw(st.integers(0, len(free)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(negatives, "_MANY", 0)
        drawn = sample_negatives(known, nodes, count, seed)
        assert torch.equal(drawn, sample_negatives(known, nodes, count, seed))
    keys = edge_keys(drawn, nodes).tolist()
    assert len(set(keys)) == len(keys) == count
    assert set(keys) <= free
    assert bool((drawn[0] < drawn[1]).all())


@pytest.mark.parametrize("sides", [7, (3, 4)])
def test_many_negatives_are_uniform_and_in_random_order(sides, monkeypatch):
    monkeypatch.setattr(negatives, "_MANY", 0)
    sampler = NegativeSampler(torch.tensor([[0, 1], [3, 5]]), sides)
    first, any_place = torch.zeros(49), torch.zeros(49)
    for seed in range(3000):
        keys = edge_keys(sampler.sample(4, seed), 7)
        first[keys[0]] += 1
        any_place[keys] += 1
    num_pairs = 19 if sides == 7 else 10
    for counts, expected in ((first, 3000 / num_pairs), (any_place, 12_000 / num_pairs)):
        assert int((counts > 0).sum()) == num_pairs
        assert float((counts[counts > 0] - expected).abs().max()) < 5 * expected**0.5  # five standard deviations


def test_a_dense_graph_reuses_negatives_across_batches_but_never_within_one():
    every = torch.combinations(torch.arange(20)).T
    positives = every[:, : 190 - 12]
    batches = EdgeBatches(positives, 20, Fixed(), batch_size=20)
    for batch in batches:
        keys = edge_keys(batch.pairs, 20)
        assert keys.unique().numel() == keys.numel()
    with pytest.raises(
        TooFewNegativesError,
        match=r"batch_size must be .* at most 12 negatives, .*, got 40, with which a step needs 20",
    ):
        list(EdgeBatches(positives, 20, Fixed(), batch_size=40))


@pytest.mark.parametrize("composition", COMPOSITIONS, ids=str)
def test_the_batch_sampler_uses_positives_once_and_cycles_through_negatives(composition):
    labels = torch.cat([torch.ones(100), torch.zeros(70)])[torch.randperm(170)]
    sampler = CompositionBatchSampler(labels, composition, batch_size=32, seed=2)
    epochs = [list(sampler), list(sampler)]
    assert epochs[0] != epochs[1]
    for batches in epochs:
        flat = [index for batch in batches for index in batch]
        own = [index for index in flat if labels[index] == 1]
        assert sorted(own) == (labels == 1).nonzero().flatten().tolist()
        assert all(len(set(batch)) == len(batch) for batch in batches)
        used = torch.bincount(torch.tensor(flat), minlength=170)[labels == 0]
        assert used.max() - used.min() <= 1


class _WholeGraph(BaseSampler):
    """A sampler that returns the whole graph; PyG's neighbor sampler needs a compiled package."""

    def __init__(self, data):
        self.data = data

    def sample_from_nodes(self, index, **_):
        raise NotImplementedError

    def sample_from_edges(self, index, neg_sampling=None):
        row, col = self.data.edge_index
        return SamplerOutput(
            torch.arange(self.data.num_nodes), row, col, torch.arange(row.numel()),
            metadata=(index.input_id, torch.stack([index.row, index.col]), index.label, None),
        )  # fmt: skip

    @property
    def edge_permutation(self):
        return None


def test_the_batch_sampler_works_with_a_pyg_loader():
    edges = _edges(50, 100)
    data = Data(x=torch.randn(50, 4), edge_index=torch.cat([edges, edges.flip(0)], 1))
    pairs = torch.cat([edges, sample_negatives(edges, 50, 100, 1)], 1)
    labels = torch.cat([torch.ones(100), torch.zeros(100)])
    sampler = CompositionBatchSampler(labels, Random(0.2, 0.8), batch_size=20)
    loader = LinkLoader(data, _WholeGraph(data), edge_label_index=pairs, edge_label=labels, batch_sampler=sampler)
    batches = list(loader)
    assert [float(batch.edge_label.mean()) for batch in batches] == pytest.approx(sampler.fractions)
    assert len(set(sampler.fractions)) > 3
    seen = torch.cat([batch.edge_label_index[:, batch.edge_label == 1] for batch in batches], 1)
    assert sorted(seen.T.tolist()) == sorted(edges.T.tolist())


def test_balanced_weights_against_the_formula():
    labels = torch.tensor([1.0] * 3 + [0.0] * 9)
    assert torch.allclose(balanced_weights(labels), torch.tensor([2.0] * 3 + [2 / 3] * 9))
    assert torch.equal(balanced_weights(torch.ones(4)), torch.ones(4))


@pytest.mark.parametrize("composition", COMPOSITIONS, ids=str)
def test_the_text_of_a_composition_is_parsed_back(composition):
    assert parse_composition(str(composition)) == composition


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed(1.0), "fraction must be above 0 and below 1, got 1.0"),
        (lambda: Random(0.9, 0.1), "low and high must satisfy .*, got 0.9 and 0.1"),
        (lambda: parse_composition("mixed"), "composition must be fixed:FRACTION, .*, got 'mixed'"),
        (lambda: parse_composition("random:1"), "composition must be fixed:FRACTION, .*, got 'random:1'"),
        (
            lambda: parse_composition("fixed:x"),
            r"composition must be fixed:FRACTION, .*, got 'fixed:x' \(could not convert",
        ),
        (lambda: balanced_weights(torch.tensor([2.0])), r"tensor of 0 and 1, got the values \[2.0\]"),
        (lambda: EdgeBatches(torch.ones(3, 1), 2, Fixed()), r"positives must have shape .*, got \(3, 1\)"),
        (lambda: EdgeBatches(torch.ones(2, 1), 2, Fixed(), rank=1), "rank must be from 0 to world_size - 1 = 0, got 1"),
        (lambda: EdgeBatches(torch.ones(2, 1), 2, Fixed(), batch_size=1), "batch_size must be at least 2, got 1"),
        (
            lambda: CompositionBatchSampler(torch.ones(9), Fixed()),
            "labels must contain at least .* negatives, the number in one batch, got 0",
        ),
        (
            lambda: CompositionBatchSampler(torch.zeros(9), Fixed()),
            "labels must be above 0 for at least one edge, got 9 negatives",
        ),
        (
            lambda: CompositionBatchSampler(torch.tensor([1.0, -1.0, 0.0, -2.0]), Fixed()),
            "labels must be a tensor .*, got 2 others, the first is -1.0",
        ),
        (
            lambda: CompositionBatchSampler(torch.tensor([1.0, 0.0, torch.nan]), Fixed()),
            "labels must be a tensor .*, got 1 others, the first is nan",
        ),
        (lambda: CompositionBatchSampler(torch.ones(2, 3), Fixed()), r"labels must be .*, got shape \(2, 3\)"),
        (
            lambda: EdgeBatches(torch.tensor([[0, 5], [1, 2]]), 5, Fixed()),
            r"positives must hold node ids from 0 to 4, got 1 other pairs, the first is \(5, 2\)",
        ),
        (
            lambda: EdgeBatches(torch.tensor([[0], [1]]), 5, Fixed(), known=torch.tensor([[-1], [1]])),
            r"known must hold node ids from 0 to 4, got 1 other pairs, the first is \(-1, 1\)",
        ),
        (
            lambda: NegativeSampler(torch.tensor([[0, 3], [1, 9]]), 5),
            r"known must hold node ids from 0 to 4, got 1 other pairs, the first is \(3, 9\)",
        ),
        (
            lambda: NegativeSampler(torch.tensor([[0], [1]]), (2, 3)),
            r"known must hold .*, one below 2 and one from there in each pair, got 1 other pairs",
        ),
        (lambda: NegativeSampler(torch.tensor([0, 1]), 5), r"known must have shape \[2, edges\], got \(2,\)"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EdgeBatches([[0], [1]], 2, Fixed()), r"positives must be a tensor .*, got \[\[0\], \[1\]\]"),
        (lambda: EdgeBatches(torch.ones(2, 9), 2, Fixed()), "positives must be a tensor of integers .* torch.float32"),
        (
            lambda: EdgeBatches(torch.ones(2, 9).long(), 2, Fixed(), known=torch.ones(2, 1)),
            "known must be a tensor of integers .* torch.float32",
        ),
        (lambda: EdgeBatches(torch.ones(2, 9).long(), 2, 0.5), "composition must be a Composition, .*, got 0.5"),
        (lambda: EdgeBatches(torch.ones(2, 9).long(), 2.5, Fixed()), "num_nodes must be an int.*, got 2.5"),
        (lambda: NegativeSampler(torch.ones(2, 1), 5), "known must be a tensor of integers .* torch.float32"),
        (lambda: NegativeSampler([[0], [1]], 5), "known must be a tensor of integers"),
        (lambda: CompositionBatchSampler([1, 0], Fixed()), r"labels must be a tensor .*, got \[1, 0\]"),
        (lambda: CompositionBatchSampler(torch.ones(4), "fixed"), "composition must be a Composition, .*, got 'fixed'"),
    ],
)
def test_wrong_types_name_the_argument(make, message):
    with pytest.raises(TypeError, match=message):
        make()
