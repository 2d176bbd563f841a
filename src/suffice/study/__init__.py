"""Studies: resumable grids of runs, on this machine or on a Ray cluster.

A `RunKind` describes one kind of run, and a `Spec` describes a grid of runs. `run_study` executes the runs that a
folder does not hold yet, and a `Store` gives access to the finished ones. `group_records`, `summarize` and
`compare_groups` compute means over seeds and paired differences with confidence intervals.

This package depends neither on `suffice.kv` nor on `suffice.link`: callers pass the kind of run.
"""

from suffice.study.export import export_records
from suffice.study.job import RunContext
from suffice.study.progress import ProgressCallback
from suffice.study.results import (
    Group,
    Interval,
    PairedDifference,
    bootstrap_interval,
    compare_groups,
    group_records,
    mean_bound,
    mean_interval,
    paired_difference,
    skewed_mean_bound,
    summarize,
)
from suffice.study.run_kind import RunKind
from suffice.study.runner import Outcome, run_study
from suffice.study.spec import PlannedRun, Spec
from suffice.study.store import Record, Store, StoreError

__all__ = [
    "Group",
    "Interval",
    "Outcome",
    "PairedDifference",
    "PlannedRun",
    "ProgressCallback",
    "Record",
    "RunContext",
    "RunKind",
    "Spec",
    "Store",
    "StoreError",
    "bootstrap_interval",
    "compare_groups",
    "export_records",
    "group_records",
    "mean_bound",
    "mean_interval",
    "paired_difference",
    "run_study",
    "skewed_mean_bound",
    "summarize",
]
