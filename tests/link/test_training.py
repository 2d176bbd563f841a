import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from suffice.link.batches.composition import Random, Separate
from suffice.link.batches.sampler import EdgeBatches
from suffice.link.data import checkpoint as files
from suffice.link.data.graph import SplitConfig, split_edges
from suffice.link.models import EncoderDecoderSettings, PairScorer, build_model, decoders, encoders, norms
from suffice.link.sparse.adjacency import remove_edges
from suffice.link.train.checkpoint import check_data, load_trained
from suffice.link.train.config import TrainConfig
from suffice.link.train.inputs import node_features
from suffice.link.train.trainer import batch_loss, fit

SMALL = EncoderDecoderSettings(hidden=16)
QUICK = TrainConfig(epochs=4, batch_size=128, metric="auc", seed=1)


@pytest.mark.parametrize("decoder", decoders())
@pytest.mark.parametrize("encoder", encoders())
@pytest.mark.parametrize("norm", norms())
def test_every_model_learns_and_is_equivariant_to_the_order_of_nodes(encoder, decoder, norm, graph, parts):
    model = EncoderDecoderSettings(
        encoder=encoder, decoder=decoder, encoder_norm=norm, decoder_norm=norm, hidden=16
    ).build(graph.x.size(1))
    found = fit(model, graph, parts, replace(QUICK, epochs=3))
    assert found.epochs[-1].loss < found.epochs[0].loss
    order = torch.randperm(graph.num_nodes, generator=torch.Generator().manual_seed(0))
    new_ids = order.argsort()
    with torch.no_grad():
        one = model(graph.x, parts.message_edges(), parts.test)
        two = model(graph.x[order], new_ids[parts.message_edges()], new_ids[parts.test])
    assert torch.allclose(one, two, atol=1e-4)


@pytest.mark.parametrize("encoder", ["gcn", "sage"])
def test_sparse_features_give_the_same_scores(encoder, graph, parts):
    thin = replace(graph, x=graph.x * (torch.rand(graph.x.shape) < 0.02))
    model = replace(SMALL, encoder=encoder).build(graph.x.size(1)).eval()
    x = node_features(thin, model, parts)
    assert x.layout == torch.sparse_csr
    with torch.no_grad():
        sparse, dense = (model(part, parts.message_edges(), parts.test) for part in (x, thin.x))
    assert torch.allclose(sparse, dense, atol=1e-5)


def test_remove_edges_equals_set_difference(parts, graph):
    kept = remove_edges(parts.message_edges(), parts.train[:, :40].flip(0), graph.num_nodes)
    gone = {tuple(edge) for edge in parts.train[:, :40].T.tolist()}
    expected = {e for e in map(tuple, parts.message_edges().T.tolist()) if e not in gone and e[::-1] not in gone}
    assert set(map(tuple, kept.T.tolist())) == expected


@pytest.mark.parametrize("directions", [1, 2])
def test_the_trainer_equals_a_loop_in_plain_torch(directions, graph, parts):
    settings = replace(QUICK, epochs=2, directions=directions, composition=Separate(), clip=0.5, balanced=True)
    positives = torch.cat([parts.train, parts.train.flip(0)], dim=1) if directions == 2 else parts.train
    model = SMALL.build(graph.x.size(1))
    fit(model, graph, parts, settings)
    plain = SMALL.build(graph.x.size(1)).train()
    optimizer = torch.optim.Adam(plain.parameters(), lr=settings.learning_rate)
    batches = EdgeBatches(
        positives, graph.num_nodes, Separate(), batch_size=128, known=parts.known, balanced=True, seed=1
    )
    for epoch in range(2):
        batches.set_epoch(epoch)
        passes = list(batches)
        for first, second in zip(passes[::2], passes[1::2], strict=True):
            optimizer.zero_grad()
            for batch in (first, second):
                messages = remove_edges(parts.message_edges(), batch.pairs, graph.num_nodes)
                (batch_loss(plain(graph.x, messages, batch.pairs), batch) / 2).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_training_depends_on_its_seed_alone_and_keeps_global_generators(graph, parts):
    state = torch.get_rng_state()
    models = [replace(SMALL, dropout=0.3).build(graph.x.size(1)) for _ in range(2)]
    results = [fit(model, graph, parts, replace(QUICK, composition=Random())) for model in models]
    assert torch.equal(state, torch.get_rng_state())
    assert results[0] == results[1]


def test_early_stopping_keeps_the_best_epoch(graph, parts):
    model = SMALL.build(graph.x.size(1))
    found = fit(model, graph, parts, replace(QUICK, epochs=60, patience=2, learning_rate=0.05))
    metrics = [epoch.metric for epoch in found.epochs]
    assert len(metrics) < 60
    assert found.kept_epoch == metrics.index(max(metrics)) == len(metrics) - 3
    again = SMALL.build(graph.x.size(1))
    fit(again, graph, parts, replace(QUICK, epochs=found.kept_epoch + 1, learning_rate=0.05))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


_SCRIPT = """
import sys, time, torch
torch.set_num_threads(1)
from suffice.link.data.synthetic import block_model
from suffice.link.data.graph import SplitConfig, split_edges
from suffice.link.models import build_model
from suffice.link.train.checkpoint import check_data, load_trained
from suffice.link.train.config import TrainConfig
from suffice.link.train.trainer import fit
graph = block_model(nodes=300, classes=3, degree=8, feature_signal=2.0, features=16, seed=1)
model = build_model(sys.argv[2], 16, hidden=16, dropout=0.2)
model.register_forward_pre_hook(lambda *_: time.sleep(0.05))  # so that an epoch takes a second
fit(model, graph, split_edges(graph, SplitConfig(0.1, 0.2), 0),
    TrainConfig(epochs=8, batch_size=128, metric="auc", seed=1), checkpoint=sys.argv[1])
"""


@pytest.mark.parametrize("kind", ["encoder-decoder", "ncn", "buddy"])
def test_a_killed_training_resumes_to_the_same_result(tmp_path, graph, parts, kind):
    path = tmp_path / "run.safetensors"
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", _SCRIPT, str(path), kind])
    for _ in range(900):
        if path.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(files.load_checkpoint(path)[1]["epochs"])
    assert 1 <= done < 8
    model, whole = (build_model(kind, 16, hidden=16, dropout=0.2) for _ in range(2))
    settings = replace(QUICK, epochs=8)
    resumed = fit(model, graph, parts, settings, checkpoint=path)
    assert resumed == fit(whole, graph, parts, settings)
    for key, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_a_checkpoint_of_a_training_with_other_settings_is_refused(tmp_path, graph, parts):
    path = tmp_path / "run.safetensors"
    fit(SMALL.build(16), graph, parts, replace(QUICK, epochs=1), checkpoint=path)
    with pytest.raises(files.CheckpointError, match="must be of a training with settings"):
        fit(SMALL.build(16), graph, parts, replace(QUICK, epochs=2), checkpoint=path)
    with pytest.raises(files.CheckpointError, match=r"settings batch_size=64, got .* with batch_size=128\. To go on"):
        fit(SMALL.build(16), graph, parts, replace(QUICK, epochs=1, batch_size=64), checkpoint=path)
    path.write_bytes(b"half")
    with pytest.raises(files.CheckpointError, match="must be a checkpoint in safetensors format"):
        files.load_checkpoint(path)


def test_a_checkpoint_of_another_graph_or_split_is_refused(tmp_path, graph, parts):
    """Edges of another split's training may be test edges here, and names of files and graphs do not tell."""
    path = tmp_path / "run.safetensors"
    settings = {"model": SMALL.to_dict(), "in_channels": 16, "graph": graph.name}
    config = replace(QUICK, epochs=1)
    model = SMALL.build(16)
    fit(model, graph, parts, config, checkpoint=path, metadata=settings)
    other_split = split_edges(graph, SplitConfig(0.1, 0.2), seed=1)
    other_features = replace(graph, x=graph.x + 1)
    other_edges = replace(graph, edges=graph.edges[:, 1:])
    _, metadata = load_trained(path)
    check_data(path, metadata, graph, parts)
    check_data(path, metadata, replace(graph, name="other", edges=graph.edges.flip(1)), parts)
    for one, split, message in (
        (graph, other_split, "must be of a training on this split, .* may know edges of this test"),
        (other_features, parts, r"must be of a training on this graph, .* other edges or features \(block-model\)"),
        (other_edges, parts, "must be of a training on this graph"),
    ):
        with pytest.raises(files.CheckpointError, match=message):
            fit(SMALL.build(16), one, split, config, checkpoint=path, metadata=settings)
        with pytest.raises(files.CheckpointError, match=message):
            check_data(path, metadata, one, split)


def test_early_stopping_needs_a_metric_that_can_differ(graph, parts):
    few = replace(parts, validation_negatives=parts.validation_negatives[:, :99])
    config = replace(QUICK, metric="hits@100", patience=2)
    with pytest.raises(ValueError, match=r"metric must be one that 99 validation negatives .*, got 'hits@100'"):
        fit(SMALL.build(16), graph, few, config)


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = files.save_checkpoint(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {"n": 1})

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        files.save_checkpoint(path, {"x": torch.zeros(2)}, {"n": 2})
    assert files.load_checkpoint(path)[1] == {"n": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_pair_scorer_embeds_nodes_once_per_mode(graph, parts):
    model = SMALL.build(16).eval()
    scorer = PairScorer(model, graph.x, parts.message_edges())
    with torch.no_grad():
        expected = model(graph.x, parts.message_edges(), parts.test)
        assert torch.equal(scorer(parts.test), expected)
        assert scorer.embed() is scorer.embed()
        model.train()
        assert not torch.equal(scorer(parts.test), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(epochs=0), "epochs must be at least 1, got 0"),
        (lambda: TrainConfig(directions=3), "directions must be from 1 to 2, got 3"),
        (lambda: TrainConfig(clip=0.0), "clip must be above 0, got 0.0"),
        (lambda: TrainConfig(metric="f1"), "metric must be hits@K, auc, ap or mrr, got 'f1'"),
        (lambda: EncoderDecoderSettings(encoder="gat"), "encoder must be one of gcn, pure, sage, got 'gat'"),
        (
            lambda: EncoderDecoderSettings(decoder_norm="x"),
            "decoder_norm must be one of batch, .*, got 'x'",
        ),
        (lambda: EncoderDecoderSettings(dropout=1.0), "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
