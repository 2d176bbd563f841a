"""Studies: grids of runs that survive anything, on this machine or on Ray.

`Spec` says which runs; a `Kind` says what a run is; `run_study` does what is missing in a folder; `Store` holds
what is finished; `summary` averages over seeds, with intervals. This room knows neither half of the library: a
half describes its kinds, and whoever starts a study hands one over.
"""

from suffice.study.intervals import Interval, over_seeds
from suffice.study.jobs import Context
from suffice.study.kinds import Kind
from suffice.study.runner import Outcome, run_study
from suffice.study.spec import Planned, Spec
from suffice.study.store import Record, Store, StoreError
from suffice.study.summary import Group, differences, group, summarise

__all__ = [
    "Context",
    "Group",
    "Interval",
    "Kind",
    "Outcome",
    "Planned",
    "Record",
    "Spec",
    "Store",
    "StoreError",
    "differences",
    "group",
    "over_seeds",
    "run_study",
    "summarise",
]
