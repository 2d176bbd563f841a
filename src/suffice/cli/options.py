"""Options that several commands share, and groups of options: dataclasses whose fields are options."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import typer

from suffice.files import FIGURE_SUFFIXES, PAGE_SUFFIXES, check_suffix

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]


@dataclass(frozen=True)
class ExecutionOptions:
    """Where finished runs are stored, and how many processes execute runs."""

    panel: ClassVar[str] = "Execution"

    folder: Annotated[
        Path | None,
        typer.Option(help="Folder for finished runs, from which the same command resumes. Default: no run is stored."),
    ] = None
    workers: Annotated[int, typer.Option(help="Number of worker processes; 0 runs in this process.", min=0)] = 0
    quiet: QuietOption = False


@dataclass(frozen=True)
class OutputOptions:
    """Output of a command."""

    panel: ClassVar[str] = "Output"

    as_json: JsonOption = False
    report: Annotated[Path | None, typer.Option(help="Write the result as an HTML page to this file.")] = None

    def __post_init__(self) -> None:
        if self.report is not None:
            check_suffix(self.report, PAGE_SUFFIXES, "--report")


@dataclass(frozen=True)
class FigureOptions(OutputOptions):
    """Output of a command that can also write a figure."""

    figure: Annotated[
        Path | None, typer.Option(help="Write a figure of the result to this file, such as curves.svg or curves.png.")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.figure is not None:
            check_suffix(self.figure, FIGURE_SUFFIXES, "--figure")


def split_commas(text: str) -> list[str]:
    """Return the items of a comma-separated list."""
    return [item.strip() for item in text.split(",") if item.strip()]


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with one option for each field of the dataclasses among its parameters.

    The options have the annotations and defaults of the fields. If the parameter has a default, its fields are
    the defaults instead. `--help` lists the options of a dataclass in a panel with the title `panel`, a class variable.

    Args:
        command: a function whose parameters have Typer's annotations, or are dataclasses of options.

    Example:
        >>> @expand_options
        ... def show(title: str, output: OutputOptions = OutputOptions(report=Path("page.html"))) -> None:
        ...     print(title, output)
        >>> list(inspect.signature(show).parameters)
        ['title', 'as_json', 'report']
        >>> show(title="Heads", as_json=True, report=None)
        Heads OutputOptions(as_json=True, report=None)

    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    options: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        annotation = hints[parameter.name]
        if is_dataclass(annotation):
            groups[parameter.name] = annotation
            options += _group_options(annotation, parameter.default)
        else:
            options.append(parameter.replace(annotation=annotation, kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        command(**values)

    # Typer reads the options from the signature and the annotations.
    run.__dict__["__signature__"] = inspect.Signature(options)
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run


def _group_options(group: Any, defaults: Any) -> Iterator[inspect.Parameter]:
    """Yield the options of a group; `defaults` is an instance of the group, or `Parameter.empty`."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        kind, info = get_args(hints[field.name])
        info = copy.copy(info)
        info.rich_help_panel = group.panel
        default = field.default if defaults is inspect.Parameter.empty else getattr(defaults, field.name)
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is MISSING else default,
            annotation=Annotated[kind, info],
        )
