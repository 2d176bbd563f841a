"""The kind of run of this half: train an arm, audit it, and measure what it keeps of the classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from suffice.link.study.run_settings import RunSettings, default_settings
from suffice.study.run_kind import RunKind


def check(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check complete settings before any work, and return them with all options of the model.

    A user's own files enter by their content, as `data.digest`.

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
    description="Train a link predictor in one way, audit it, and measure what it keeps of the classes.",
)
KINDS = {CORRECT.name: CORRECT}
