"""A callback of PyTorch Lightning that calls a `CompositionMonitor`. Lightning is imported when one is made."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from suffice.link.auditing.composition_log import Row

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")  # the same code under two names, with different classes


class Monitor(Protocol):
    """What a callback needs of a `CompositionMonitor`."""

    prefix: str
    history: list[Row]

    def step(self, epoch: int, global_step: int | None = None) -> Row | None:
        """Measure if the epoch is due."""
        ...


class LightningCallback(Protocol):
    """What a callback of this file has in addition to Lightning's `Callback`."""

    monitor: Monitor

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure if the epoch is due."""
        ...


class _Hooks:
    """The hooks of the callback; `make_callback` adds Lightning's own class."""

    def __init__(self, monitor: Monitor) -> None:
        super().__init__()
        self.monitor = monitor

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint; several monitors of a trainer need different prefixes."""
        return f"CompositionMonitor[{self.monitor.prefix}]"

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure if the epoch is due, and log the statistics by the module too."""
        row = self.monitor.step(trainer.current_epoch, trainer.global_step)
        if row is not None:
            statistics = {name: value for name, value in row.items() if isinstance(value, float)}
            pl_module.log_dict({f"{self.monitor.prefix}/{name}": value for name, value in statistics.items()})

    def state_dict(self) -> dict[str, list[Row]]:
        """Return the history."""
        return {"history": [dict(row) for row in self.monitor.history]}

    def load_state_dict(self, state_dict: dict[str, list[Row]]) -> None:
        """Continue the history of a checkpoint, unless that of the monitor, read from its file, is at least as long."""
        if len(self.monitor.history) < len(state_dict["history"]):
            self.monitor.history[:] = state_dict["history"]


def make_callback(monitor: Monitor) -> LightningCallback:
    """Return a callback for the trainer of `lightning` or `pytorch_lightning`, whichever the program has imported.

    Raises:
        ImportError: neither is installed.

    """
    imported = [getattr(sys.modules.get(name), "Callback", None) for name in _PACKAGES]
    bases = [base for base in imported if base is not None] or [_import_callback()]
    return type("CompositionMonitorCallback", (_Hooks, *bases), {})(monitor)


def _import_callback() -> type:
    for name in _PACKAGES:
        try:
            return importlib.import_module(name).Callback
        except ImportError:
            continue
    raise ImportError("lightning_callback needs PyTorch Lightning: pip install lightning")
