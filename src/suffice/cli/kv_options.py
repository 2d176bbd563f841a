"""Options that commands of `suffice kv` share."""

from __future__ import annotations

from typing import Annotated

import typer

ModelOption = Annotated[str, typer.Option(help="Hugging Face model id or local folder.")]
DeviceOption = Annotated[str, typer.Option(help="Torch device, as cpu or cuda:0.")]
DtypeOption = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
AttnOption = Annotated[str, typer.Option(help="Attention implementation: sdpa or eager.")]


def parse_budget(text: str) -> float:
    """Return a budget: `500` is tokens, `0.25` and `25%` are fractions."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return float(text) if any(mark in text for mark in ".e") else int(text)
    except ValueError:
        raise ValueError(
            f"budget is {text!r}; accepted: tokens as 500, a fraction as 0.25, or a percentage as 25%"
        ) from None
