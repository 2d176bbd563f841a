"""Models in the shapes in which code exists get the verdict that is known from their norm layer."""

import inspect
import itertools
import runpy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader as PygDataLoader
from torch_geometric.loader import LinkLoader

from suffice.link import EdgeSet, audit
from tests.link.pixels import EDGES, GRAPH, PixelDecoder, train_steps
from tests.test_docs import ROOT

EXAMPLE = runpy.run_path(str(ROOT / "examples" / "audit_any_shape.py"), run_name="example")
SHAPES = EXAMPLE["SHAPES"]


@pytest.fixture(scope="module")
def audited():
    """A function that trains and audits a shape with a norm, once."""
    reports = {}

    def run(shape, norm):
        if (shape, norm) not in reports:
            torch.manual_seed(0)
            reports[shape, norm] = SHAPES[shape](norm)
        return reports[shape, norm]

    return run


@pytest.mark.parametrize(("norm", "level"), [(nn.BatchNorm1d, "dominated"), (nn.LayerNorm, "unaffected")])
@pytest.mark.parametrize("shape", SHAPES)
def test_verdict_of_each_shape(audited, shape, norm, level):
    report = audited(shape, norm)
    assert (report.verdict.level, report.tested) == (level, "training mode")
    assert report.parts["heldout"].statistics["auc_pure"].mean > (0.8 if norm is nn.LayerNorm else 0)
    assert any(layer.mixes_edges for layer in report.layers) == (norm is nn.BatchNorm1d)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_audit_takes_five_lines_of_code(shape):
    _, _, after = inspect.getsource(SHAPES[shape]).partition("# The audit")
    code = [line for line in after.splitlines()[1:] if line.strip()]
    assert 1 <= len(code) <= 5


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_loader_and_function_of_pairs_give_the_same_report(audited, norm):
    assert audited("link_loader", norm) == audited("pyg_batch", norm)


# ---- Loaders ---------------------------------------------------------------------------------------------------------

PAIRS = torch.cat([EDGES.positives, EDGES.negatives], 1)
LABELS = torch.arange(PAIRS.size(1)) < EDGES.positives.size(1)


@pytest.fixture(scope="module")
def model():
    found = PixelDecoder()
    for _ in train_steps(found):
        pass
    return found


class Items(Dataset):
    """Items that count how often they are read, and carry their label."""

    def __init__(self, make):
        self.make, self.reads = make, itertools.count()

    def __len__(self):
        return PAIRS.size(1)

    def __getitem__(self, number):
        next(self.reads)
        return self.make(number)


@pytest.mark.parametrize("kind", ["tuples", "data", "given labels"])
def test_items_of_a_loader_are_scored_as_pairs_are(model, kind):
    expected = audit(model, EDGES, batch_size=128, repeats=2)
    if kind == "tuples":
        loader = DataLoader(Items(lambda number: (PAIRS[:, number], LABELS[number])), batch_size=3, shuffle=True)
        edges = EdgeSet.from_loader(loader, lambda batch: model(batch[0].t()))
    elif kind == "data":
        make = lambda number: Data(pair=PAIRS[:, [number]].t(), num_nodes=2, y=int(LABELS[number]))  # noqa: E731
        loader = PygDataLoader(Items(make), batch_size=3, shuffle=True)
        edges = EdgeSet.from_loader(loader, lambda batch: model(batch.pair.t()))
    else:
        loader = DataLoader(Items(lambda number: PAIRS[:, number]))
        edges = EdgeSet.from_loader(loader, lambda batch: model(batch.t()), labels=LABELS.int().tolist())
    assert audit(model, edges, batch_size=128, repeats=2) == expected
    if kind != "given labels":
        assert next(loader.dataset.reads) == len(loader.dataset)  # each item is read once


def test_labels_are_found_in_any_order(model):
    order = torch.randperm(PAIRS.size(1), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(PAIRS[:, order].t(), LABELS[order]))
    edges = EdgeSet.from_loader(loader, lambda batch: batch[1])
    for numbers, label in ((edges.positives, 1.0), (edges.negatives, 0.0)):
        assert set(edges.score(numbers).tolist()) == {label}
    assert edges.positives.size(1) + edges.negatives.size(1) == PAIRS.size(1)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(40))


def _link_loader(**options):
    data = Data(x=GRAPH.x, edge_index=EDGES.positives)
    return LinkLoader(data, EXAMPLE["WholeGraph"](), edge_label_index=PAIRS, **options)


@pytest.mark.parametrize(
    ("loader", "labels", "error", "words"),
    [
        (3, None, TypeError, "loader must be a DataLoader whose dataset has numbered items, got 3"),
        (DataLoader(Stream()), None, TypeError, "loader must be a DataLoader whose dataset has numbered items, got "),
        (DataLoader(torch.ones(40, 2)), None, TypeError, "labels must be given, because the items of the loader have"),
        (DataLoader(torch.ones(40, 2)), "x", TypeError, "labels must be 0 and 1, one for each item, got 'x'"),
        (DataLoader(torch.ones(40, 2)), [1] * 39, ValueError, "labels must be .* of 40 items, got 39 labels"),
        (DataLoader(torch.ones(40, 2)), [2] * 40, ValueError, r"labels must be .* 40 labels with values \[2\]"),
        (DataLoader(torch.ones(40, 2)), [1] * 40, ValueError, "loader must have at least 16 .*, got 40 and 0"),
        (DataLoader(torch.ones(0, 2)), [], ValueError, "loader must have at least 16 positives .*, got 0 and 0"),
        (DataLoader(torch.ones(40, 2), batch_size=None), [1] * 40, ValueError, "loader must collate items"),
        (_link_loader(), None, TypeError, "labels must be given, because the items of the loader have none"),
        (
            _link_loader(neg_sampling="binary"), None, ValueError,
            "loader must hold positives and negatives with edge_label, and sample no negatives itself",
        ),
    ],
)  # fmt: skip
def test_a_wrong_loader_is_named_before_any_work(loader, labels, error, words):
    with pytest.raises(error, match=f"^{words}"):
        EdgeSet.from_loader(loader, lambda batch: pytest.fail("a model was run"), labels)


# ---- PyKEEN ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # those of PyKEEN
@pytest.mark.parametrize(("name", "level"), [("ERMLPE", "dominated"), ("DistMult", "unaffected")])
def test_models_of_pykeen(name, level):
    """ERMLPE has BatchNorm, and PyKEEN scores positives and negatives separately; DistMult has no norm layer."""
    pytest.importorskip("pykeen")
    from pykeen import models
    from pykeen.datasets import Nations
    from pykeen.sampling import BasicNegativeSampler

    torch.manual_seed(0)
    data = Nations()
    facts = data.training.mapped_triples
    sampler = BasicNegativeSampler(mapped_triples=facts, filtered=False)
    dropout = {"input_dropout": 0.0, "hidden_dropout": 0.0} if name == "ERMLPE" else {}
    trained = getattr(models, name)(triples_factory=data.training, embedding_dim=32, random_seed=0, **dropout)
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.01)
    trained.train()
    for batch in itertools.chain.from_iterable(facts[torch.randperm(len(facts))].split(400) for _ in range(80)):
        negative = sampler.sample(batch)[0].view(-1, 3)
        loss = functional.softplus(-trained.score_hrt(batch)) + functional.softplus(trained.score_hrt(negative))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        trained.post_parameter_update()
    positive = facts[torch.randperm(len(facts))[:400]]
    negative = sampler.sample(positive)[0].view(-1, 3)
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    relations = {"relation": (positive[:, 1], negative[:, 1])}
    edges = EdgeSet(positive[:, [0, 2]].t(), negative[:, [0, 2]].t(), items=relations)
    score = lambda pairs, relation: trained.score_hrt(torch.stack([pairs[0], relation, pairs[1]], dim=1))  # noqa: E731
    report = audit(score, edges, module=trained, batch_size=256)
    assert report.verdict.level == level
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())
