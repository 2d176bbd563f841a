"""Names of the data sets, which can be checked without importing torch."""

from __future__ import annotations

from suffice.arguments import did_you_mean

BUILT_IN_NAMES = ("block-model", "digits")
PYG_NAMES = ("Cora", "CiteSeer", "PubMed", "CS", "Physics", "Computers", "Photo")
OGB_NAMES = ("ogbl-collab", "ogbl-ppa")
DATASET_NAMES = (*BUILT_IN_NAMES, *PYG_NAMES, *OGB_NAMES)


def check_dataset_name(argument: str, name: str, others: str) -> str:
    """Return the name of a data set as it is written in `DATASET_NAMES`.

    Args:
        argument: name of the argument, for the error message.
        name: name of a data set in any case.
        others: what else is accepted, for the error message.

    Raises:
        ValueError: there is no such data set; the message lists the names.

    """
    known = {key.lower(): key for key in DATASET_NAMES}
    if name.lower() not in known:
        hint = did_you_mean(name, DATASET_NAMES, str.lower)
        raise ValueError(f"{argument} must be one of {', '.join(DATASET_NAMES)}, or {others}, got {name!r}{hint}")
    return known[name.lower()]
