"""Studies: grids of runs that survive anything, on this machine or on Ray.

`Spec` says which runs; a `Kind` says what a run is; `run_study` does what is missing in a folder; `Store` holds
what is finished; `results` averages over seeds, with intervals. This room knows neither half of the library: a
half describes its kinds, and whoever starts a study hands one over.
"""

from suffice.study.jobs import Context
from suffice.study.kinds import Kind
from suffice.study.results import (
    Group,
    Interval,
    PairedDifference,
    bootstrap_interval,
    compare_groups,
    group_records,
    mean_interval,
    paired_difference,
    summarize,
)
from suffice.study.runner import Outcome, run_study
from suffice.study.spec import Planned, Spec
from suffice.study.store import Record, Store, StoreError

__all__ = [
    "Context",
    "Group",
    "Interval",
    "Kind",
    "Outcome",
    "PairedDifference",
    "Planned",
    "Record",
    "Spec",
    "Store",
    "StoreError",
    "bootstrap_interval",
    "compare_groups",
    "group_records",
    "mean_interval",
    "paired_difference",
    "run_study",
    "summarize",
]
