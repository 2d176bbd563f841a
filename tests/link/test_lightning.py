"""A monitor as a callback of PyTorch Lightning and of GraphGym, which uses Lightning.

Neither is among the requirements of this package. Tests that need them are skipped where they are not installed.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from suffice.link import CompositionMonitor, EdgeSet
from tests.link.pixels import EDGES, GRAPH, SPLIT, PixelDecoder

pytestmark = pytest.mark.filterwarnings("ignore")  # those of Lightning


def test_callback_measures_due_epochs_and_keeps_the_history(monkeypatch):
    """With a stand-in for Lightning, so that the hooks are tested everywhere."""
    package = ModuleType("lightning.pytorch")
    package.Callback = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "lightning.pytorch", package)
    monkeypatch.delitem(sys.modules, "pytorch_lightning", raising=False)
    model = PixelDecoder()
    monitor = CompositionMonitor(model, EDGES, every=2, batch_size=128)
    callback = monitor.lightning_callback()
    assert isinstance(callback, package.Callback)
    logged = []
    for epoch in range(4):
        trainer = SimpleNamespace(current_epoch=epoch, global_step=10 * epoch)
        callback.on_train_epoch_end(trainer, SimpleNamespace(log_dict=logged.append))
    assert [row["epoch"] for row in monitor.history] == [0, 2]
    assert [values["composition/kappa"] for values in logged] == [row["kappa"] for row in monitor.history]
    other = CompositionMonitor(model, EDGES, every=2).lightning_callback()
    other.load_state_dict(callback.state_dict())
    assert other.monitor.history == monitor.history
    assert other.state_key == "CompositionMonitor[composition]"


def _lightning_model(lightning):
    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.decoder = PixelDecoder()

        def training_step(self, batch, _):
            (chosen,) = batch
            generator = torch.Generator().manual_seed(int(chosen[0]))
            negatives = torch.randint(GRAPH.num_nodes, (2, len(chosen)), generator=generator)
            logits = self.decoder(torch.cat([SPLIT.train[:, chosen], negatives], 1))
            return functional.binary_cross_entropy_with_logits(
                logits, torch.arange(len(logits)).lt(len(chosen)).float()
            )

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.02)

    return Model()


def _fit(lightning, model, folder, epochs, callbacks=(), checkpoint=None):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(1024)), batch_size=256)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
    trainer.fit(model, loader, ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_trains_the_same_with_a_monitor_and_resumes(package, tmp_path):
    lightning = pytest.importorskip(package)
    without = _lightning_model(lightning)
    _fit(lightning, without, tmp_path, 4)
    model = _lightning_model(lightning)
    monitor = CompositionMonitor(model.decoder, EDGES, every=2, batch_size=128, csv=tmp_path / "log.csv")
    trainer = _fit(lightning, model, tmp_path, 3, [monitor.lightning_callback()])
    assert trainer.callback_metrics["composition/kappa"] == pytest.approx(monitor.history[-1]["kappa"])
    trainer.save_checkpoint(tmp_path / "at_3.ckpt")
    model = _lightning_model(lightning)
    resumed = CompositionMonitor(model.decoder, EDGES, every=1, batch_size=128)
    _fit(lightning, model, tmp_path, 4, [resumed.lightning_callback()], tmp_path / "at_3.ckpt")
    assert [row["epoch"] for row in resumed.history] == [0, 2, 3]
    assert resumed.history[:2] == monitor.history
    assert all(map(torch.equal, model.state_dict().values(), without.state_dict().values()))


@pytest.mark.parametrize(("norm", "level"), [(None, "unaffected"), (nn.BatchNorm1d, "dominated")])
def test_graphgym_model_is_monitored(norm, level):
    """GraphGym normalizes nodes, but its edge head has no norm; it has one here in a second model."""
    pytest.importorskip("yacs")
    lightning = pytest.importorskip("lightning.pytorch")
    from torch_geometric.data import Data
    from torch_geometric.graphgym.config import cfg, set_cfg
    from torch_geometric.graphgym.model_builder import create_model

    set_cfg(cfg)
    cfg.dataset.task, cfg.dataset.task_type, cfg.model.edge_decoding = "edge", "classification", "concat"
    cfg.gnn.head, cfg.gnn.layers_post_mp, cfg.gnn.dim_inner, cfg.accelerator = "edge", 2, 32, "cpu"
    cfg.optim.base_lr = 0.03
    torch.manual_seed(0)
    model = create_model(dim_in=GRAPH.x.size(1), dim_out=2)
    if norm is not None:
        model.post_mp.layer_post_mp = nn.Sequential(nn.Linear(64, 32), norm(32), nn.ReLU(), nn.Linear(32, 1))
    data = Data(x=GRAPH.x, edge_index=SPLIT.message_edges())

    def score(pairs):
        batch = Data(**data, split="audit", audit_edge_index=pairs, audit_edge_label=pairs[0])
        return model(batch)[0]

    class Batches(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, step):
            generator = torch.Generator().manual_seed(step)
            positives = SPLIT.train[:, torch.randperm(SPLIT.train.size(1), generator=generator)[:512]]
            negatives = torch.randint(GRAPH.num_nodes, (2, 512), generator=generator)
            labels = torch.arange(1024).lt(512).long()
            return Data(**data, train_edge_index=torch.cat([positives, negatives], 1), train_edge_label=labels)

    edges = EdgeSet(SPLIT.test, SPLIT.test_negatives)
    monitor = CompositionMonitor(score, edges, module=model, every=4)
    model.configure_callbacks = lambda: [monitor.lightning_callback()]
    trainer = lightning.Trainer(
        max_epochs=9, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False
    )
    trainer.fit(model, torch.utils.data.DataLoader(Batches(), batch_size=None))
    assert [row["epoch"] for row in monitor.history] == [0, 4, 8]
    assert monitor.history[-1]["level"] == level
    assert monitor.history[-1]["accuracy_balanced"] > 0.75


def test_the_longer_history_of_file_and_checkpoint_is_continued(monkeypatch):
    package = ModuleType("lightning.pytorch")
    package.Callback = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "lightning.pytorch", package)
    monkeypatch.delitem(sys.modules, "pytorch_lightning", raising=False)
    callback = CompositionMonitor(PixelDecoder(), EDGES).lightning_callback()
    long, short = [{"epoch": 0}, {"epoch": 5}], [{"epoch": 0}]
    for in_file, in_checkpoint in ((short, long), (long, short)):
        callback.monitor.history[:] = in_file
        callback.load_state_dict({"history": in_checkpoint})
        assert callback.monitor.history == long
