"""Run a grid of trainings on a Ray cluster, or on one that is started on this machine.

pip install 'suffice[scale,graph]'
python examples/study_on_ray.py --ray local      # or auto, or HOST:6379
"""

import argparse

from suffice.link.study.run_kinds import CORRECT
from suffice.study import Spec, Store, group_records, run_study, summarize

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--ray", default="local", help="address of the cluster")
parser.add_argument("--epochs", type=int, default=12)
arguments = parser.parse_args()

# Two ways of training, each with two seeds. `suffice study kinds` lists the settings.
spec = Spec(
    name="norms",
    kind="link.correct",
    settings={"data.name": "digits", "train.epochs": arguments.epochs},
    grid={"arm": ["fixed/batch", "fixed/layer"]},
    seeds=2,
)
outcome = run_study("norms", CORRECT, spec, ray=arguments.ray, threads=1)  # a second run does only missing runs
print(f"{outcome.done} done, {outcome.failed} failed, in {outcome.seconds:.0f} s")

# Means over seeds with 95 % intervals.
with Store("norms", read_only=True) as store:
    rows = summarize(group_records(store.records("norms")))
for row in rows:
    if row["metric"] in ("kappa:heldout", "edge_nmi"):
        print(row["arm"], row["metric"], f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")
