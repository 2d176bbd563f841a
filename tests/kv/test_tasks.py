"""Examples of all tasks: right answers, distractors, scores, lengths, and rejected arguments."""

import itertools
import re
import statistics
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from suffice.kv.eval.tasks import (
    TASKS,
    Passage,
    made_up_biographies,
    make_example,
    needles,
    planted_facts,
    python_manual,
    qa,
)
from suffice.kv.eval.tasks.haystack import distinct_words
from tests.kv.tiny import tokenizer

WITH_QUESTION = [task for task in TASKS if task != "text"]
LENGTH = {"variables": 1200, "common-words": 1200}
CASES = [(task, chat, seed) for task in WITH_QUESTION for chat in (False, True) for seed in (0, 1)]


def sample(task, chat=False, seed=0, **options):
    return make_example(task, tokenizer(chat), tokens=LENGTH.get(task, 900), seed=seed, **options)


@pytest.mark.parametrize(("task", "chat", "seed"), CASES)
def test_references_are_in_the_document_and_no_distractor_contains_one(task, chat, seed):
    example = sample(task, chat, seed)
    read = tokenizer(chat).decode(example.prompt(tokenizer(chat)).document[0])
    assert example.document in read
    assert example.references
    for reference in example.references:
        assert reference in read
        assert not any(reference.lower() in wrong.lower() for wrong in example.distractors)
    assert all(wrong in read for wrong in example.distractors)
    assert len(set(example.references)) == len(example.references)
    assert len(set(example.distractors)) == len(example.distractors)
    # The part that is read before eviction reveals neither the question nor the answer prefix.
    assert example.question not in read
    assert example.answer_prefix not in read


@pytest.mark.parametrize(("task", "chat", "seed"), CASES)
def test_score_is_the_share_of_references_in_the_answer(task, chat, seed):
    example = sample(task, chat, seed)
    assert example.score(example.answer_prefix + example.answer) == 1
    assert example.score(example.answer.upper()) == 1
    assert example.score(example.answer_prefix) == 0
    assert example.score(", ".join(example.distractors)) == 0
    some = example.references[: len(example.references) // 2]
    assert example.score(" ".join(some)) == len(some) / len(example.references)


@pytest.mark.parametrize(("task", "chat"), list(itertools.product(TASKS, (False, True))))
def test_prompt_fills_the_requested_length(task, chat):
    for tokens in (1200, 2500):
        example = make_example(task, tokenizer(chat), tokens=tokens, seed=4)
        length = example.prompt(tokenizer(chat)).input_ids.shape[1]
        assert 0.9 * tokens < length <= tokens
        assert tokenizer(chat).decode(example.answer_ids(tokenizer(chat))[0]) == example.answer


@pytest.mark.parametrize("task", TASKS)
def test_examples_are_reproducible_from_the_seed(task):
    assert sample(task, seed=5) == sample(task, seed=5)
    assert sample(task, seed=5).document != sample(task, seed=6).document


@pytest.mark.parametrize("task", ["multikey", "multivalue", "qa"])
def test_chance_is_the_mean_score_of_all_random_choices(task):
    example = sample(task)
    candidates = (*example.references, *example.distractors)
    picks = itertools.combinations(candidates, len(example.references))
    assert statistics.mean(example.score(" ".join(pick)) for pick in picks) == pytest.approx(example.chance)


@pytest.mark.parametrize("task", ["single", "multikey", "multivalue", "multiquery"])
def test_references_are_the_values_of_the_keys_in_the_question(task):
    example = sample(task, seed=2)
    found = re.findall(r"One access code of (the \w+ \w+) is (\d{6})\.", example.document)
    asked = [value for key, value in found if key in example.question]
    assert sorted(asked) == sorted(example.references)
    assert sorted(value for key, value in found if key not in example.question) == sorted(example.distractors)
    # The answer lists the values by key, in the order of the question.
    keys = re.findall(r"the \w+ \w+", example.question.split(" of ", 1)[1])
    assert list(example.references) == [value for key in keys for own, value in found if own == key]


@pytest.mark.parametrize("seed", range(3))
def test_references_are_the_variables_that_resolve_to_the_number(seed):
    example = sample("variables", seed=seed)
    held = {}
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", example.document):
        held[name] = held.get(value, value)  # the statements of a chain are in order
    number = re.search(r"value (\d+)", example.question).group(1)
    assert {name for name, value in held.items() if value == number} == set(example.references)
    assert set(held) == set(example.references) | set(example.distractors)
    assert all(value.isdigit() for value in held.values())


@pytest.mark.parametrize(
    ("task", "pattern", "asked"), [("common-words", r"\d+\. (\w+)", 10), ("frequent-words", r"\w+", 3)]
)
def test_references_are_the_most_frequent_words(task, pattern, asked):
    example = sample(task, seed=1)
    counts = Counter(re.findall(pattern, example.document))
    ranked = counts.most_common()
    assert {word for word, _ in ranked[:asked]} == set(example.references)
    assert ranked[asked - 1][1] > ranked[asked][1]
    assert {word for word, _ in ranked[asked:]} == set(example.distractors)


def test_frequency_is_a_power_of_the_rank():
    example = make_example("frequent-words", tokenizer(), tokens=4000, alpha=1.5)
    counts = [number for _, number in Counter(example.document.split()).most_common()]
    expected = [counts[0] * rank**-1.5 for rank in range(1, len(counts) + 1)]
    assert all(abs(number - mean) <= 1 for number, mean in zip(counts, expected, strict=True))


def test_exactly_one_document_answers_the_question():
    example = sample("qa", seed=3)
    person = re.search(r"workshop of ([\w. ]+)\?", example.question).group(1)
    passages = re.split(r"Document \d+:\n", example.document)[1:]
    assert [example.references[0] in passage for passage in passages].count(True) == 1
    assert sum(person in passage and example.references[0] in passage for passage in passages) == 1


def test_given_passages_with_the_answer_are_left_out_except_the_target():
    documents = [
        Passage("The capital of France is Paris.", "What is the capital of France?", ("Paris", "capital of France")),
        *(Passage(f"Village {number} is not far from Paris.") for number in range(20)),
        *(Passage(f"Village {number} lies in the hills, where few people come by.") for number in range(20)),
    ]
    example = qa(tokenizer(), tokens=500, passages=documents)
    assert example.document.count("Paris") == 1
    assert example.document.count("hills") > 3
    assert example.score("Why, paris!") == 1
    with pytest.raises(ValueError, match="passages must have at least one question"):
        qa(tokenizer(), tokens=500, passages=documents[1:])
    with pytest.raises(ValueError, match=r"answers must be parts of the passage .*, got 'London'"):
        Passage("Paris.", "Where?", ("London",))


def test_continuation_is_the_next_words_of_the_haystack():
    for seed in range(5):
        example = make_example("text", tokenizer(), tokens=300, seed=seed, max_new_tokens=20)
        assert example.modes == ("continuation",)
        assert example.document + example.answer in f"{python_manual()}\n\n{python_manual()}"
        assert 14 <= example.answer_ids(tokenizer()).shape[1] <= 20
        assert example.score("anything") is example.chance is None


@given(
    text=st.text(min_size=1).filter(str.strip), seed=st.integers(0, 2**32), kind=st.sampled_from(["numbers", "uuids"])
)
@settings(max_examples=25)
def test_any_text_can_be_the_haystack(text, seed, kind):
    example = needles(tokenizer(), tokens=400, seed=seed, haystack=text, num_keys=2, value_type=kind)
    assert example.prompt(tokenizer()).input_ids.shape[1] <= 400
    assert all(example.document.count(value) == 1 for value in (*example.references, *example.distractors))


def test_depth_is_the_position_of_the_needle():
    for depth in (0.0, 0.5, 1.0):
        example = needles(tokenizer(), tokens=1500, depth=depth)
        before = example.document.index(example.references[0]) / len(example.document)
        assert before == pytest.approx(depth, abs=0.06)


def test_values_can_be_words_or_uuids():
    assert re.fullmatch(r"[a-z]+-[a-z]+", needles(tokenizer(), tokens=400, value_type="words").references[0])
    assert re.fullmatch(r"[0-9a-f-]{36}", needles(tokenizer(), tokens=400, value_type="uuids").references[0])


def test_no_distinct_word_is_a_substring_of_another():
    words = distinct_words(python_manual()[:60_000])
    assert len(words) > 300
    assert not any(short != long and short in long for short in words for long in words)


def test_biographies_are_of_different_people():
    assert len({passage.question for passage in made_up_biographies(7800)}) == 7800
    assert made_up_biographies(5, seed=1) == made_up_biographies(5, seed=1)
    assert made_up_biographies(5, seed=1) != made_up_biographies(5, seed=2)


@pytest.mark.parametrize("chat", [False, True])
def test_planted_facts_are_questions_about_one_document(chat):
    examples = planted_facts(tokenizer(chat), tokens=900, seed=2, num_facts=3)
    assert len({example.document for example in examples}) == 1
    assert len({example.question for example in examples}) == 3
    for example in examples:
        (code,) = example.references
        assert example.document.count(code) == 1
        assert example.document.count(example.answer) == 1
        assert code in example.answer
        prompt = tokenizer(chat).decode(example.prompt(tokenizer(chat)).input_ids[0])
        assert prompt.endswith("[assistant] " if chat else "\nAnswer:")
    with pytest.raises(ValueError, match="num_facts must be from 1 to 8, got 9"):
        planted_facts(tokenizer(), tokens=900, num_facts=9)


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("multkey", {}, "got 'multkey'. Did you mean 'multikey'?"),
        ("single", {"tokens": 30}, "for this task and these options, got 30"),
        ("single", {"haystack": " \n"}, "haystack must contain text"),
        ("single", {"value_type": "names"}, "value_type must be one of numbers, words, uuids, got 'names'"),
        (
            "single",
            {"value_type": "words", "haystack": "few words"},
            "at least 8 distinct words to draw from, got 1",
        ),
        ("single", {"depth": 1.5}, "depth must be from 0 to 1, got 1.5"),
        ("single", {"num_values": 0}, "num_values must be at least 1, got 0"),
        ("multiquery", {"num_queries": 9}, "num_queries must be at most the number of keys, 4, got 9"),
        ("single", {"num_keys": 1000}, "num_keys must be from 1 to 756, got 1000"),
        ("variables", {"num_hops": 0}, "num_hops must be at least 1, got 0"),
        ("common-words", {"frequency": 1}, "frequency must be at least 2, got 1"),
        ("common-words", {"num_common": 0}, "num_common must be at least 1, got 0"),
        (
            "common-words",
            {"haystack": "two words"},
            "more than 10 distinct words to draw from, got 1",
        ),
        ("frequent-words", {"alpha": 0}, "alpha must be above 0, got 0"),
        ("frequent-words", {"num_queries": 0}, "num_queries must be at least 1, got 0"),
        ("text", {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ("text", {"tokens": 1}, "tokens must be at least 2, got 1"),
    ],
)
def test_invalid_arguments_are_rejected(task, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make_example(task, tokenizer(), **{"tokens": 600, **options})
