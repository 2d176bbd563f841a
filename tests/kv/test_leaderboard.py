"""The runner of benchmarks/leaderboard.py: data, prompts, scores, results, and what is read before an eviction."""

import argparse
import contextlib
import copy
import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from suffice.kv import CacheConfig, CompressedCache
from tests.benchmark_program import FOLDER, import_programs
from tests.kv.tiny import tokenizer

NAMES = ("leaderboard_data", "leaderboard_results", "leaderboard_answers", "leaderboard")
TASKS = ("cwe", "fwe", "niah_multikey", "niah_multiquery", "niah_multivalue", "niah_single", "qa", "vt")
TOKENS = 1200


@pytest.fixture(scope="module")
def board():
    """The modules of the benchmark."""
    with import_programs(*NAMES) as modules:
        yield argparse.Namespace(**dict(zip(("data", "results", "answers", "main"), modules, strict=True)))


def row(context="The mill is blue. The inn is red.", question="Which is blue?", **changes):
    values = {
        "context": context,
        "question": question,
        "answer_prefix": "It is",
        "answer": ["mill"],
        "max_new_tokens": 4,
        "task": "niah_single",
    }
    return {**values, **changes}


def write_rows(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return str(folder)


@pytest.fixture
def data(tmp_path):
    """Three contexts; the first one has two questions."""
    texts = ["The mill is blue, the inn is red. " * 8, "A farm lies by the sea. " * 9, "Old towers fall. " * 12]
    # The model is random: single letters are found in some answers.
    rows = [row(text, "What is in it?", task=task, answer=["e", "x"]) for text, task in zip(texts, TASKS, strict=False)]
    more = row(texts[0], "Which one is red?", task="qa_1", answer=["a", "i"], max_new_tokens=9)
    return write_rows(tmp_path / "small", [*rows, more])


def options(board, folder, data, output, *more):
    arguments = ["--model", folder, "--data", data, "--output", str(output), "--device", "cpu", *more]
    return board.main.parse_options(arguments)[1]


SMALL = ("--policies", "snapkv", "kvzip", "--ratios", ".5", ".75")


def results_of(output):
    """Return the predictions of each cache: folder, sample, text."""
    found = {}
    for file in sorted(output.glob("*/predictions.csv")):
        with file.open(encoding="utf-8", newline="") as lines:
            found[file.parent.name] = {
                line["sample"]: (line["predicted_answer"], line["bytes"], line["score"])
                for line in csv.DictReader(lines)
            }
    return found


# ---- Data ------------------------------------------------------------------------------------------------------------


def test_made_data_is_reproducible_and_has_the_answers_in_the_context(board, tmp_path):
    make = board.data.make_data
    files = [
        make(tmp_path / name, tokenizer(), tokens=TOKENS, samples=2, seed=seed)
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    ]
    first, again, other = (file.read_text(encoding="utf-8") for file in files)
    assert first == again != other
    samples = board.data.read_samples(str(tmp_path / "first"), "")
    assert {sample.task for sample in samples} == set(TASKS)
    assert len(samples) == 2 * len(TASKS)
    lines = [json.loads(line) for line in first.splitlines()]
    for sample, line in zip(samples, lines, strict=True):
        assert tuple(line) == board.data.COLUMNS
        assert all(string in sample.context for string in sample.answer)
        assert sample.question not in sample.context
        assert sample.answer_prefix not in sample.context
        assert sample.score(f"{sample.answer_prefix} {' and '.join(sample.answer)}") == 1
        assert sample.score(sample.answer_prefix) == 0
        length = len(tokenizer()(sample.context + sample.question).input_ids)
        assert 0.8 * TOKENS < length <= TOKENS
    # The second samples of seed 1 are the first ones of seed 2.
    others = board.data.read_samples(str(tmp_path / "other"), "")
    assert [sample.context for sample in samples[1::2]] == [sample.context for sample in others[::2]]


def test_all_formats_give_the_same_samples(board, tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    rows = [row(answer=['a "b"', "c,d"]), row('Line 1\nline "2"', question="", answer=["ü"], task="qa_2")]
    table = pandas.DataFrame(rows)
    (tmp_path / "parquet").mkdir()
    table.to_parquet(tmp_path / "parquet" / "test-00000-of-00001.parquet")
    (tmp_path / "csv").mkdir()
    table.assign(answer=[json.dumps(each["answer"]) for each in rows]).to_csv(tmp_path / "csv" / "t.csv", index=False)
    write_rows(tmp_path / "jsonl", rows)
    read = [board.data.read_samples(str(tmp_path / name), "") for name in ("parquet", "jsonl")]
    assert read[0] == read[1]
    assert read[0][0].answer == ('a "b"', "c,d")
    assert [sample.index for sample in read[0]] == [0, 1]
    assert board.data.read_samples(str(tmp_path / "csv"), "") == read[0]


def test_samples_of_each_task(board, tmp_path):
    tasks = ["a", "b", "a", "a", "b"]
    samples = board.data.read_samples(write_rows(tmp_path, [row(task=task) for task in tasks]), "")
    assert [sample.index for sample in board.data.first_of_each_task(samples, 2)] == [0, 1, 2, 4]
    assert board.data.first_of_each_task(samples, None) == samples


# ---- Scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("vt", "ab and CD", 2 / 3),
        ("vt", "", 0),
        ("niah_single_1", "AB cd Ef", 1),
        ("qa_1", "It is cd.", 1),
        ("qa", "no", 0),
        ("qanat_1", "ab", 1 / 3),
        ("vt", "a\nb", 1 / 3),  # control characters are removed, also between letters
    ],
)
def test_score(board, task, text, expected):
    sample = board.data.Sample(0, "text", "?", "", ("ab", "cd", "ef"), 5, task)
    assert sample.score(text) == pytest.approx(expected)


def test_task_scores_are_percentages_with_two_decimals(board):
    rows = [{"task": task, "score": score} for task, score in (("vt", "0"), ("vt", "1"), ("vt", "0"), ("qa_1", "1"))]
    assert board.results.task_scores(rows) == {"qa_1": 100.0, "vt": 33.33}


# ---- Prompts ---------------------------------------------------------------------------------------------------------


def test_prompt_without_template(board, tmp_path):
    tok = tokenizer()
    samples = board.data.read_samples(write_rows(tmp_path, [row()]), "")
    (context,) = board.answers.tokenize_contexts(tok, samples)
    assert tok.decode(context.ids[0]) == "The mill is blue. The inn is red."
    assert tok.decode(context.questions[0][0]) == "Which is blue?\nIt is"


def test_prompt_with_template(board, tmp_path):
    tok = tokenizer(chat=True)
    # The marker of the question is in this context, and white space at its end is kept.
    samples = board.data.read_samples(write_rows(tmp_path, [row("About [[question]].\n")]), "")
    (context,) = board.answers.tokenize_contexts(tok, samples)
    assert tok.decode(context.ids[0]) == "[user] About [[question]].\n"
    assert tok.decode(context.questions[0][0]) == "Which is blue?<end>[assistant] It is"


def test_template_that_can_think_and_one_that_changes_the_message(board, tmp_path):
    tok = copy.deepcopy(tokenizer(chat=True))
    samples = board.data.read_samples(write_rows(tmp_path, [row()]), "")
    tok.chat_template += "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    (context,) = board.answers.tokenize_contexts(tok, samples)
    assert tok.decode(context.questions[0][0]) == "Which is blue?<end>[assistant] <think></think>It is"
    tok.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="chat template of --model must contain a message once, got one with 0"):
        board.answers.tokenize_contexts(tok, samples)


def test_first_token_does_not_end_an_answer(board, loaded, monkeypatch):
    model, tok = loaded
    cache = CompressedCache(model, "full", 1.0)
    ids = tok("The mill is blue.", return_tensors="pt").input_ids
    board.answers.prefill(model, {"input_ids": ids}, [cache])
    question = tok(" Which?", return_tensors="pt").input_ids
    free = board.answers.generate_from_each(model, [cache], question, 6)[0]
    assert len(free) == 6
    assert cache.get_seq_length() == ids.shape[1]
    # The same tokens without a cache.
    text = torch.cat((ids, question), dim=1)
    for token in free:
        assert int(model(text).logits[0, -1].argmax()) == token
        text = torch.cat((text, torch.tensor([[token]])), dim=1)
    for end in dict.fromkeys(free):
        monkeypatch.setattr(model.generation_config, "eos_token_id", [end])
        later = free.index(end, 1) if end in free[1:] else 5
        assert board.answers.generate_from_each(model, [cache], question, 6)[0] == free[: later + 1]


# ---- Eviction before the question ------------------------------------------------------------------------------------


def kept(caches):
    return [
        [sorted(head.tolist()) for layer in cache.compressed_layers for head in cache.kept_positions(layer.index)[0]]
        for cache in caches
    ]


def test_question_is_not_seen_before_the_eviction(board, loaded, tmp_path):
    model, tok = loaded
    text = board.data.read_samples(str(make_small(board, tmp_path)), "")[0].context
    configs = [CacheConfig(name, 0.25) for name in ("snapkv", "capkv-profile", "kvzip")]
    read = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: read.append((args, kwargs)), with_kwargs=True)
    found = []
    for question in ("Where is the red tower?", "How many lamps hang in the hall?"):
        samples = board.data.read_samples(write_rows(tmp_path / question[:3], [row(text, question)]), "")
        (context,) = board.answers.tokenize_contexts(tok, samples)
        found.append(kept(board.answers.fill_caches(model, tok, context, configs)))
    hook.remove()
    assert found[0] == found[1]
    assert len(read) >= 4  # prefill and replay, for both questions
    for args, kwargs in read:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        assert not re.search("Where is|lamps", tok.decode(ids[0]))
    # With the question, other entries are kept, so the test could fail.
    aware = torch.cat((context.ids, context.questions[0]), dim=1)
    caches = [config.build(model) for config in configs]
    board.answers.prefill(model, {"input_ids": aware}, caches, tokenizer=tok)
    assert all(mine != other for mine, other in zip(kept(caches), found[0], strict=True))


def make_small(board, tmp_path):
    example = board.data.make_example("single", tokenizer(), tokens=300, seed=0)
    return write_rows(tmp_path / "one", [row(example.document)])


def test_questions_of_a_context_do_not_affect_each_other(board, folder, data, tmp_path):
    board.main.main(arguments_of(folder, data, tmp_path / "all"))
    rows = [json.loads(line) for line in (Path(data) / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    alone = write_rows(tmp_path / "alone" / "small", [rows[3]])
    board.main.main(arguments_of(folder, alone, tmp_path / "apart"))
    together, apart = results_of(tmp_path / "all"), results_of(tmp_path / "apart")
    assert list(together) == list(apart)
    for name, predictions in together.items():
        assert predictions["3"] == apart[name]["0"]


# ---- Results ---------------------------------------------------------------------------------------------------------


def arguments_of(folder, data, output, *more):
    return ["--model", folder, "--data", data, "--output", str(output), "--device", "cpu", *SMALL, *more]


def test_layout(board, folder, data, tmp_path):
    output = tmp_path / "out"
    board.main.main(arguments_of(folder, data, output, "--memory", ".5", "--bits", "5,4"))
    model = folder.replace("/", "--")
    names = ["no_press__0.00"]
    for policy in ("kvzip", "snapkv"):
        names += [f"{policy}-bits5-4__0.50", f"{policy}-bits5-4__0.75", f"{policy}-bits5-4-memory__0.50"]
    places = {name: output / f"ruler__small__{model}__{name}" for name in names}
    assert {path for path in output.iterdir() if path.is_dir()} == set(places.values())
    scores = set()
    for name, place in places.items():
        assert {path.name for path in place.iterdir()} == {"config.yaml", "metrics.json", "predictions.csv"}
        config = yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8"))
        assert f"{config['press_name']}__{config['compression_ratio']:.2f}" == name
        assert (config["dataset"], config["data_dir"], config["model"]) == ("ruler", "small", folder)
        assert config["query_aware"] is False
        metrics = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
        assert set(metrics) == {"cwe", "fwe", "niah_multikey", "qa_1"}
        with (place / "predictions.csv").open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        assert sorted(each["sample"] for each in rows) == ["0", "1", "2", "3"]
        for each in rows:
            found = [letter in each["predicted_answer"].lower() for letter in json.loads(each["answer"])]
            score = 100 * (any(found) if each["task"] == "qa_1" else sum(found) / 2)
            assert metrics[each["task"]] == {"string_match": score}
            scores.add(score)
    assert len(scores) > 1
    with (output / "leaderboard.csv").open(encoding="utf-8", newline="") as lines:
        board_rows = list(csv.DictReader(lines))
    assert [f"{each['policy']}__{float(each['compression_ratio']):.2f}" for each in board_rows] == [
        "no_press__0.00",
        *(f"{policy}-bits5-4{kind}__0.50" for policy in ("kvzip", "snapkv") for kind in ("", "-memory")),
        *(f"{policy}-bits5-4__0.75" for policy in ("kvzip", "snapkv")),
    ]
    for each in board_rows:
        tasks = [float(each[task]) for task in ("cwe", "fwe", "niah_multikey", "qa_1")]
        assert float(each["score"]) == pytest.approx(sum(tasks) / 4, abs=0.01)
        assert each["samples"] == "4"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_relative_to_16_bits(board, loaded, tmp_path, dtype):
    model, tok = loaded
    samples = board.data.read_samples(str(make_small(board, tmp_path)), "")
    (context,) = board.answers.tokenize_contexts(tok, samples)
    configs = [CacheConfig("full", 1.0), CacheConfig("snapkv", 0.25), CacheConfig("snapkv", 0.25, bits=4)]
    configs.append(CacheConfig("snapkv", 0.25, repair=True))
    try:
        caches = board.answers.fill_caches(model.to(dtype), tok, context, configs)
    finally:
        model.to(torch.float32)
    full, evicted, quantized, repaired = (board.answers.relative_bytes(cache) for cache in caches)
    # Positions take 4 bytes of each entry, whose key and value take 2 · 2 · head_dim bytes.
    index = 4 / (4 * model.config.hidden_size // model.config.num_attention_heads)
    assert full == pytest.approx(1 + index, abs=0.02)
    assert evicted == pytest.approx(full / 4, abs=0.02)
    assert quantized < evicted < repaired < full / 2


class Killed(BaseException):
    """Stands for a signal that ends the process."""


def test_a_run_that_was_killed_continues(board, folder, data, tmp_path, monkeypatch):
    board.main.main(arguments_of(folder, data, tmp_path / "whole"))
    expected = results_of(tmp_path / "whole")
    output = tmp_path / "killed"
    given = options(board, folder, data, output, *SMALL)

    def stop(number):
        if number == 2:
            raise Killed

    with contextlib.ExitStack() as stack, pytest.raises(Killed):
        board.main.answer_all(board.main.prepare(given, stack), stop)
    done = results_of(output)
    assert all(set(rows) == {"0", "1", "3"} for rows in done.values())
    # One folder also lost the end of its last row, and another one its last context.
    places = sorted(output.glob("*/predictions.csv"))
    places[0].write_bytes(places[0].read_bytes()[:-5])
    lines = places[1].read_bytes()
    read = []
    fill = board.main.fill_caches
    monkeypatch.setattr(board.main, "fill_caches", lambda *args: read.append(len(args[3])) or fill(*args))
    places[1].write_bytes(lines[: lines.rindex(b"\n1,")] + b"\n")
    board.main.main(arguments_of(folder, data, output))
    assert results_of(output) == expected
    assert read == [2, 5]  # the second context for two caches, the third one for all
    assert len(list(output.glob("*/metrics.json"))) == 5
    board.main.main(arguments_of(folder, data, output))
    assert read == [2, 5]


def test_complete_rows_at_every_byte(board):
    rows = [b"a,b\n", b'1,"x\ny"\n', b'2,"say ""hi""\n"\n', b"3,z\n", '4,"ü\r\n,"\n'.encode()]
    content = b"".join(rows)
    ends = [len(b"".join(rows[:count])) for count in range(len(rows) + 1)]
    for cut in range(len(content) + 1):
        found = board.results.complete_rows(content[:cut])
        # A quotation mark that is cut from a doubled pair cannot end a row, because no line break follows it.
        assert found == content[: max(end for end in ends if end <= cut)]


def test_later_policies_join_the_same_table(board, folder, data, tmp_path):
    output = tmp_path / "out"
    board.main.main(["--model", folder, "--data", data, "--output", str(output), "--policies", "knorm"])
    board.main.main(
        ["--model", folder, "--data", data, "--output", str(output), "--policies", "tova", "--ratios", ".5"]
    )
    rows = (output / "leaderboard.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + 1 + 4 + 1
    assert len(list(output.glob("*/metrics.json"))) == 6


def test_repaired_caches_have_their_own_name(board, folder, data, tmp_path):
    output = tmp_path / "out"
    board.main.main(arguments_of(folder, data, output, "--repair", "--policies", "capkv-profile", "--bits", "8"))
    names = {path.name.split("__", 3)[3] for path in output.iterdir() if path.is_dir()}
    assert names == {"no_press__0.00", *(f"capkv-profile-repair-bits8__{ratio}" for ratio in ("0.50", "0.75"))}


def test_some_samples_have_their_own_folder(board, folder, tmp_path):
    data = write_rows(tmp_path / "made", [row(f"Text {number}. " * 20) for number in range(4)])
    output = tmp_path / "out"
    board.main.main(arguments_of(folder, data, output, "--samples", "1"))
    assert all(path.name.endswith("__fraction0.250") for path in output.iterdir() if path.is_dir())
    assert all(list(rows) == ["0"] for rows in results_of(output).values())


# ---- Errors ----------------------------------------------------------------------------------------------------------


def refused(board, capsys, monkeypatch, arguments, message):
    """Check that a command is refused with a message, before a model is loaded."""
    monkeypatch.setattr(board.main, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit) as caught:
        board.main.main([str(each) for each in arguments])
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--policies", "snapvk"], "--policies: policy must be one of .*'snapvk'. Did you mean 'snapkv'"),
        (["--policies", "full"], "--policies must be policies that evict, got 'full'"),
        (["--policies", "snapkv", "snapkv"], "must give different caches, got .*snapkv__0.25.* twice"),
        (["--ratios", "1"], "--ratios must be between 0 and 1, .* got 1"),
        (["--ratios", "0.001", "0.002"], "must give different caches"),
        (["--memory", "1.5"], "--memory must be fractions of the full cache, .* got 1.5"),
        (["--bits", "7"], "--bits must be none, 2, 3, 4, 5 or 8, .* got '7'"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--data", "no/such/folder"], "--data must be a folder .*got 'no/such/folder'"),
        (["--make-data", "x"], "--data or --make-data must be given"),
    ],
)
def test_options_that_are_refused(board, data, tmp_path, capsys, monkeypatch, more, message):
    refused(board, capsys, monkeypatch, ["--data", data, "--output", tmp_path / "out", *more], message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "--data must have the columns .* without answer .row 1 of "),
        ({"answer": []}, "answer must be a list of texts .* got .. "),
        ({"answer": [1]}, "answer must be a list of texts"),
        ({"answer": "['a']"}, "answer must be a list of texts .in a CSV file as JSON"),
        ({"context": " "}, "context must be a text, got ' ' "),
        ({"question": 3}, "question must be a text, got 3 "),
        ({"max_new_tokens": 0}, "max_new_tokens must be a number of at least 1, got 0 "),
        ({"max_new_tokens": "many"}, "max_new_tokens must be a number of at least 1, got 'many' "),
    ],
)
def test_rows_that_are_refused(board, tmp_path, capsys, monkeypatch, change, message):
    data = write_rows(tmp_path / "data", [row(**change)])
    refused(board, capsys, monkeypatch, ["--data", data, "--output", tmp_path / "out"], message)


def test_folders_that_are_refused(board, data, tmp_path, capsys, monkeypatch):
    (tmp_path / "outer").mkdir()
    shutil.copytree(data, tmp_path / "outer" / "4096")
    refused(board, capsys, monkeypatch, ["--data", tmp_path / "outer"], "which has none. Did you mean '.*4096'")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "test.jsonl").write_text("{", encoding="utf-8")
    refused(board, capsys, monkeypatch, ["--data", tmp_path / "bad"], "files that can be read, got '.*bad.test.jsonl'")
    (tmp_path / "bad" / "test.jsonl").write_text("\n", encoding="utf-8")
    refused(board, capsys, monkeypatch, ["--data", tmp_path / "bad"], "--data must have at least one row")
    refused(board, capsys, monkeypatch, ["--data", data, "--output", Path(data) / "test.jsonl"], "which is a file")
    refused(board, capsys, monkeypatch, ["--make-data", data, "--model", "x"], "must be a folder|couldn't|model id")


def test_made_data_does_not_mix_with_other_data(board, data):
    with pytest.raises(ValueError, match="--make-data must be a new folder, or one without data, got "):
        board.data.make_data(Path(data), tokenizer(), tokens=TOKENS, samples=1, seed=0)


def test_hub_data_needs_its_package(board, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(board.data.importlib.util, "find_spec", lambda _: None)
    message = "as long as the package datasets is missing, got 'simonjegou/ruler'.*pip install datasets"
    refused(board, capsys, monkeypatch, ["--data", "simonjegou/ruler", "--output", tmp_path], message)


def test_results_of_other_settings_are_not_mixed(board, folder, data, tmp_path, capsys, monkeypatch):
    board.main.main(arguments_of(folder, data, tmp_path / "out"))
    before = results_of(tmp_path / "out")
    other = arguments_of(folder, data, tmp_path / "out", "--dtype", "float32")
    refused(board, capsys, monkeypatch, other, "results of other settings, got .* whose suffice in config.yaml")
    write_rows(Path(data), [row(f"Text {number}. " * 9) for number in range(4)])
    refused(board, capsys, monkeypatch, arguments_of(folder, data, tmp_path / "out"), "results of other settings")
    assert results_of(tmp_path / "out") == before


def test_two_runs_do_not_write_into_one_folder(board, folder, data, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    with board.main.FileLock(tmp_path / "out" / ".lock"):
        refused(board, capsys, monkeypatch, arguments_of(folder, data, tmp_path / "out"), "must not be in use")


@pytest.mark.parametrize(("policy", "room"), [("snapkv", 10), ("kvzip", 40)])
def test_contexts_that_do_not_fit_are_refused_before_anything_is_measured(
    board, folder, tmp_path, capsys, policy, room
):
    text = tokenizer().decode(tokenizer()("The mill is blue. " * 500).input_ids[: 1024 - room])
    data = write_rows(tmp_path / "long", [row(max_new_tokens=2), row(text, max_new_tokens=2)])
    with pytest.raises(SystemExit):
        board.main.main(arguments_of(folder, data, tmp_path / "out", "--policies", policy))
    error = capsys.readouterr().err
    assert ("for a policy with a replay" if policy == "kvzip" else "prompt and answer must have at most") in error
    assert not results_of(tmp_path / "out")


def test_command(folder, data, tmp_path):
    command = [sys.executable, str(FOLDER / "leaderboard.py"), *arguments_of(folder, data, tmp_path / "out")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "3 of 3 contexts" in found.stdout
    assert "| no_press | 0.0 | 4 |" in found.stdout
