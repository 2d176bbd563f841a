"""The kind of run `link.correct`: train and audit an arm, and measure its alignment with the node classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from suffice.link.study.run_settings import RunSettings, default_settings
from suffice.study.run_kind import RunKind


def check(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check complete settings before any work, and return them with all options of the model.

    `data.digest` holds a digest of the user's files, so that a run is executed again when their content changes.

    Raises:
        ValueError: a setting is not accepted.

    """
    parsed = RunSettings.from_dict(settings)
    checked = parsed.to_dict()
    checked["data"]["digest"] = parsed.data.digest()
    return checked


CORRECT = RunKind(
    name="link.correct",
    function="suffice.link.study.run:train_and_audit",
    check="suffice.link.study.run_kinds:check",
    report_sections="suffice.link.study.report_sections:add_records",
    compared_setting="arm",
    settings=default_settings(),
    description="Train and audit a link predictor, and measure its alignment with the node classes.",
)
KINDS = {CORRECT.name: CORRECT}
