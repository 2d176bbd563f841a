"""Linear-Gaussian information of sets of weighted vectors.

* `linalg`: working precision, Gram matrices, Cholesky factors.
* `capacity`: how much a set carries in nats, and what each of its items contributes.
* `selection`: which items to keep within a budget.
* `alignment`: how well embeddings align with classes.
"""

from suffice.information.alignment import class_information, cluster_nmi, linear_probe, trace_ratio
from suffice.information.capacity import (
    Factor,
    capacity,
    deletion_cost,
    effective_dimension,
    factorize,
    leverage_scores,
    noise_variance,
)
from suffice.information.linalg import NotPositiveDefiniteError, gram, psd_cholesky, working_dtype
from suffice.information.selection import select_by_leverage, select_greedy, select_top

__all__ = [
    "Factor",
    "NotPositiveDefiniteError",
    "capacity",
    "class_information",
    "cluster_nmi",
    "deletion_cost",
    "effective_dimension",
    "factorize",
    "gram",
    "leverage_scores",
    "linear_probe",
    "noise_variance",
    "psd_cholesky",
    "select_by_leverage",
    "select_greedy",
    "select_top",
    "trace_ratio",
    "working_dtype",
]
