"""Train the same model on biased and on corrected batches, and compare how well its embeddings match the node classes.

python examples/correct_it.py
"""

import argparse

from suffice.link import TrainConfig, correct, load_graph
from suffice.link.study.arms import parse_arm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", default="digits")
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--seeds", type=int, default=5)
arguments = parser.parse_args()

# COMPOSITION/NORM: batches with a fixed fraction of positives, or with random fractions and a balanced loss.
biased, corrected = "fixed/batch", "random+balanced/batch"
results = correct(
    load_graph(arguments.data),
    arms=[parse_arm(biased), parse_arm(corrected)],
    train=TrainConfig(epochs=arguments.epochs),
    seeds=arguments.seeds,
    folder="corrected",  # a second run resumes from here
)
for metric in ("auc", "a_pure:heldout", "kappa:heldout", "edge_nmi"):
    print(metric, {arm: str(results.mean(arm, metric)) for arm in (biased, corrected)})
print(f"{corrected} − {biased}, edge NMI:", results.difference(corrected, biased, "edge_nmi"))
