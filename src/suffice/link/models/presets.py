"""Hyper-parameters of the models' references, by model and data set.

Read from the command lines and defaults of the authors' repositories (GraphPKU/NeuralCommonNeighbor,
melifluos/subgraph-sketching, seongjunyun/Neo-GNNs). What of theirs has no place here: NCN's edge dropout and second
learning rate (the predictor's is taken). Neo-GNN's authors give none for these data sets: theirs for ogbl-collab are
taken, with Adam's usual rate, and two layers, since three do worse in validation.
"""

from __future__ import annotations

from typing import Any

from suffice.link.models.settings import ModelSettings

_NCN: dict[str, Any] = {
    "encoder": "pure",
    "layers": 1,
    "encoder_norm": "layer",
    "decoder_norm": "layer",
    "hidden": 256,
}
_SKETCHED: dict[str, Any] = {"encoder_norm": "none", "decoder_norm": "batch", "hidden": 1024, "dropout": 0.5}
# Batch sizes count positives and negatives: theirs for these two, twice theirs for the others.
_SKETCHED_TRAIN: dict[str, Any] = {"learning_rate": 1e-4, "batch_size": 1024, "epochs": 100, "directions": 1}
_NEOGNN: dict[str, Any] = {"hidden": 256, "layers": 2, "encoder_norm": "none", "decoder_norm": "none"}

_NCN_BY_DATA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Cora": (
        {"input_dropout": 0.7, "encoder_dropout": 0.05, "output_dropout": 0.3, "dropout": 0.05}
        | {"completion": (1.0, 4.3, 2.8, 0.75)},
        {"learning_rate": 2.4e-3, "batch_size": 2304},
    ),
    "CiteSeer": (
        {"input_dropout": 0.4, "encoder_dropout": 0.75, "dropout": 0.55}
        | {"completion": (0.4, 6.5, 4.4, 0.75), "two_layers": True},
        {"learning_rate": 7.8e-3, "batch_size": 768},
    ),
    "PubMed": (
        {"input_dropout": 0.3, "encoder_dropout": 0.1, "dropout": 0.05} | {"completion": (0.3, 5.3, 0.5, 0.5)},
        {"learning_rate": 2e-3, "batch_size": 4096},
    ),
}


def preset(model: str, data: str) -> tuple[ModelSettings, dict[str, Any]]:
    """Return a model's settings and the training's (rate, batch size, epochs, …) as its authors ran it.

    A data set that they didn't run takes their Cora's.

    Args:
        model: `neognn`, `ncn`, `ncnc`, `elph` or `buddy`.
        data: name of the data set.

    Raises:
        ValueError: there is no preset for the model.

    Example:
        >>> settings, training = preset("buddy", "Cora")
        >>> settings.hidden, training["learning_rate"]
        (1024, 0.0001)

    """
    if model in ("elph", "buddy"):
        more: dict[str, Any] = {"hops": 3, "dropout": 0.2} if data == "PubMed" else {}
        more["linear"] = model == "elph"
        return ModelSettings(model=model, **{**_SKETCHED, **more}), dict(_SKETCHED_TRAIN)
    if model in ("ncn", "ncnc"):
        own, training = _NCN_BY_DATA.get(data, _NCN_BY_DATA["Cora"])
        return ModelSettings(model=model, **_NCN, **own), {**training, "epochs": 100, "directions": 1}
    if model == "neognn":
        training = {"learning_rate": 1e-3, "batch_size": 2048, "epochs": 100, "directions": 1, "clip": 1.0}
        return ModelSettings(model=model, **_NEOGNN), training
    raise ValueError(f"model is {model!r}; accepted: neognn, ncn, ncnc, elph, buddy")
