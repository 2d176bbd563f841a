"""The command line as a whole: help of every command, groups of options, and errors."""

import doctest
import inspect
import io
import re
from pathlib import Path
from types import UnionType
from typing import get_args, get_type_hints

import pytest
import typer
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

import suffice
from suffice.cli import app, console, options
from suffice.files import FIGURE_SUFFIXES
from suffice.report import new_figure, save_figure


def commands(group=None, name="suffice"):
    """Yield every command that is not a group, with its full name."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch_geometric")
    group = group or typer.main.get_command(app)
    context = typer.Context(group)
    for child in group.list_commands(context):
        command = group.get_command(context, child)
        if hasattr(command, "list_commands"):
            yield from commands(command, f"{name} {child}")
        else:
            yield f"{name} {child}", command


def test_every_command_and_option_has_a_help_text():
    for name, command in commands():
        assert command.help.strip().endswith("."), name
        for option in command.params:
            if option.name != "help":
                assert option.help, f"{name}: {option.name}"
                assert option.help.rstrip().endswith((".", ")")), f"{name}: {option.name}: {option.help}"


def test_commands_take_few_parameters():
    for name, command in commands():
        function = inspect.unwrap(command.callback)
        assert len(inspect.signature(function).parameters) <= 8, name


def test_an_option_has_one_type_in_all_commands():
    types = {}
    for name, command in commands():
        for option, annotation in get_type_hints(command.callback).items():
            kinds = set(get_args(annotation)) - {type(None)} if isinstance(annotation, UnionType) else {annotation}
            assert types.setdefault(option, kinds) == kinds, f"{name}: {option}"


def test_help_lists_all_models_and_tasks():
    pytest.importorskip("transformers")
    pytest.importorskip("torch_geometric")
    from suffice.kv.eval.tasks import TASKS
    from suffice.link.data.names import DATASET_NAMES
    from suffice.link.models import models

    help_texts = {(name, option.name): option.help or "" for name, command in commands() for option in command.params}
    for name, (command, option) in {
        **dict.fromkeys(models(), ("suffice link train", "model")),
        **dict.fromkeys(DATASET_NAMES, ("suffice link train", "data")),
        **dict.fromkeys(TASKS, ("suffice kv compare", "tasks")),
    }.items():
        assert re.search(rf"\b{name}\b", help_texts[command, option]), f"{command} --{option} does not list {name}"


def test_version():
    assert CliRunner().invoke(app, ["--version"]).stdout == f"suffice {suffice.__version__}\n"


@pytest.mark.parametrize("defaults", [None, options.OutputOptions(report=Path("page.html"))])
def test_groups_become_options(defaults):
    def show(title: str, output: options.OutputOptions = defaults) -> None:
        calls.append((title, output))

    if defaults is None:
        show.__defaults__ = None
    show.__annotations__ = {"title": str, "output": options.OutputOptions, "return": None}
    calls = []
    application = typer.Typer()
    application.command()(options.expand_options(show))
    assert CliRunner().invoke(application, ["Heads", "--json"]).exit_code == 0
    report = None if defaults is None else Path("page.html")
    assert calls == [("Heads", options.OutputOptions(as_json=True, report=report))]


def test_the_example_of_option_groups_runs():
    results = doctest.testmod(options)
    assert (results.attempted, results.failed) == (3, 0)


def test_an_error_is_one_line_and_status_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["suffice", "study", "status", "nowhere"])
    with pytest.raises(SystemExit) as error:
        suffice.cli.main()
    assert error.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_an_interrupt_is_reported(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("suffice.cli.study.read_status", interrupt)
    monkeypatch.setattr("sys.argv", ["suffice", "study", "status", "nowhere"])
    with pytest.raises(SystemExit) as error:
        suffice.cli.main()
    assert error.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_no_command_installs_shell_completion():
    root = typer.main.get_command(app)
    context = typer.Context(root)
    groups = [root, *(root.get_command(context, name) for name in root.list_commands(context))]
    for command in [*groups, *(command for _, command in commands())]:
        names = {name for option in command.params for name in option.opts}
        assert not {name for name in names if "completion" in name}, command.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kv", "generate", "--prompt", "a", "--figure", "a.xyz"], "--figure must be a file ending in .svg, .*'a.xyz'"),
        (
            ["kv", "generate", "--prompt", "a", "--report", "a.pdf"],
            "--report must be a file ending in .html, .*'a.pdf'",
        ),
        (["kv", "compare", "--figure", "a"], "--figure must be a file ending in .*, got 'a'"),
        (["kv", "compare", "--figure", "."], "--figure must be a file ending in .*, got '.', which is a folder"),
        (["kv", "compare", "--parquet", "a.csv"], "--parquet must be a file ending in .parquet, got 'a.csv'"),
        (["link", "correct", "--figure", "a.gif"], "--figure must be a file ending in .*, got 'a.gif'"),
        (["link", "audit", "--report", "a.txt"], "--report must be a file ending in .*, got 'a.txt'"),
        (["demo", "--figure", "a.xyz"], "--figure must be a file ending in .*, got 'a.xyz'"),
        (["demo", "--report", "a.xyz"], "--report must be a file ending in .*, got 'a.xyz'"),
        (["report", "nowhere", "--to", "a.xyz"], "--to must be a file ending in .*, got 'a.xyz'"),
    ],
)
def test_names_of_output_files_are_checked_before_any_work(monkeypatch, arguments, message):
    pytest.importorskip("transformers")
    pytest.importorskip("torch_geometric")

    def work(*_, **__):
        raise AssertionError("the command began to work")

    for name in ("kv.hf.loading.ModelSource.load", "kv.eval.compare.compare", "link.study.experiment.audit_seeds"):
        monkeypatch.setattr(f"suffice.{name}", work)
    done = CliRunner().invoke(app, arguments)
    assert re.search(message, str(done.exception)), done.exception


def test_all_figure_formats_can_be_written(tmp_path):
    for suffix in FIGURE_SUFFIXES:
        for name in (f"figure{suffix}", f"figure{suffix.upper()}"):
            figure, _ = new_figure(1, 1)
            save_figure(figure, tmp_path / "new" / name)
            assert (tmp_path / "new" / name).stat().st_size > 100


def test_tables_in_files_are_not_cut_off(monkeypatch):
    """A terminal has a width, to which rich fits a table; a file or a pipe has none."""
    table = Table(*(f"column {index}" for index in range(30)))
    table.add_row(*(f"{index:09d}" for index in range(30)))
    printed = io.StringIO()
    monkeypatch.setattr(console, "out", Console(file=printed, width=80))
    console.print_table(table)
    assert all(f"{index:09d}" in printed.getvalue() for index in range(30))
    assert len({len(line) for line in printed.getvalue().splitlines()}) == 1
    printed.truncate(0)
    monkeypatch.setattr(console, "out", Console(file=printed, width=80, force_terminal=True, color_system=None))
    console.print_table(table)
    assert max(len(line) for line in printed.getvalue().strip("\0").splitlines()) == 80
