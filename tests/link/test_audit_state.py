"""The state of a model and of a scoring function is the same after an audit, whatever scoring changes."""

import collections
import copy
import functools
import random
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch_geometric.nn.models import tgn

from suffice.link.auditing import snapshot
from suffice.link.auditing.audit import audit
from suffice.link.auditing.edge_set import EdgeSet

NODES = 60
Z = torch.randn(NODES, 6, generator=torch.Generator().manual_seed(0))
CALLS = 0
LOG = []


def _plain(value, seen=None):
    """Return the state of anything as nested lists and numbers, which `==` compares by value."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return "seen"
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.tolist()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, (str, int, float, bool, type(None), torch.dtype, torch.device)):
        return value
    seen[id(value)] = value
    if isinstance(value, dict):
        return {key: _plain(inner, seen) for key, inner in value.items()}
    if isinstance(value, (list, tuple, collections.deque)):
        return [_plain(inner, seen) for inner in value]
    if isinstance(value, set):
        return sorted(value)
    return _plain(getattr(value, "__dict__", {}), seen)


@pytest.fixture(scope="module")
def edges() -> EdgeSet:
    pairs = torch.cartesian_prod(torch.arange(NODES), torch.arange(NODES)).T
    order = (Z[pairs[0]] * Z[pairs[1]]).sum(1).argsort()
    return EdgeSet(pairs[:, order[-150:]], pairs[:, order[:150]])


def _score(pairs):
    return (Z[pairs[0]] * Z[pairs[1]]).sum(1)


class Counting:
    """A callable object that counts its calls in an attribute, and remembers pairs in a container of each kind."""

    def __init__(self):
        self.calls = 0
        self.seen = {"pairs": [], "last": None}
        self.recent = collections.deque(maxlen=3)
        self.nodes = set()
        self.degrees = np.zeros(NODES)
        self.totals = (torch.zeros(NODES), [0])
        self.inner = SimpleNamespace(calls=0, rng=np.random.default_rng(0))
        self.generator = torch.Generator().manual_seed(0)
        self.random = random.Random(0)

    def __call__(self, pairs):
        self.calls += 1
        self.seen["pairs"].append(pairs)
        self.seen["last"] = pairs
        self.recent.append(self.calls)
        self.nodes.update(pairs.flatten().tolist())
        self.degrees[pairs[0].numpy()] += 1
        self.totals[0][pairs[0]] += 1
        self.totals[1][0] += 1
        self.inner.calls += 1
        self.inner.rng.random()
        self.new = pairs
        torch.rand(1, generator=self.generator)
        self.random.random()
        return _score(pairs)


class Slotted:
    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0

    def __call__(self, pairs):
        self.calls += 1
        return _score(pairs)


class CountingModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.counts = Counting()
        self.cache = None

    def forward(self, pairs):
        self.cache = pairs
        self.register_buffer("last", pairs)
        return self.counts(pairs)


def _counting_function():
    calls, cache, counts = 0, None, {"calls": 0}

    def score(pairs, log=[]):  # noqa: B006
        nonlocal calls, cache
        calls += 1
        cache = pairs
        counts["calls"] += 1
        log.append(calls)
        score.calls = getattr(score, "calls", 0) + 1
        return _score(pairs)

    def state():
        return calls, cache, counts, score.__defaults__, score.__dict__

    return score, state


def _counting_globals(pairs):
    global CALLS
    CALLS += 1
    LOG.append(pairs)
    return _score(pairs)


def _with_state(make):
    value = make()
    return value, lambda: value


@pytest.mark.parametrize(
    "make",
    [
        lambda: _with_state(Counting),
        lambda: _with_state(CountingModule),
        lambda: (lambda counting: (counting.__call__, lambda: counting))(Counting()),
        lambda: (lambda counting: (lambda pairs: counting(pairs), lambda: counting))(Counting()),
        lambda: (lambda counting: (functools.partial(counting), lambda: counting))(Counting()),
        lambda: (lambda slotted: (slotted, lambda: slotted.calls))(Slotted()),
        _counting_function,
        lambda: (_counting_globals, lambda: (CALLS, LOG)),
    ],
    ids=["object", "module", "method", "closure", "partial", "slots", "variables", "globals"],
)
@pytest.mark.parametrize("module", [None, ()], ids=["found", "none"])
def test_a_scorer_that_counts_comes_back_unchanged(make, module, edges):
    score, state = make()
    before = _plain(state())
    assert audit(score, edges, batch_size=100, repeats=2, module=module).verdict.level == "unaffected"
    assert _plain(state()) == before
    score(edges.positives)
    assert _plain(state()) != before


class TemporalPredictor(nn.Module):
    """PyG's TGN memory with a decoder. Every scored pair is a new interaction, as in PyG's example."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.memory = tgn.TGNMemory(NODES, 6, 6, 4, tgn.IdentityMessage(6, 6, 4), tgn.MeanAggregator())
        self.last = nn.Linear(6, 1)
        self.time = 0

    def forward(self, pairs):
        nodes, index = pairs.unique(return_inverse=True)
        z = self.memory(nodes)[0] + Z[nodes]
        time = torch.full((pairs.size(1),), self.time)
        self.memory.update_state(pairs[0], pairs[1], time, Z[pairs[0]])
        self.time += 1
        return (z[index[0]] * z[index[1]]).sum(1)


@pytest.mark.parametrize("training", [True, False])
def test_memory_message_store_and_neighbors_of_a_temporal_model_come_back(training, edges):
    model = TemporalPredictor().train(training)
    loader = tgn.LastNeighborLoader(NODES, 4)
    with torch.no_grad():
        model(edges.positives[:, :40])
        loader.insert(*edges.positives[:, :40])

    def score(pairs):
        scores = model(pairs) + 0.001 * loader.e_id[pairs[0]].clamp(min=0).sum(1)
        loader.insert(*pairs)
        return scores

    before = _plain((model, loader))
    report = audit(score, edges, batch_size=100, repeats=2, module=model)
    assert _plain((model, loader)) == before
    # In a fixed state of the memory, the score of a pair does not depend on the other pairs.
    assert report.parts["heldout"].statistics["kappa"].mean == pytest.approx(0, abs=1e-5)
    assert report.parts["heldout"].noise == {"kappa": 0, "rank_change": 0}
    assert report.verdict.level == "unaffected"


def test_parameters_that_a_call_changes_come_back(edges):
    """Embeddings with a maximum norm are scaled in place when they are looked up."""
    embedding = nn.Embedding(NODES, 6, max_norm=0.5)
    before = embedding.weight.detach().clone()
    audit(lambda pairs: (embedding(pairs[0]) * embedding(pairs[1])).sum(1), edges, batch_size=100, repeats=2)
    assert torch.equal(embedding.weight, before)
    embedding(edges.positives)
    assert not torch.equal(embedding.weight, before)


def test_modules_that_were_not_given_come_back(edges):
    encoder, decoder = nn.BatchNorm1d(6), nn.Sequential(nn.Linear(6, 1))
    before = _plain(encoder.state_dict())

    def score(pairs):
        z = encoder(Z)
        return decoder(z[pairs[0]] * z[pairs[1]]).squeeze(-1)

    audit(score, edges, batch_size=100, repeats=2, module=decoder)
    assert _plain(encoder.state_dict()) == before
    assert encoder.training


@pytest.mark.parametrize("kind", ["buffer", "parameter", "variable", "array", "total"])
def test_what_is_too_large_to_be_copied_must_not_change(kind, edges, monkeypatch):
    if kind == "total":
        monkeypatch.setattr(snapshot, "_MAX_TOTAL_BYTES", 1000)
    else:
        monkeypatch.setattr(snapshot, "MAX_COPIED_BYTES", 1000)
    model = nn.Module()
    model.register_buffer("memory", torch.zeros(NODES, 6))
    model.table = nn.Parameter(torch.zeros(NODES, 6))
    counts, array = torch.zeros(NODES, 6), np.zeros((NODES, 6))

    def score(pairs):
        changed = {"buffer": model.memory, "total": model.memory, "parameter": model.table.data, "array": array}
        if kind == "parameter":
            model.table.add_(1)
        else:
            changed.get(kind, counts)[pairs[0].unique()] += 1
        return _score(pairs)

    name = {"buffer": "memory", "total": "memory", "parameter": "table", "variable": "counts", "array": "array"}[kind]
    with pytest.raises(ValueError, match=rf"must not change tensors or arrays of more .*, got a change of .*{name}"):
        audit(score, edges, batch_size=100, repeats=2, module=model)


def test_what_is_too_large_and_does_not_change_is_no_error(edges, monkeypatch):
    monkeypatch.setattr(snapshot, "MAX_COPIED_BYTES", 0)
    features = Z.numpy()
    audit(lambda pairs: (Z[pairs[0]] * torch.from_numpy(features)[pairs[1]]).sum(1), edges, batch_size=100, repeats=2)


def test_lazy_modules_are_refused_by_name(edges):
    model = nn.Sequential(nn.LazyLinear(1))
    with pytest.raises(
        ValueError, match=r"the first call would initialize .*0\.weight: score a batch before the audit"
    ):
        audit(lambda pairs: model(Z[pairs[0]] * Z[pairs[1]]), edges)


def test_objects_of_other_threads_are_left_alone(edges):
    class Writer:
        def __init__(self):
            self.lock, self.written = threading.Lock(), []

    writer = Writer()

    def score(pairs):
        writer.written.append(pairs)
        return _score(pairs)

    audit(score, edges, batch_size=100, repeats=2)
    assert writer.written


@pytest.mark.parametrize("is_alive", [True, False])
def test_what_a_weak_proxy_stands_for_is_left_alone(edges, is_alive):
    """Lightning's trainer, for example, is known to its module by a proxy."""
    owner = nn.Linear(1, 1)
    proxy = weakref.proxy(owner)
    weight = owner.weight.detach().clone()
    if not is_alive:
        del owner

    def score(pairs):
        if is_alive:
            proxy.weight.data += 1
        return _score(pairs)

    audit(score, edges, batch_size=100, repeats=2)
    assert not is_alive or float(owner.weight.detach()) > float(weight) + 10


def test_containers_that_contain_themselves_are_restored(edges):
    loop = {"calls": 0}
    loop["self"] = loop

    def score(pairs):
        loop["self"]["calls"] += 1
        return _score(pairs)

    audit(score, edges, batch_size=100, repeats=2)
    assert loop["calls"] == 0
    assert loop["self"] is loop


def test_an_error_while_scoring_leaves_no_change(edges):
    scorer = Counting()
    before = _plain(copy.deepcopy(vars(scorer)))

    def score(pairs):
        scorer(pairs)
        raise KeyError("score")

    with pytest.raises(KeyError, match="score"):
        audit(score, edges, module=())
    assert _plain(vars(scorer)) == before
