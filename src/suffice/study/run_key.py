"""Keys of runs: hashes of everything that determines the result of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def canonical_json(value: Any) -> str:
    """Return JSON text that does not depend on the order of keys.

    Raises:
        ValueError: JSON cannot represent the value.

    """
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings must be values that JSON can represent, got {value!r} ({error})") from None


def run_key(kind: str, code_version: str, settings: Mapping[str, Any], seed: int) -> str:
    """Return the key of a run: a hash of its kind, code version, complete settings and seed."""
    text = canonical_json({"kind": kind, "code": code_version, "settings": settings, "seed": seed})
    return hashlib.sha256(text.encode()).hexdigest()[:24]
