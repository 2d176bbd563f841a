"""Options that the commands of `suffice link` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _usable(device: str) -> str:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {device!r}; accepted: a device that torch can use here ({reason})") from None
    return device


Data = Annotated[str, typer.Option(help="Data set by name, or an NPZ, CSV or Parquet edge list.")]
Features = Annotated[Path | None, typer.Option(help="Features of the nodes, for a CSV or Parquet edge list.")]
Labels = Annotated[Path | None, typer.Option(help="Classes of the nodes, for a CSV or Parquet edge list.")]
Root = Annotated[Path, typer.Option(help="Folder of downloaded data sets.")]
Seed = Annotated[int, typer.Option(help="First seed.")]
Seeds = Annotated[int, typer.Option(help="Repetitions, each with its own split.")]
Device = Annotated[str, typer.Option(help="Torch device.", callback=_usable)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Report = Annotated[Path | None, typer.Option(help="Write an HTML page.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Checkpoint to write, go on from or audit.")]
CompositionName = Annotated[str, typer.Option(help="fixed:FRACTION, separate or random:LOW,HIGH.")]
Balanced = Annotated[bool, typer.Option("--balanced", help="Weight both classes the same in a batch.")]
Model = Annotated[str, typer.Option(help="encoder-decoder, neognn, ncn, ncnc, elph or buddy.")]
Preset = Annotated[bool, typer.Option("--preset", help="Take the model's published settings for the data set.")]
Encoder = Annotated[str | None, typer.Option(help="gcn (default), sage or pure (no weights).")]
Hidden = Annotated[int | None, typer.Option(help="Number of channels (default 64).")]
Decoder = Annotated[str | None, typer.Option(help="dot, hadamard (default) or concat.")]
EncoderNorm = Annotated[str | None, typer.Option(help="batch (default), layer, graph or none.")]
DecoderNorm = Annotated[str | None, typer.Option(help="batch (default), layer, graph or none.")]
Epochs = Annotated[int, typer.Option(help="Most epochs.")]
Directions = Annotated[int, typer.Option(help="Times an undirected edge is used in an epoch, 1 or 2.")]
Patience = Annotated[int | None, typer.Option(help="Stop after so many epochs without a better metric.")]
BatchSize = Annotated[int, typer.Option(help="Edges in a mini-batch.")]
Rate = Annotated[float, typer.Option(help="Adam's learning rate.")]
Largest = Annotated[bool, typer.Option("--largest-component", help="Keep the largest component only.")]
AtTest = Annotated[bool, typer.Option("--validation-edges-at-test", help="Pass messages over them at test.")]
Validation = Annotated[float, typer.Option(help="Share of edges for validation.")]
Test = Annotated[float, typer.Option(help="Share of edges for the test.")]
Folder = Annotated[Path | None, typer.Option(help="Folder of finished runs, to go on from.")]
Workers = Annotated[int, typer.Option(help="Processes to train in; 0 for this one.", min=0)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]


def positive(seeds: int) -> int:
    """Return a number of seeds that is at least 1.

    Raises:
        ValueError: it is not.

    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; accepted: at least 1")
    return seeds
