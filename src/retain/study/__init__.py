"""Studies: grids of runs that survive anything, on this machine or on Ray.

`Spec` says which runs; a `Kind` says what a run is; `run_study` does what is missing in a folder; `Store` holds
what is finished; `summary` averages over seeds, with intervals. This room knows neither half of the library: a
half describes its kinds, and whoever starts a study hands one over.
"""

from retain.study.intervals import Interval, over_seeds
from retain.study.jobs import Context
from retain.study.kinds import Kind
from retain.study.runner import Outcome, run_study
from retain.study.spec import Planned, Spec
from retain.study.store import Record, Store, StoreError
from retain.study.summary import Group, differences, group, summarise

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
