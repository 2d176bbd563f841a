from dataclasses import replace

import pytest
import torch

from suffice import SufficeError
from suffice.link.auditing.trained import audit_trained
from suffice.link.batches.composition import Random
from suffice.link.data.graph import SplitConfig
from suffice.link.models import EncoderDecoderSettings, get_model_settings
from suffice.link.study.arms import ARMS, Arm, parse_arm
from suffice.link.study.correct import correct, load_edge_representations
from suffice.link.study.figures import plot_audit, plot_embeddings
from suffice.link.study.report_sections import audit_page, results_page
from suffice.link.study.results import collect_study
from suffice.link.study.run_kinds import CORRECT
from suffice.link.study.run_settings import DataSource, RunSettings
from suffice.link.train.alignment import measure_alignment
from suffice.link.train.config import TrainConfig
from suffice.study import Store, mean_interval

QUICK = TrainConfig(epochs=2, batch_size=256)


def test_a_study_resumes_and_its_differences_are_paired_by_seed(graph, tmp_path):
    arms = [ARMS[0], ARMS[1], ARMS[4], ARMS[5]]
    lines: list[str] = []
    results = correct(graph, arms=arms, train=QUICK, seeds=2, folder=tmp_path)
    with Store(tmp_path) as store:
        (name,) = store.studies()
        store.discard_results([r.key for r in store.records(name) if (r.settings["arm"], r.seed) == ("fixed/layer", 1)])
        with pytest.raises(SufficeError, match=r"1 of 11 runs are not done. The first is arm fixed/layer, seed 1"):
            collect_study("g", {"seeds": [0, 1]}, list(store.records(name)))
    resumed = correct(graph, arms=arms, train=QUICK, seeds=2, folder=tmp_path, log=lines.append)
    assert resumed == results
    # Epochs are logged every few seconds, so their number depends on the load of the machine.
    assert len([line for line in lines if ", loss " not in line]) == 8
    with Store(tmp_path) as store:  # only the missing run was repeated
        attempts = {(r.settings["arm"], r.seed): r.attempts for r in store.records(name)}
    assert attempts.pop(("fixed/layer", 1)) == 2
    assert set(attempts.values()) == {1}

    def values(arm):
        return list(results.arms[arm].group.values["edge_nmi"].values())

    gain = [a - b for a, b in zip(values("random+balanced/batch"), values("fixed/batch"), strict=True)]
    assert results.difference("random+balanced/batch", "fixed/batch", "edge_nmi") == mean_interval(gain)
    gain_of_layer = [a - b for a, b in zip(values("random+balanced/layer"), values("fixed/layer"), strict=True)]
    expected = mean_interval([a - b for a, b in zip(gain, gain_of_layer, strict=True)])
    (last,) = [row for row in results.differences() if row["of"].startswith("(") and row["metric"] == "edge_nmi"]
    assert last["of"] == "(random+balanced/batch − fixed/batch)"
    assert last["minus"] == "(random+balanced/layer − fixed/layer)"
    assert [last["mean"], last["low"]] == pytest.approx([expected.mean, expected.low])

    rates = {"fixed/batch": 0.005, "random+balanced/batch": 0.005, "fixed/layer": 0.001, "random+balanced/layer": 0.001}
    assert results.to_dict()["learning_rates"] == rates
    html = results_page(results, "suffice link correct").to_html()
    assert "A difference of differences is" in html
    text = "0.005 for fixed/batch, random+balanced/batch; 0.001 for fixed/layer, random+balanced/layer."
    assert f"The learning rate differs: {text}" in html


def test_references_are_shown_and_continue_where_they_were_interrupted(graph, tmp_path, monkeypatch):
    from suffice.link.study import references

    computed: list[str] = []

    def measure(x, classes, *, measures):
        computed.extend(measures)
        if len(computed) == 3:
            raise KeyboardInterrupt
        return measure_alignment(x, classes, measures=measures)

    monkeypatch.setattr(references, "measure_alignment", measure)
    arms, lines = ARMS[:1], []
    with pytest.raises(KeyboardInterrupt):
        correct(graph, arms=arms, train=QUICK, seeds=1, folder=tmp_path)
    results = correct(graph, arms=arms, train=QUICK, seeds=1, folder=tmp_path, log=lines.append)
    assert computed == ["nmi", "trace_ratio", "probe", "probe", "class_information"]
    assert [line.partition(" (")[0] for line in lines if " done" in line and line.startswith("arm")] == [
        "arm raw features, seed 0: measure 4 of 4, class_information",
        "arm untrained, seed 0: edge_class_information",
    ]
    expected = {f"node_{name}": {0: value} for name, value in measure_alignment(graph.x, graph.classes).items()}
    assert results.references["raw features"].values == expected
    # Another training of the graph finds them.
    correct(graph, arms=arms, train=replace(QUICK, epochs=1), seeds=1, folder=tmp_path)
    assert len(computed) == 5


def test_rows_of_a_study(graph, tmp_path):
    arms = [parse_arm(key) for key in ("fixed/batch", "random+balanced/layer", "random/none-batch")]
    found = correct(graph, arms=arms, train=QUICK, seeds=2, folder=tmp_path).to_dict()
    norms = {(row["arm"], row["encoder_norm"], row["decoder_norm"]) for row in found["rows"]}
    assert norms == {("fixed", "batch", "batch"), ("random+balanced", "layer", "layer"), ("random", "none", "batch")}
    kappa = [row for row in found["rows"] if row["metric"] == "kappa"]
    assert {row["edge_set"] for row in kappa} == {"heldout", "train"}
    of_layer_norm = [row["mean"] for row in kappa if row["decoder_norm"] == "layer"]
    assert of_layer_norm == pytest.approx([0, 0], abs=1e-3)
    assert {row["of"] for row in found["references"]} == {"raw features", "untrained"}
    assert found["settings"]["split"]["validation_edges_at_test"] is False


def test_the_page_of_a_study_shows_differences_and_embeddings(graph, tmp_path):
    results = correct(graph, arms=ARMS[:2], train=QUICK, seeds=2, folder=tmp_path)
    representations = load_edge_representations(graph, ARMS[:2], tmp_path)
    assert [len(x) == len(y) for x, y in representations.values()] == [True, True]
    html = results_page(results, "suffice link correct", representations).to_html()
    assert html.count("<svg") == 2
    assert "random+balanced/batch − fixed/batch" in html
    assert "difference of differences" not in html  # there are none
    assert "learning rate differs" not in html
    assert "t-SNE" in html
    assert all(text in html for text in ("raw features", "untrained", results.arms["fixed/batch"].verdicts[0]))


def test_impossible_studies_are_refused(graph):
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        correct(graph, seeds=0)
    with pytest.raises(ValueError, match=r"arms must contain at least one arm and no arm twice, got \['fixed/batch', "):
        correct(graph, arms=[ARMS[0], ARMS[0]])


def test_arms_have_keys_that_are_parsed_back():
    for key, message in (
        ("mixed/batch", "arm must be one of fixed, .*, got 'mixed/batch'"),
        ("fixed/group", "encoder_norm must be one of batch, layer, graph, none, got 'group'"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_arm(key)
    assert [parse_arm(arm.key) for arm in ARMS] == list(ARMS)


def test_an_arm_can_keep_the_models_own_norms():
    settings = EncoderDecoderSettings(encoder_norm="none", decoder_norm="layer")
    arm = parse_arm("fixed/own").resolve_norms(settings)
    assert arm.apply_to_model(EncoderDecoderSettings()) == settings
    assert (arm.key, arm.learning_rate) == ("fixed own/none-layer", None)
    assert parse_arm("random/own-batch").resolve_norms(settings).key == "random own/none-batch"
    assert parse_arm("fixed/layer").resolve_norms(settings) == parse_arm("fixed/layer")
    assert Arm.from_setting(arm.to_setting()) == arm


@pytest.mark.parametrize("model", ["encoder-decoder", "ncnc", "buddy"])
def test_run_settings_are_read_back(model):
    arm = Arm("narrow", Random(0.3, 0.7), encoder_norm="none", learning_rate=0.01)
    settings = RunSettings(
        arm,
        DataSource("Cora", root="elsewhere"),
        get_model_settings(model)(hidden=8),
        TrainConfig(epochs=3, clip=1.0),
        SplitConfig(0.1, 0.2),
    )
    complete = CORRECT.complete(settings.to_dict())
    assert RunSettings.from_dict(complete) == settings
    assert complete["model"]["name"] == model
    assert "decoder_norm" not in complete["model"]
    assert "composition" not in complete["train"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arm": "fixed/x"}, "encoder_norm must be one of batch"),
        ({"arm": 3}, "arm must be a key such as fixed/batch, .*, got 3"),
        ({}, "arm must be a key such as fixed/batch, .*, got None"),
        ({"model.name": "mcn"}, "model must be one of .*, got 'mcn'"),
        ({"model.hops": 3}, r"must be among model.name, .*, got 'model.hops'"),
        ({"model.hidden": "many"}, "model.hidden must be an integer, got 'many'"),
        ({"model.decoder_norm": "batch"}, "must be among model.name, .*, got 'model.decoder_norm'"),
        ({"train.composition": "separate"}, "settings of link.correct must be among .*, got 'train.composition'"),
        ({"train.epochs": 0}, "epochs must be at least 1, got 0"),
        ({"data.name": "Kora"}, "data must be one of .*, got 'Kora'"),
        ({"data.name": "none.npz"}, "data must be existing files, got 'none.npz'"),
    ],
)
def test_impossible_settings_are_refused_before_any_work(settings, message):
    with pytest.raises(ValueError, match=message):
        CORRECT.complete({"arm": "fixed/batch", **settings} if settings else {})


def test_the_page_of_an_audit_shows_its_verdict(graph, parts):
    report = audit_trained(EncoderDecoderSettings(hidden=16).build(16), graph, parts)
    html = audit_page(report, "suffice link audit").to_html()
    assert report.verdict.why in html.replace("&#39;", "'")
    assert len(plot_audit(report).axes[0].lines) == 2
    assert [coupling.name for coupling in report.couplings] == [
        layer.name for layer in report.layers if layer.mixes_edges
    ]
    assert "What couples the edges of a batch" in html


def test_embeddings_are_plotted_in_one_panel_per_name():
    x, y = torch.randn(60, 4), torch.arange(60) % 3
    figure = plot_embeddings({"fixed": (x, y), "random": (x, y)}, max_points=40)
    assert [axes.get_title() for axes in figure.axes] == ["fixed", "random"]
    assert all(len(axes.collections[0].get_offsets()) == 40 for axes in figure.axes)
