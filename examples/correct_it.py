"""Train the same model on biased and on corrected batches, and compare what each keeps of the classes.

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

arms = [parse_arm(key) for key in ("fixed/batch", "random/batch")]
study = correct(
    load_graph(arguments.data),
    arms=arms,
    train=TrainConfig(epochs=arguments.epochs),
    seeds=arguments.seeds,
    folder="corrected",  # run it again and only what is missing is trained
)
for metric in ("auc", "a_pure:heldout", "kappa:heldout", "edge_nmi"):
    print(metric, {arm.key: str(study.mean(arm.key, metric)) for arm in arms})
print("random/batch − fixed/batch, edge NMI:", study.difference("random/batch", "fixed/batch", "edge_nmi"))
