"""Linear-Gaussian information of sets of weighted vectors.

* `capacity`: the formulas. How much information a set carries in nats, and how much each vector contributes.
* `selection`: choose the vectors to keep within a budget.
* `alignment`: measure how well embeddings separate classes.
* `linalg`: Gram matrices and Cholesky factors in a safe precision.
"""

from suffice.information.alignment import class_information, cluster_nmi, linear_probe, trace_ratio
from suffice.information.capacity import (
    CholeskyFactor,
    capacity,
    deletion_cost,
    effective_dimension,
    factorize,
    leverage_scores,
    noise_variance,
)
from suffice.information.linalg import NotPositiveDefiniteError, gram_matrix, psd_cholesky, working_dtype
from suffice.information.selection import select_by_leverage, select_greedy, select_top

__all__ = [
    "CholeskyFactor",
    "NotPositiveDefiniteError",
    "capacity",
    "class_information",
    "cluster_nmi",
    "deletion_cost",
    "effective_dimension",
    "factorize",
    "gram_matrix",
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
