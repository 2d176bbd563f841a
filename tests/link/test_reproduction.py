import json

import pytest
from typer.testing import CliRunner

from suffice.cli.link import app
from suffice.link.study.arms import parse_arm
from suffice.link.study.findings import describe_claims, find_compared_arms, paired_interval, to_markdown
from suffice.link.study.published import published_table
from suffice.link.study.reproduction import load_results, model_and_training, reproduce, results_to_dict
from suffice.link.study.results import ArmResults
from suffice.link.train.config import TrainConfig
from suffice.study.results import Group


def make_results(arm, values, model="gcn", metric="edge_nmi", graph="G"):
    verdicts = dict.fromkeys(range(len(values)), "affected")
    return ArmResults(graph, model, arm, Group({}, {metric: dict(enumerate(values))}), verdicts=verdicts)


def test_findings_follow_the_intervals():
    results = [make_results("fixed/batch", [0.1, 0.2, 0.3]), make_results("random/batch", [0.5, 0.61, 0.7])]
    results += [make_results("fixed/batch", [0.5, 0.6], "ncn"), make_results("random/batch", [0.3, 0.41], "ncn")]
    results += [make_results("fixed/batch", [0.5, 0.6], "elph"), make_results("random/batch", [0.9, 0.2], "elph")]
    results += [make_results("fixed/batch", [0.5], "sage"), make_results("random/batch", [0.9], "sage")]
    (sentence,) = describe_claims(results)
    assert sentence == (
        "The NMI of edge embeddings with the classes is higher: confirmed in 1 of 3 (G: gcn); the opposite is found in "
        "1 of 3 (G: ncn); undecided (the interval contains 0) in 1 of 3 (G: elph)."
    )
    assert "The NMI of edge embeddings with the classes is higher: confirmed in all 1." in describe_claims(results[:2])
    interval = paired_interval(results[1], results[0], "edge_nmi")
    assert interval is not None
    assert interval.mean == pytest.approx(0.4033, abs=1e-4)
    text = to_markdown(results)
    assert "| gcn | random/batch − fixed/batch |  |  |  |  | +0.403" in text
    assert "fixed/batch: 8 affected." in text
    assert len(results_to_dict(results)["rows"]) == 8


def test_arms_are_compared_with_fixed_fractions_under_the_same_norms():
    arms = ("fixed/layer", "random/layer", "random own/batch", "fixed own/batch", "random/batch")
    results = [make_results(arm, [0.1, 0.2]) for arm in arms]
    assert find_compared_arms(results) == [("random/layer", "fixed/layer"), ("random own/batch", "fixed own/batch")]
    with_batch_norm = [*results, make_results("fixed/batch", [0.1])]
    assert ("fixed/layer", "fixed/batch") in find_compared_arms(with_batch_norm)
    assert "| difference |" not in to_markdown(results[:1])
    assert "Claims" not in to_markdown(results[:1])


def test_hits_are_compared_with_published_numbers():
    def own_norms(graph, model, values):
        return make_results("fixed own/none", values, model, "hits@100", graph)

    assert published_table([make_results("fixed/batch", [0.9], "ncn", "hits@100", "Cora")]) == []
    results = [own_norms("Cora", "neognn", [0.79, 0.81]), own_norms("Cora", "gcn", [0.85])]
    results.append(own_norms("digits", "gcn", [0.85]))
    text = "\n".join(published_table(results))
    assert "| Cora | neognn | 80.0 ± 1.4 | 80.4 ± 1.3 | -0.4 | -0.3 |" in text
    assert "| Cora | gcn | 85.0 ± 0.0 | 66.8 ± 1.6 | +18.2 | +11.0 |" in text
    assert "1 of 2 are within two published standard deviations." in text
    assert "Hits@100 as published" in to_markdown(results)


def test_models_have_their_settings_by_name():
    assert model_and_training("sage")[0].encoder == "sage"
    model, training = model_and_training("buddy", published_data="Cora")
    assert model.hidden == 1024
    assert training["learning_rate"] == 1e-4
    assert "epochs" not in training
    with pytest.raises(ValueError, match=r"models must be among gcn, sage, .*, got 'gat'"):
        model_and_training("gat")
    with pytest.raises(ValueError, match="data must contain at least one name"):
        reproduce([], "nowhere")


def test_a_model_can_be_trained_with_its_own_norms(tmp_path):
    train = TrainConfig(epochs=1, directions=1)
    (results,) = reproduce(
        ["digits"], tmp_path, models=["ncn"], arms=[parse_arm("fixed/own")], seeds=1, train=train, published=True
    )
    assert results.arm == "fixed own/layer"
    assert abs(results.group.values["kappa:heldout"][0]) < 1e-9  # LayerNorm cannot see the batch


def test_an_extended_study_keeps_finished_runs(tmp_path):
    train = TrainConfig(epochs=1, directions=1)
    options = {"models": ("gcn", "buddy"), "seeds": 1, "train": train, "hidden": 8}
    first = reproduce(["digits"], tmp_path, arms=[parse_arm("fixed/batch")], **options)
    assert [(one.graph, one.model, one.arm) for one in first] == [
        ("digits", "gcn", "fixed/batch"),
        ("digits", "buddy", "fixed/batch"),
    ]
    lines = []
    arms = [parse_arm("fixed/batch"), parse_arm("random/batch")]
    both = reproduce(
        ["digits"], tmp_path, arms=arms, on_progress=lambda _, line: lines.append(line) if line else None, **options
    )
    assert len(both) == 4
    assert len(lines) == 2
    assert first[0].group.values == both[0].group.values
    assert load_results(tmp_path) == both
    page = tmp_path / "page.md"
    arguments = ["reproduce", "--show", "--folder", str(tmp_path), "--json", "--markdown", str(page)]
    output = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    assert {row["model"] for row in json.loads(output)["rows"]} == {"gcn", "buddy"}
    assert "### digits" in page.read_text(encoding="utf-8")
