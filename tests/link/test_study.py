import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from suffice.cli.link import app
from suffice.link.auditing.trained import audit_trained
from suffice.link.models import EncoderDecoderSettings
from suffice.link.study.arms import ARMS, parse_arm
from suffice.link.study.correct import correct, edge_maps
from suffice.link.study.figures import audit_response, embedding_map
from suffice.link.study.report_sections import audit_page, study_page
from suffice.link.study.run_kinds import describe_arm, read_arm
from suffice.link.train.alignment import incident_edge_means, measure_alignment
from suffice.link.train.config import TrainConfig
from suffice.study import Store, mean_interval

QUICK = TrainConfig(epochs=2, batch_size=256)


def test_incident_means_by_brute_force(parts, graph):
    embedded = torch.randn(parts.train.size(1), 3)
    means, has = incident_edge_means(embedded, parts.train, graph.num_nodes)
    for row, node in enumerate(has.nonzero().flatten().tolist()):
        own = (parts.train == node).any(dim=0)
        assert torch.allclose(means[row], embedded[own].mean(0), atol=1e-5)
    assert int(has.sum()) == parts.train.unique().numel()


def test_small_classes_do_not_stop_the_measures():
    x = torch.randn(40, 3)
    small, single = (torch.tensor([0] * (40 - n) + [1] * n) for n in (3, 1))
    assert 0 <= measure_alignment(x, small, measures=("probe",))["probe"] <= 1
    found = measure_alignment(x, single)
    assert math.isnan(found.pop("probe"))
    assert all(math.isfinite(value) for value in found.values())


def test_a_study_goes_on_where_it_stopped_and_pairs_by_seed(graph, tmp_path):
    arms = [ARMS[0], ARMS[1], ARMS[4], ARMS[5]]
    lines: list[str] = []
    whole = correct(graph, arms=arms, train=QUICK, seeds=2, folder=tmp_path)
    with Store(tmp_path) as store:
        (name,) = store.studies()
        store.discard_results([r.key for r in store.records(name) if (r.settings["arm"], r.seed) == ("fixed/layer", 1)])
    again = correct(graph, arms=arms, train=QUICK, seeds=2, folder=tmp_path, progress=lines.append)
    assert again == whole
    assert len(lines) == 8
    with Store(tmp_path) as store:  # only the missing run was made again
        begun = {(r.settings["arm"], r.seed): r.attempts for r in store.records(name)}
    assert begun.pop(("fixed/layer", 1)) == 2
    assert set(begun.values()) == {1}
    one, two = (whole.values(key, "edge_nmi") for key in ("random/batch", "fixed/batch"))
    gain = [a - b for a, b in zip(one, two, strict=True)]
    assert whole.difference("random/batch", "fixed/batch", "edge_nmi") == mean_interval(gain)
    three, four = (whole.values(key, "edge_nmi") for key in ("random/layer", "fixed/layer"))
    beyond = mean_interval([g - (a - b) for g, a, b in zip(gain, three, four, strict=True)])
    (last,) = [row for row in whole.differences() if row["of"].startswith("(") and row["metric"] == "edge_nmi"]
    assert last["of"] == "(random/batch − fixed/batch)"
    assert last["minus"] == "(random/layer − fixed/layer)"
    assert [last["mean"], last["low"]] == pytest.approx([beyond.mean, beyond.low])


def test_rows_of_a_study(graph, tmp_path):
    arms = [parse_arm(key) for key in ("fixed/batch", "random+balanced/layer", "random/none-batch")]
    found = correct(graph, arms=arms, train=QUICK, seeds=2, folder=tmp_path).to_dict()
    norms = {(row["arm"], row["encoder_norm"], row["decoder_norm"]) for row in found["rows"]}
    assert norms == {("fixed", "batch", "batch"), ("random+balanced", "layer", "layer"), ("random", "none", "batch")}
    kappa = [row for row in found["rows"] if row["metric"] == "kappa"]
    assert {row["split"] for row in kappa} == {"heldout", "train"}
    honest = [row["mean"] for row in kappa if row["decoder_norm"] == "layer"]
    assert honest == pytest.approx([0, 0], abs=1e-3)
    assert {row["of"] for row in found["references"]} == {"raw features", "untrained"}
    assert found["settings"]["protocol"]["validation_edges_at_test"] is False


def test_the_page_of_a_study_shows_differences_and_maps(graph, tmp_path):
    study = correct(graph, arms=ARMS[:2], train=QUICK, seeds=2, folder=tmp_path)
    maps = edge_maps(graph, ARMS[:2], tmp_path)
    assert [len(x) == len(y) for x, y in maps.values()] == [True, True]
    html = study_page(study, "suffice link correct", maps).to_html()
    assert html.count("<svg") == 2
    assert "random/batch − fixed/batch" in html
    assert "t-SNE" in html
    assert all(part in html for part in ("raw features", "untrained", study.runs["fixed/batch"][0]["verdict"]))


def test_an_unknown_arm_is_named():
    for key, message in (
        ("mixed/batch", "arm is 'mixed/batch'"),
        ("fixed/group", "norm must be one of batch, layer, graph, none, got 'group'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_arm(key)
    assert [parse_arm(arm.key) for arm in ARMS] == list(ARMS)


def test_an_arm_can_keep_the_models_own_norms():
    settings = EncoderDecoderSettings(encoder_norm="none", decoder_norm="layer")
    arm = parse_arm("fixed/own").resolved(settings)
    assert (arm.model(EncoderDecoderSettings()), arm.key, arm.learning_rate) == (settings, "fixed own/none-layer", None)
    assert parse_arm("random/own-batch").resolved(settings).key == "random own/none-batch"
    assert parse_arm("fixed/layer").resolved(settings) == parse_arm("fixed/layer")
    assert read_arm(describe_arm(arm)) == arm


def test_an_audit_draws_its_page(graph, parts):
    report = audit_trained(EncoderDecoderSettings(hidden=16).build(16), graph, parts)
    html = audit_page(report, "suffice link audit").to_html()
    assert report.verdict.why in html.replace("&#39;", "'")
    assert len(audit_response(report).axes[0].lines) == 2


def test_a_map_has_a_panel_for_each_training():
    x, y = torch.randn(60, 4), torch.arange(60) % 3
    figure = embedding_map({"fixed": (x, y), "random": (x, y)}, most=40)
    assert [axes.get_title() for axes in figure.axes] == ["fixed", "random"]
    assert all(len(axes.collections[0].get_offsets()) == 40 for axes in figure.axes)


def _data(tmp_path) -> str:
    generator = np.random.default_rng(0)
    y = np.arange(120) % 3
    pairs = np.array([(i, j) for i in range(120) for j in range(i) if generator.random() < 0.04 + 0.1 * (y[i] == y[j])])
    path = tmp_path / "own.npz"
    np.savez(path, edges=pairs, x=np.eye(3)[y] + generator.normal(size=(120, 3)), y=y)
    return str(path)


@pytest.mark.parametrize("command", ["train", "audit", "align"])
def test_commands_print_json_and_write_pages(command, tmp_path):
    report = tmp_path / "page.html"
    arguments = [command, "--data", _data(tmp_path), "--epochs", "1", "--json", "--report", str(report)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    found = json.loads(result.stdout)
    assert {"train": "rows", "audit": "audits", "align": "rows"}[command] in found
    assert report.read_text().startswith("<!doctype html>") or "<html" in report.read_text()


def test_an_unusable_device_is_named():
    with pytest.raises(ValueError, match="device is 'moon'; accepted: a device"):
        CliRunner().invoke(app, ["train", "--device", "moon"], catch_exceptions=False)


@pytest.mark.parametrize("command", ["train", "audit", "align", "correct"])
def test_every_command_takes_a_model(command, tmp_path):
    data = _data(tmp_path)
    arguments = [command, "--data", data, "--model", "ncn", "--epochs", "1", "--seeds", "1", "--json"]
    if command == "correct":
        arguments += ["--arms", "fixed/batch", "--preset"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert json.loads(result.stdout)
    with pytest.raises(ValueError, match=r"model must be one of .*, got 'mcn'"):
        CliRunner().invoke(app, [command, "--data", data, "--model", "mcn"], catch_exceptions=False)


def test_audit_takes_a_checkpoint(tmp_path):
    data, path = _data(tmp_path), str(tmp_path / "run.safetensors")
    runner = CliRunner()
    runner.invoke(app, ["train", "--data", data, "--epochs", "1", "--checkpoint", path], catch_exceptions=False)
    arguments = ["audit", "--data", data, "--epochs", "1", "--json"]
    one = runner.invoke(app, [*arguments, "--checkpoint", path], catch_exceptions=False)
    two = runner.invoke(app, arguments, catch_exceptions=False)
    assert json.loads(one.stdout) == json.loads(two.stdout)


def test_correct_prints_one_object(tmp_path):
    arguments = ["correct", "--data", _data(tmp_path), "--epochs", "1", "--seeds", "1", "--json"]
    page = tmp_path / "page.html"
    arguments += ["--arms", "fixed/batch,random/layer", "--report", str(page)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert page.read_text(encoding="utf-8").count("<svg") == 2
    rows = json.loads(result.stdout)["rows"]
    needed = {"arm", "encoder_norm", "decoder_norm", "metric", "mean", "low", "high"}
    assert all(needed <= row.keys() for row in rows)
    assert {"hits@100", "auc", "a_pure", "tau", "kappa", "edge_nmi", "edge_trace_ratio", "node_nmi"} <= {
        row["metric"] for row in rows
    }


def test_import_is_light_and_names_resolve():
    code = (
        "import sys, suffice.link as link; assert 'transformers' not in sys.modules; "
        "assert 'torch_geometric' not in sys.modules; import suffice.link.study.report_sections; "
        "[getattr(link, name) for name in link.__all__]; assert callable(link.audit) and callable(link.correct)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
