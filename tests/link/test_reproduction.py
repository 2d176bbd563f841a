import json

import pytest
import torch
from typer.testing import CliRunner

from suffice.cli.link import app
from suffice.link.study import findings, published
from suffice.link.study.arms import parse_arm
from suffice.link.study.reproduction import Cell, finished, reproduce, settings_for, to_dict
from suffice.link.train.config import TrainConfig
from suffice.study.results import Group


def cell(arm, values, model="gcn", metric="edge_nmi"):
    group = Group({"model": {"name": "encoder-decoder"}}, {metric: dict(enumerate(values))})
    return Cell("G", model, arm, group, {"affected": len(values)})


def test_words_follow_the_intervals():
    cells = [cell("fixed/batch", [0.1, 0.2, 0.3]), cell("random/batch", [0.5, 0.61, 0.7])]
    cells += [cell("fixed/batch", [0.5, 0.6], "ncn"), cell("random/batch", [0.3, 0.41], "ncn")]
    cells += [cell("fixed/batch", [0.5, 0.6], "elph"), cell("random/batch", [0.9, 0.2], "elph")]
    cells += [cell("fixed/batch", [0.5], "sage"), cell("random/batch", [0.9], "sage")]
    (said,) = findings.sentences(cells)
    assert "in 1 of 3 (G: gcn); the opposite in 1 of 3 (G: ncn); the interval includes 0 in 1 of 3 (G: elph)." in said
    assert "The NMI of edge embeddings with the classes rises: in all 1." in findings.sentences(cells[:2])
    gap = findings.difference(cells[1], cells[0], "edge_nmi")
    assert gap is not None
    assert gap.mean == pytest.approx(0.4033, abs=1e-4)
    text = findings.markdown(cells)
    assert "| gcn | random/batch − fixed/batch |  |  |  |  | +0.403" in text
    assert "fixed/batch: 8 affected." in text
    assert len(to_dict(cells)["rows"]) == 8


def test_arms_are_compared_with_the_usual_batches_under_their_norms():
    arms = ("fixed/layer", "random/layer", "random own/batch", "fixed own/batch", "random/batch")
    cells = [cell(arm, [0.1, 0.2]) for arm in arms]
    assert findings.compared(cells) == [("random/layer", "fixed/layer"), ("random own/batch", "fixed own/batch")]
    assert ("fixed/layer", "fixed/batch") in findings.compared([*cells, cell("fixed/batch", [0.1])])
    assert "| difference |" not in findings.markdown(cells[:1])
    assert "replicates" not in findings.markdown(cells[:1])


def test_a_study_is_compared_with_what_authors_print():
    def own(data, model, values):
        return Cell(data, model, "fixed own/none", Group({"model": model}, {"hits@100": dict(enumerate(values))}), {})

    assert published.lines([cell("fixed/batch", [0.9], "ncn", "hits@100")]) == []
    cells = [own("Cora", "neognn", [0.79, 0.81]), own("Cora", "gcn", [0.85]), own("digits", "gcn", [0.85])]
    text = "\n".join(published.lines(cells))
    assert "| Cora | neognn | 80.0 ± 1.4 | 80.4 ± 1.3 | -0.4 | -0.3 |" in text
    assert "| Cora | gcn | 85.0 ± 0.0 | 66.8 ± 1.6 | +18.2 | +11.0 |" in text
    assert "Within two published standard deviations: 1 of 2." in text
    assert "Hits@100 as published" in findings.markdown(cells)


def test_models_are_named():
    assert settings_for("sage")[0].encoder == "sage"
    assert settings_for("buddy", published="Cora")[0].hidden == 1024
    with pytest.raises(ValueError, match="models hold 'gat'; accepted: gcn, sage"):
        settings_for("gat")
    with pytest.raises(ValueError, match="accepted: one or more"):
        reproduce([], "nowhere")


def test_a_model_is_trained_with_the_norms_of_its_authors(tmp_path):
    train = TrainConfig(epochs=1, directions=1)
    (own,) = reproduce(
        ["digits"], tmp_path, models=["ncn"], arms=[parse_arm("fixed/own")], seeds=1, train=train, published=True
    )
    assert own.arm == "fixed own/layer"
    assert abs(own.group.values["kappa:heldout"][0]) < 1e-9  # a layer norm sees no batch


def test_a_study_goes_on_where_it_stopped(tmp_path):
    train = TrainConfig(epochs=1, directions=1)
    asked = {"models": ("gcn", "buddy"), "seeds": 1, "train": train, "hidden": 8}
    first = reproduce(["digits"], tmp_path, arms=[parse_arm("fixed/batch")], **asked)
    assert [(c.data, c.model, c.arm) for c in first] == [
        ("digits", "gcn", "fixed/batch"),
        ("digits", "buddy", "fixed/batch"),
    ]
    lines = []
    arms = [parse_arm("fixed/batch"), parse_arm("random/batch")]
    both = reproduce(["digits"], tmp_path, arms=arms, watch=lambda _, line: lines.append(line), **asked)
    assert len(both) == 4
    assert first[0].group.values == both[0].group.values
    assert len(finished(tmp_path)) == 4
    torch.manual_seed(0)
    page = tmp_path / "page.md"
    arguments = ["reproduce", "--show", "--folder", str(tmp_path), "--json", "--markdown", str(page)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert {row["model"] for row in json.loads(result.stdout)["rows"]} == {"gcn", "buddy"}
    assert "### digits" in page.read_text(encoding="utf-8")
