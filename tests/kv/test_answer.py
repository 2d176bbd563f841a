"""Answers from compressed caches: how they compare with the full cache, and whether they are complete."""

import json
import re
from dataclasses import replace
from html import unescape

import pytest
import torch
from markupsafe import escape
from transformers import DynamicCache
from typer.testing import CliRunner

from suffice.cli import app
from suffice.kv import CompressedCache, answer
from suffice.kv.eval.prompt import tokenize_prompt
from suffice.kv.eval.report_sections import answer_page
from suffice.kv.eval.tasks import make_example


@pytest.fixture(scope="module")
def document(loaded):
    return make_example("text", loaded[1], tokens=250, seed=4).document


def greedy_logits(model, ids, cache, tokens=None, steps=6):
    """Return tokens and logits before each of them: greedy ones, or those of given tokens, one at a time."""
    chosen, logits = [], []
    with torch.no_grad():
        for step in range(steps if tokens is None else len(tokens)):
            logits.append(model(ids, past_key_values=cache, use_cache=True).logits[0, -1])
            chosen.append(int(logits[-1].argmax()) if tokens is None else tokens[step])
            ids = torch.tensor([chosen[-1:]])
    return chosen, torch.stack(logits)


@pytest.mark.parametrize("size", [{"budget": 0.3}, {"memory": 0.4}, {"budget": 60, "interval": 2}])
def test_the_divergence_from_the_full_cache_is_that_of_its_answer_fed_token_by_token(loaded, document, size):
    model, reader = loaded
    ids = tokenize_prompt(reader, document, "Who?").input_ids
    tokens, reference = greedy_logits(model, ids, DynamicCache(config=model.config))
    evict = "prefill" if set(size) == {"budget"} else "always"
    _, other = greedy_logits(model, ids, CompressedCache(model, "h2o", **size, evict=evict), tokens)
    expected = torch.nn.functional.kl_div(
        other.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    found, _ = answer(model, reader, document, "Who?", policy="h2o", max_new_tokens=6, compare_full=True, **size)
    assert found.kl == pytest.approx(float(expected), rel=1e-3)
    assert found.kl > 0.001
    assert found.full_answer == reader.decode(tokens, skip_special_tokens=True).strip()
    # The comparison does not change the answer.
    alone, _ = answer(model, reader, document, "Who?", policy="h2o", max_new_tokens=6, **size)
    assert (alone.answer, alone.bytes_kept) == (found.answer, found.bytes_kept)
    assert (alone.full_answer, alone.kl, alone.differs, alone.comparison()) == (None, None, None, "")


def test_a_cache_that_keeps_everything_gives_the_full_caches_answer(loaded, document):
    model, reader = loaded
    options = {"policy": "h2o", "budget": 1.0, "max_new_tokens": 4, "compare_full": True}
    for aware in (True, False):
        found, _ = answer(model, reader, document, "Who?", aware=aware, **options)
        assert found.kl == pytest.approx(0, abs=1e-5)
        assert found.differs is False
        assert found.comparison().startswith("The full cache gives the same answer. KL from the full cache: 0.000 nats")
        assert "KL from the full cache: 0.000 nats" in replace(found, kl=-1e-5).comparison()  # not -0.000


def test_an_answer_is_complete_if_the_model_ended_it(loaded, document, monkeypatch):
    model, reader = loaded
    ids = tokenize_prompt(reader, document, None).input_ids
    tokens, _ = greedy_logits(model, ids, DynamicCache(config=model.config), steps=5)
    options = {"budget": 1.0, "max_new_tokens": 5, "compare_full": True}
    found, _ = answer(model, reader, document, **options)
    assert (found.is_complete, found.full_is_complete) == (False, False)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokens[2]])
    ended, _ = answer(model, reader, document, **options)
    assert (ended.is_complete, ended.full_is_complete) == (True, True)
    length = tokens.index(tokens[2]) + 1
    assert ended.answer == reader.decode(tokens[:length], skip_special_tokens=True).strip()


def test_eviction_before_a_question_needs_a_question(loaded, document):
    with pytest.raises(ValueError, match="aware must be True without a question, got False"):
        answer(*loaded, document, aware=False)


def test_the_full_cache_cannot_read_more_than_the_context_window(loaded, document):
    with pytest.raises(ValueError, match="prompt and answer must have at most 1024 tokens"):
        answer(*loaded, document * 8, budget=50, chunk_size=100, rerotate=True, compare_full=True)


def generate(folder, document, *options):
    arguments = ["--model", folder, "--prompt", document, "--question", "Who?", "--policy", "h2o", *options]
    done = CliRunner().invoke(app, ["kv", "generate", *arguments, "--max-new-tokens", "5"])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_generate_shows_both_answers_and_warns_if_they_differ(folder, loaded, document):
    options = {"policy": "h2o", "budget": 20, "max_new_tokens": 5, "compare_full": True}
    found, _ = answer(*loaded, document, "Who?", **options)
    assert found.differs
    shown = generate(folder, document, "--budget", "20", "--compare-full")
    assert shown.startswith(f"{found.answer}\nStopped at --max-new-tokens 5.\n")
    assert f"Full cache:\n{found.full_answer}\nStopped at --max-new-tokens 5.\n" in shown
    sentence = f"The full cache gives another answer. KL from the full cache: {found.kl:.3f} nats per token"
    assert f"Warning: {sentence}" in " ".join(shown.split())
    same = " ".join(generate(folder, document, "--budget", "1.0", "--compare-full").split())
    assert "The full cache gives the same answer. KL from the full cache: 0.000" in same
    assert "Warning" not in same


def test_generate_compares_with_the_full_cache_for_a_report(folder, document, tmp_path):
    page = str(tmp_path / "page.html")
    compared = {
        options: json.loads(generate(folder, document, "--json", *options))["differs"] is not None
        for options in ((), ("--report", page), ("--report", page, "--no-compare-full"))
    }
    assert list(compared.values()) == [False, True, False]


def test_the_page_shows_both_answers_and_where_they_stopped(loaded, document):
    options = {"policy": "h2o", "budget": 20, "max_new_tokens": 5}
    found, report = answer(*loaded, document, "Who?", compare_full=True, **options)
    html = answer_page(found, report, "suffice kv generate").to_html()
    sections = {title: html.index(f"<h2>{title}</h2>") for title in ("Answer", "Answer of the full cache")}
    places = [sections["Answer"], html.index(str(escape(found.comparison()))), sections["Answer of the full cache"]]
    assert places == sorted(places)
    assert '<div class="result warning">' in html
    assert f"<p>{escape(found.answer)}</p>" in html
    assert f"<p>{escape(found.full_answer)}</p>" in html
    assert html.count("<p>The answer stopped at the maximum number of new tokens.</p>") == 2
    alone, report = answer(*loaded, document, "Who?", **options)
    assert "full cache gives" not in answer_page(alone, report, "suffice kv generate").to_html()


def test_the_page_shows_the_whole_prompt_and_marks_the_question(loaded, document):
    model, reader = loaded
    found, report = answer(model, reader, document, "Who is it?", policy="h2o", budget=20, max_new_tokens=2)
    html = answer_page(found, report, "suffice kv generate").to_html()
    kept = html.split('<div class="kept">')[1].split("</section>")[0]
    document_html, question_html = kept.split('<div class="marked" id="marked"><b>question:</b>')
    question = unescape(re.sub("<[^>]*>", "", question_html.split("</div>")[0]))
    assert unescape(re.sub("<[^>]*>", "", document_html)) == document
    assert question.split() == ["Question:", "Who", "is", "it?", "Answer:"]
    assert 'href="#marked"' in html
    assert "max-height: 30rem" not in html  # a box of its own would hide the end of the prompt on paper
    plain, report = answer(model, reader, document, policy="h2o", budget=20, max_new_tokens=2)
    assert plain.question_start is None
    assert 'id="marked"' not in answer_page(plain, report, "suffice kv generate").to_html()
