"""Entries of the zoo in benchmarks/zoo.py with few epochs, and the tables and rates that it writes."""

import json
import sys

import pytest
import torch

from tests.benchmark_program import import_programs


@pytest.fixture(scope="module")
def zoo():
    with import_programs("zoo") as (module,):
        yield module


@pytest.fixture(scope="module")
def training(zoo):
    return sys.modules["zoo_training"]


def find(zoo, name):
    return next(entry for entry in zoo.ENTRIES if entry.name == name)


@pytest.mark.parametrize(
    ("name", "arm", "epochs", "level"),
    [
        ("GraphStorm, edge decoder", "published", 4, "dominated"),
        ("GraphStorm, edge decoder", "layer", 4, "unaffected"),
        ("Matrix factorization of OGB", "published", 2, "unaffected"),
        # BatchNorm over nodes: after one step, its running statistics are wrong, so that eval mode fails.
        ("GraphGym, dot head", "published", 1, "unaffected"),
    ],
)
def test_verdicts(zoo, training, name, arm, epochs, level):
    entry = find(zoo, name)
    task = training.load_task(entry.kind, 0)
    model = training.train(entry, task, 0, arm, epochs)
    report = training.audit_entry(entry, task, model, 0, repeats=3)
    assert report.verdict.level == level


def test_every_entry_says_what_was_read_and_what_is_expected(zoo):
    assert len({entry.name for entry in zoo.ENTRIES}) == len(zoo.ENTRIES)
    assert len({entry.repository for entry in zoo.ENTRIES}) >= 10
    for entry in zoo.ENTRIES:
        assert all((entry.source, entry.coupling, entry.batches, entry.why))
        assert set(entry.expected) <= {"unaffected", "affected", "dominated"}
        assert (entry.expected == ("unaffected",)) == entry.coupling.startswith("none")


def test_batches_have_the_layout_of_their_entry(zoo, training):
    def fractions(name, *, random=False):
        entry = find(zoo, name)
        passes = training.steps(entry, training.load_task(entry.kind, 0), 0, 0, random=random)
        return [[float(part.labels.mean()) for part in step] for step in passes]

    assert {tuple(step) for step in fractions("Matrix factorization of OGB")} == {(1.0, 0.0)}
    assert {tuple(step) for step in fractions("MPLP")} == {(0.5,)}
    assert fractions("GraphGym, dot head") == [[0.5]]
    shuffled = torch.tensor(fractions("BUDDY"))
    assert 0.45 < shuffled.mean() < 0.55
    assert 0 < shuffled[:-1].std() < 0.05
    assert torch.tensor(fractions("MPLP", random=True)).std() > 0.15


def test_corrupted_triples_differ_in_one_entity(training):
    pairs = torch.tensor([[0, 1, 2, 0, 1, 2], [2, 0, 1, 1, 2, 0]])
    for seed in range(5):
        corrupted = training.corrupt(pairs, 3, torch.Generator().manual_seed(seed))
        changed = corrupted != pairs
        assert changed.tolist() == [[True] * 3 + [False] * 3, [False] * 3 + [True] * 3]
        assert 0 <= int(corrupted.min()) <= int(corrupted.max()) <= 2


def test_subgraphs_lack_the_edge_of_their_pair_and_have_distance_labels(zoo):
    subgraphs = sys.modules["zoo_subgraphs"]
    graph = subgraphs.Adjacency(torch.tensor([[0, 0, 1, 0, 3, 4], [1, 2, 2, 3, 4, 5]]), 6)
    first, second = subgraphs.extract(graph, torch.tensor([[0, 0], [1, 5]]))
    assert first.nodes.tolist() == [0, 1, 2, 3]
    assert sorted(map(tuple, first.edges.t().tolist())) == [(0, 2), (0, 3), (1, 2), (2, 0), (2, 1), (3, 0)]
    assert first.labels.tolist() == [1, 1, 2, 0]  # node 2 is at distances 1 and 1; node 3 reaches 1 only through 0
    assert second.nodes.tolist() == [0, 5, 1, 2, 3, 4]
    assert second.labels.tolist() == [1, 1, 0, 0, 3, 3]  # nodes 3 and 4 are at distances 1 and 2


def test_subgraph_models_do_not_depend_on_the_order_of_a_batch(training, zoo):
    subgraphs = sys.modules["zoo_subgraphs"]
    torch.manual_seed(0)
    graph = subgraphs.Adjacency(torch.randint(12, (2, 30)), 12)
    pairs = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    parts, x = subgraphs.extract(graph, pairs), torch.randn(12, 3)
    models = [subgraphs.SEAL(x, parts, "gin"), subgraphs.SEAL(x, parts, "gcn"), subgraphs.WalkPooling(x, parts)]
    for model in [*models, subgraphs.S3GRL(subgraphs.diffused_features(x, parts))]:
        index = torch.tensor([2, 0, 3])
        scores = model.eval()(pairs[:, index], graph, index)
        each = [model(pairs[:, one : one + 1], graph, torch.tensor([one])) for one in index.tolist()]
        torch.testing.assert_close(scores, torch.cat(each))


def test_tables_and_rates(zoo, tmp_path):
    buddy, ncn = find(zoo, "BUDDY"), find(zoo, "NCN")
    values = {"a_pure": 0.5, "accuracy_balanced": 0.9, "tau": 0.0, "kappa": -1.25, "auc_eval": 0.95}
    for entry, levels in (
        (buddy, ["dominated", "affected", "no skill"]),
        (ncn, ["unaffected", "unaffected", "affected"]),
    ):
        for seed, level in enumerate(levels):
            for arm in zoo.arms(entry):
                result = {"level": level if arm == "published" else "unaffected", "statistics": {"heldout": values}}
                zoo.result_file(tmp_path, entry, arm, seed).write_text(json.dumps(result))
    found = zoo.collect(tmp_path, 3)
    rates = zoo.rates(found)
    assert [(rates[name]["hits"], rates[name]["count"]) for name in rates] == [(1, 3), (1, 3), (3, 6)]
    assert rates["misses"]["low"] == pytest.approx(0.0084, abs=1e-4)  # Clopper-Pearson for 1 of 3
    page = zoo.page_part(found, 3)
    assert (
        "| BUDDY | BatchNorm | shuffled, 1,024 | .50 [.50, .50] (.90) | .00 [.00, .00] | -1.25 [-1.25, -1.25] |" in page
    )
    assert "dominated (1), affected (1), no skill (1) | dominated |" in page
    assert "unaffected (2), affected (1) | unaffected |" in page
    assert "| unaffected, .50 | unaffected, .50 | .95 → .95 → .95 |" in page
