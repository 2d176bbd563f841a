"""Progress of a training: finished epochs, and the parameters of the best one."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class EpochResult:
    """Result of one epoch.

    Args:
        number: number of the epoch, from 0.
        loss: mean loss of its steps.
        metric: validation metric after it.
        fractions: fraction of positives in each of its batches.

    """

    number: int
    loss: float
    metric: float
    fractions: tuple[float, ...]


@dataclass(frozen=True)
class TrainResult:
    """Result of a training.

    Args:
        epochs: result of each epoch.
        kept_epoch: number of the epoch whose parameters the model has.

    """

    epochs: tuple[EpochResult, ...]
    kept_epoch: int

    @property
    def metric(self) -> float:
        """Validation metric of the kept epoch."""
        return self.epochs[self.kept_epoch].metric


@dataclass
class TrainState:
    """Finished epochs of a training, and the parameters to return at its end.

    Args:
        epochs: result of each finished epoch.
        kept_epoch: number of the epoch whose parameters the training returns if it stops now.
        best_parameters: state dictionary of that epoch with early stopping; empty without early stopping.

    """

    epochs: list[EpochResult] = field(default_factory=list[EpochResult])
    kept_epoch: int = 0
    best_parameters: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def best_epoch(self) -> int:
        """Number of the epoch with the best validation metric (the first one if there are several)."""
        return max(range(len(self.epochs)), key=lambda number: self.epochs[number].metric)

    def should_stop(self, patience: int | None) -> bool:
        """Return whether the last `patience` epochs brought no better validation metric."""
        if patience is None or not self.epochs:
            return False
        return len(self.epochs) > self.best_epoch + patience

    def record(self, epoch: EpochResult, model: nn.Module, patience: int | None) -> None:
        """Add a finished epoch, and with early stopping copy the parameters if it is the best."""
        self.epochs.append(epoch)
        if patience is None:
            self.kept_epoch = epoch.number
        elif self.best_epoch == epoch.number:
            self.kept_epoch = epoch.number
            self.best_parameters = {key: value.detach().clone() for key, value in model.state_dict().items()}
