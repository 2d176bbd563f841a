import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from suffice.cli.link import app
from suffice.files import similar_file
from suffice.link.data.checkpoint import CheckpointError, load_checkpoint
from suffice.link.study.experiment import audit_seeds, evaluate_seeds


def run(*arguments: str):
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.fixture
def data(tmp_path) -> str:
    """An NPZ file with a small random graph of three classes."""
    generator = np.random.default_rng(0)
    y = np.arange(120) % 3
    pairs = np.array([(i, j) for i in range(120) for j in range(i) if generator.random() < 0.04 + 0.1 * (y[i] == y[j])])
    path = tmp_path / "own.npz"
    np.savez(path, edges=pairs, x=np.eye(3)[y] + generator.normal(size=(120, 3)), y=y)
    return str(path)


@pytest.mark.parametrize(("command", "key"), [("train", "rows"), ("audit", "audits"), ("align", "rows")])
def test_commands_print_json_and_write_pages(command, key, data, tmp_path):
    page = tmp_path / "page.html"
    result = run(command, "--data", data, "--epochs", "1", "--json", "--report", str(page))
    assert key in json.loads(result.stdout)
    assert "<html" in page.read_text(encoding="utf-8")


def test_an_unusable_device_is_refused():
    with pytest.raises(ValueError, match=r"device .*'moon'"):
        run("train", "--device", "moon")


@pytest.mark.parametrize("command", ["train", "audit", "align", "correct"])
def test_every_command_accepts_every_model(command, data):
    arguments = [command, "--data", data, "--model", "ncn", "--epochs", "1", "--seeds", "1", "--json"]
    if command == "correct":
        arguments += ["--arms", "fixed/batch", "--preset"]
    result = run(*arguments)
    assert result.exit_code == 0
    assert json.loads(result.stdout)
    with pytest.raises(ValueError, match=r"model must be one of .*, got 'mcn'"):
        run(command, "--data", data, "--model", "mcn")


def test_an_audit_of_a_checkpoint_equals_that_of_the_training(data, tmp_path):
    checkpoint = str(tmp_path / "run.safetensors")
    run("train", "--data", data, "--epochs", "1", "--save", checkpoint)
    arguments = ["audit", "--data", data, "--json"]
    of_checkpoint, of_training = run(*arguments, "--checkpoint", checkpoint), run(*arguments, "--epochs", "1")
    assert json.loads(of_checkpoint.stdout) == json.loads(of_training.stdout)


def test_a_checkpoint_of_another_seed_or_graph_is_refused(data, tmp_path):
    """A file of the same name may hold another graph, and another seed trains on edges of this test."""
    file = str(tmp_path / "run.safetensors")
    run("train", "--data", data, "--epochs", "1", "--save", file)
    with pytest.raises(CheckpointError, match="checkpoint must be of a training on this split"):
        run("train", "--data", data, "--seed", "1", "--epochs", "1", "--resume", file)
    arrays = dict(np.load(data))
    np.savez(data, **{**arrays, "edges": arrays["edges"][5:]})
    for command in (("train", "--resume"), ("audit", "--resume"), ("audit", "--checkpoint")):
        with pytest.raises(CheckpointError, match=r"checkpoint must be of a training on this graph, .* \(own\)"):
            run(*command, file, "--data", data, *(() if "--checkpoint" in command else ("--epochs", "1")))


def test_a_training_goes_on_from_its_file(data, tmp_path):
    file, whole = str(tmp_path / "run.safetensors"), str(tmp_path / "whole.safetensors")
    arguments = ["--data", data, "--seeds", "2", "--epochs", "2", "--json"]
    complete = run("train", *arguments, "--save", whole)
    epochs = [len(load_checkpoint(tmp_path / f"whole-{seed}.safetensors")[1]["epochs"]) for seed in (0, 1)]
    assert epochs == [2, 2]
    # The training was interrupted before the second seed began.
    (tmp_path / "whole-0.safetensors").rename(tmp_path / "run-0.safetensors")
    (tmp_path / "whole-1.safetensors").rename(tmp_path / "other.safetensors")
    assert json.loads(run("train", *arguments, "--resume", file).stdout) == json.loads(complete.stdout)
    tensors, expected = (load_checkpoint(tmp_path / name)[0] for name in ("run-1.safetensors", "other.safetensors"))
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "--checkpoint", "ran.safetensors"], r"--checkpoint must be an existing checkpoint, got '.*ran.safe"),
        (["audit", "--checkpoint", "ran.safetensors"], r"Did you mean 'run.safetensors'\?"),
        (["audit", "--resume", "nope.safetensors"], r"--resume must be an existing checkpoint, got '.*nope.safet"),
        (["train", "--resume", "nope.safetensors"], r"--resume must be an existing checkpoint, got '.*nope.safet"),
        (["train", "--seeds", "2", "--resume", "run.safetensors"], r"got '.*run-0.safetensors', which is no file"),
        (["train", "--save", "run.safetensors"], r"--save must be a new file, got '.*run.safe.*', which exists. Go on"),
        (["audit", "--save", "run.safetensors"], r"--save must be a new file, got '.*run.safe.*', which exists. Go on"),
        (
            ["audit", "--save", "new.safetensors", "--checkpoint", "run.safetensors"],
            "only one of --checkpoint, --save, --resume may be given, got --checkpoint and --save",
        ),
        (["audit", "--checkpoint", "run.safetensors", "--model", "ncn"], "without --model, got --model ncn. The"),
        (["audit", "--checkpoint", "run.safetensors", "--hidden", "32"], "without --hidden, got --hidden 32. The"),
        (["audit", "--checkpoint", "run.safetensors", "--epochs", "3"], "without --epochs, got --epochs 3. The"),
        (["audit", "--checkpoint", "run.safetensors", "--balanced"], "without --balanced, got --balanced. The"),
    ],
)
def test_a_wrong_checkpoint_is_refused_before_any_training(monkeypatch, tmp_path, arguments, message):
    """A typo in the name of a checkpoint trained a new model for minutes, and wrote it to a file of that name."""
    monkeypatch.setattr("suffice.cli.link._experiment", lambda *_: pytest.fail("the command began to work"))
    (tmp_path / "run.safetensors").write_bytes(b"")
    paths = [str(tmp_path / text) if text.endswith(".safetensors") else text for text in arguments]
    with pytest.raises(ValueError, match=message):
        run(*paths)
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]


def test_a_file_with_only_the_same_suffix_is_not_similar(tmp_path):
    for name in ("run.pt", "run.safetensors", "zoo.txt"):
        (tmp_path / name).touch()
    assert similar_file(tmp_path / "nope.safetensors") == ""
    assert similar_file(tmp_path / "runn.safetensors") == ". Did you mean 'run.safetensors'?"
    assert similar_file(tmp_path / "runn.pt") == ". Did you mean 'run.pt'?"
    (tmp_path / "run.pt").unlink()
    assert similar_file(tmp_path / "run.safetensorz") == ". Did you mean 'run.safetensors'?"


def test_a_training_with_other_settings_says_how_to_go_on(data, tmp_path):
    file = str(tmp_path / "run.safetensors")
    run("train", "--data", data, "--epochs", "1", "--save", file)
    with pytest.raises(CheckpointError, match=r"epochs=2, got .* with epochs=1. To go on with it, use its"):
        run("train", "--data", data, "--epochs", "2", "--resume", file)


def test_checkpoints_are_checked_in_python_too(tmp_path):
    file = tmp_path / "nope.safetensors"
    for function, argument in ((audit_seeds, "checkpoint"), (audit_seeds, "resume"), (evaluate_seeds, "resume")):
        with pytest.raises(ValueError, match=f"{argument} must be an existing checkpoint, got '.*nope.safetensors'"):
            function(None, range(1), **{argument: file})
    file.write_bytes(b"")
    for function in (audit_seeds, evaluate_seeds):
        with pytest.raises(ValueError, match=r"save must be a new file, got '.*nope.safetensors', which exists"):
            function(None, range(1), save=file)


def test_correct_prints_one_json_object(data, tmp_path):
    page = tmp_path / "page.html"
    arguments = ["correct", "--data", data, "--epochs", "1", "--seeds", "1", "--json"]
    result = run(*arguments, "--arms", "fixed/batch,random/layer", "--report", str(page))
    assert page.read_text(encoding="utf-8").count("<svg") == 2
    rows = json.loads(result.stdout)["rows"]
    columns = {"arm", "encoder_norm", "decoder_norm", "metric", "mean", "low", "high"}
    assert all(columns <= row.keys() for row in rows)
    metrics = {"hits@100", "auc", "a_pure", "tau", "kappa", "edge_nmi", "edge_trace_ratio", "node_nmi"}
    assert metrics <= {row["metric"] for row in rows}


def test_importing_the_package_is_light_and_every_public_name_resolves():
    code = """
import sys
import suffice.link as link
assert not {"transformers", "torch_geometric", "torch"} & sys.modules.keys()
assert sorted(dir(link)) == sorted(link.__all__)
for name in link.__all__:
    assert getattr(link, name).__name__ == name
try:
    link.nothing
except AttributeError as error:
    assert "attribute nothing" in str(error)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
