"""Audit a model on fixed edges during its training, and log the result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from suffice.arguments import (
    check_callable,
    check_instance,
    check_int,
    check_list,
    check_names,
    check_number,
    check_text,
)
from suffice.link.auditing.audit import run_audit
from suffice.link.auditing.composition_log import STATISTICS, Row, check_log_file, read_log, write_log
from suffice.link.auditing.edge_set import EdgeSet, Score
from suffice.link.auditing.module_state import check_module
from suffice.link.auditing.norm_layers import check_batch_norms
from suffice.link.auditing.scoring import Sampling
from suffice.link.auditing.verdict import Verdict

if TYPE_CHECKING:
    from suffice.link.auditing.lightning_callback import LightningCallback


class CompositionMonitor:
    """Measure the dependence on the composition of the batch every few epochs of a training, on fixed edges.

    Call the monitor at the end of each epoch, with the number of the epoch. When a measurement is due, the model is
    audited with the same edges, batches and seed as before. So only the model differs between two measurements, and
    each has the same statistics as a direct call of `audit` with the same arguments. The state of the model, its mode
    and all random generators are the same afterwards. In distributed training, call it in every process; the first one
    writes.

    Args:
        score: scoring function, as for `audit`. If it embeds the whole graph, wrap it in `encode_once`, so that a
            measurement embeds the graph at most twice instead of once for each batch.
        edges: edges on which the model is audited.
        every: number of epochs between two measurements. The epochs 0, `every`, 2 · `every`, … are measured.
        module: module behind `score`, or several, as for `audit`.
        batch_size: edges in a batch; use the batch size of the training.
        num_probes: number of probe edges.
        repeats: number of random draws, at least 2. The default is small, so that a measurement is cheap.
        threshold: score above which an edge is predicted to be positive. None for the choice of `audit`.
        frozen: names of BatchNorm layers that kept their running statistics in training.
        seed: seed of all draws.
        csv: file to which the history is written after each measurement; None for none. If the file exists, such
            as after a killed training, its rows become the history. If an epoch is measured again, its row is replaced.
            Use one file for each training.
        loggers: objects that log numbers. Each has a method `add_scalar(name, value, step)`, such as TensorBoard's
            `SummaryWriter`, or a method `log(values, step=step)`, such as a run of W&B.
        prefix: first part of the names of the statistics in loggers, as in `composition/kappa`.

    Attributes:
        history: measurements in the order of epochs, each a dictionary with `epoch`, `a_pure`, `accuracy_balanced`,
            `tau`, `kappa`, `rank_change` (see `suffice.link.auditing.kappa_tau`) and `level`, that of the verdict.
        verdict: verdict of the last measurement, None before the first one.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: a number is out of range, or `csv` is a file that no monitor has written.

    Example:
        >>> edges = EdgeSet(torch.ones(2, 64).long(), torch.zeros(2, 64).long())
        >>> monitor = CompositionMonitor(lambda pairs: pairs[0] - 0.5, edges, every=5)
        >>> for epoch in range(10):
        ...     measured = monitor.step(epoch)
        >>> [(row["epoch"], row["kappa"]) for row in monitor.history]
        [(0, 0.0), (5, 0.0)]

    """

    def __init__(
        self,
        score: Score | nn.Module,
        edges: EdgeSet,
        *,
        every: int = 5,
        module: nn.Module | Sequence[nn.Module] | None = None,
        batch_size: int = 512,
        num_probes: int = 32,
        repeats: int = 2,
        threshold: float | None = None,
        frozen: Sequence[str] = (),
        seed: int = 0,
        csv: str | Path | None = None,
        loggers: Sequence[Any] = (),
        prefix: str = "composition",
    ) -> None:
        check_callable("score", score)
        self._score = score
        self._edges = check_instance("edges", edges, EdgeSet, "EdgeSet(positives, negatives)")
        self.every = check_int("every", every, 1, unit="epochs")
        sampling = Sampling(batch_size, num_probes, repeats, seed)
        self._options: dict[str, Any] = {
            "module": check_module(module),
            "batch_size": sampling.batch_size,
            "num_probes": sampling.num_probes,
            "repeats": sampling.repeats,
            "threshold": None if threshold is None else check_number("threshold", threshold),
            "frozen": check_names("frozen", frozen, "names of layers", "['decoder.norm']"),
            "seed": sampling.seed,
        }
        given = self._options["module"] or score
        if isinstance(given, nn.Module):  # else the modules are found at the first measurement
            check_batch_norms(given, self._options["frozen"])
        self._loggers = _check_loggers(loggers)
        self.prefix = check_text("prefix", prefix)
        self._csv = None if csv is None else check_log_file("csv", csv)
        self.history: list[Row] = [] if self._csv is None else read_log("csv", self._csv)
        self.verdict: Verdict | None = None

    def step(self, epoch: int, global_step: int | None = None) -> Row | None:
        """Measure if the epoch is due, and log the result.

        Args:
            epoch: number of the epoch, from 0.
            global_step: step that is passed to the loggers; by default, the epoch. Loggers that only accept
                growing steps, such as W&B, need the counter that the rest of the training uses.

        Returns:
            the measurement, which is also in `history`; None if no measurement was due.

        Raises:
            TypeError: a number is not an integer.
            ValueError: a number is negative, or the audit raises an error (see `audit`).

        """
        epoch = check_int("epoch", epoch, 0)
        number = epoch if global_step is None else check_int("global_step", global_step, 0)
        if epoch % self.every:
            return None
        report = run_audit(self._score, self._edges, **self._options, is_brief=True)
        self.verdict = report.verdict
        statistics = report.parts["heldout"].statistics
        values = {name: float(statistics[name].mean) for name in STATISTICS}
        row: Row = {"epoch": epoch, **values, "level": report.verdict.level}
        self.history[:] = sorted([*(old for old in self.history if old["epoch"] != epoch), row], key=_epoch_of)
        if _is_first_process():
            if self._csv is not None:
                write_log(self._csv, self.history)
            self._log({f"{self.prefix}/{name}": value for name, value in values.items()}, number)
        return row

    __call__ = step

    def lightning_callback(self) -> LightningCallback:
        """Return a callback for PyTorch Lightning, which calls the monitor after each training epoch.

        It also logs the statistics by `log_dict` of the trained module, so that the trainer's own loggers and early
        stopping see them. Checkpoints contain the history.

        Raises:
            ImportError: neither `lightning` nor `pytorch_lightning` is installed.

        """
        from suffice.link.auditing.lightning_callback import make_callback

        return make_callback(self)

    def _log(self, values: dict[str, float], step: int) -> None:
        for logger in self._loggers:
            if callable(getattr(logger, "add_scalar", None)):
                for name, value in values.items():
                    logger.add_scalar(name, value, step)
            else:
                logger.log(values, step=step)


def _check_loggers(loggers: object) -> list[Any]:
    found = check_list("loggers", loggers, "loggers", "[SummaryWriter('runs')]")
    for index, logger in enumerate(found):
        if not any(callable(getattr(logger, method, None)) for method in ("add_scalar", "log")):
            raise TypeError(
                f"loggers[{index}] must have a method add_scalar, as TensorBoard's SummaryWriter, or a method log, as "
                f"a run of W&B, got {type(logger).__name__}"
            )
    return found


def _epoch_of(row: Row) -> int:
    return int(row["epoch"])


def _is_first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
