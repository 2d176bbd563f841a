"""Studies: resumable grids of runs, on this machine or on a Ray cluster.

A `RunKind` describes one kind of run, and a `Spec` describes a grid of runs. `run_study` executes the runs that a
folder does not hold yet, and a `Store` gives access to the finished ones. `group_records`, `summarize` and
`compare_groups` compute means over seeds and paired differences with confidence intervals.

This package depends neither on `suffice.kv` nor on `suffice.link`: callers pass the kind of run.
"""

import lazy_loader

# The public names are listed in __init__.pyi and imported on first use, because NumPy and SciPy take time to import.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
