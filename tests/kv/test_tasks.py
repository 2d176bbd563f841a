import itertools
import re
import statistics
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from suffice.kv.eval.tasks import TASKS, Passage, lives, make, manual, needles, qa
from suffice.kv.eval.tasks.haystack import vocabulary
from tests.kv.tiny import tokenizer

ASKING = [task for task in TASKS if task != "text"]
LENGTH = {"variables": 1200, "common-words": 1200}
CASES = [(task, chat, seed) for task in ASKING for chat in (False, True) for seed in (0, 1)]


def sample(task, chat=False, seed=0, **options):
    return make(task, tokenizer(chat), tokens=LENGTH.get(task, 900), seed=seed, **options)


@pytest.mark.parametrize(("task", "chat", "seed"), CASES)
def test_gold_is_in_the_prompt_and_distractors_are_not_gold(task, chat, seed):
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
    # What is read before eviction gives away neither question nor answer.
    assert example.question not in read
    assert example.opening not in read


@pytest.mark.parametrize(("task", "chat", "seed"), CASES)
def test_score_is_that_of_the_references_found(task, chat, seed):
    example = sample(task, chat, seed)
    assert example.score(example.opening + example.answer) == 1
    assert example.score(example.answer.upper()) == 1
    assert example.score(example.opening) == 0
    assert example.score(", ".join(example.distractors)) == 0
    some = example.references[: len(example.references) // 2]
    assert example.score(" ".join(some)) == len(some) / len(example.references)


@pytest.mark.parametrize(("task", "chat"), list(itertools.product(TASKS, (False, True))))
def test_prompt_has_the_length_asked_for(task, chat):
    for tokens in (1200, 2500):
        example = make(task, tokenizer(chat), tokens=tokens, seed=4)
        length = example.prompt(tokenizer(chat)).ids.shape[1]
        assert 0.9 * tokens < length <= tokens
        assert tokenizer(chat).decode(example.gold(tokenizer(chat))[0]) == example.answer


@pytest.mark.parametrize("task", TASKS)
def test_seed_decides(task):
    assert sample(task, seed=5) == sample(task, seed=5)
    assert sample(task, seed=5).document != sample(task, seed=6).document


@pytest.mark.parametrize("task", ["multikey", "multivalue", "qa"])
def test_chance_is_the_mean_score_of_picking_at_random(task):
    example = sample(task)
    candidates = (*example.references, *example.distractors)
    picks = itertools.combinations(candidates, len(example.references))
    assert statistics.mean(example.score(" ".join(pick)) for pick in picks) == pytest.approx(example.chance)


@pytest.mark.parametrize("task", ["single", "multikey", "multivalue", "multiquery"])
def test_needles_are_all_that_was_asked_for(task):
    example = sample(task, seed=2)
    found = re.findall(r"One access code of (the \w+ \w+) is (\d{6})\.", example.document)
    asked = [value for key, value in found if key in example.question]
    assert sorted(asked) == sorted(example.references)
    assert sorted(value for key, value in found if key not in example.question) == sorted(example.distractors)
    # The answer names values by key, in the order of the question.
    keys = re.findall(r"the \w+ \w+", example.question.split(" of ", 1)[1])
    assert list(example.references) == [value for key in keys for own, value in found if own == key]


@pytest.mark.parametrize("seed", range(3))
def test_variables_are_those_that_resolve_to_the_number(seed):
    example = sample("variables", seed=seed)
    held = {}
    for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", example.document):
        held[name] = held.get(value, value)  # a chain's statements come in order
    number = re.search(r"value (\d+)", example.question).group(1)
    assert {name for name, value in held.items() if value == number} == set(example.references)
    assert set(held) == set(example.references) | set(example.distractors)
    assert all(value.isdigit() for value in held.values())


@pytest.mark.parametrize(
    ("task", "pattern", "asked"), [("common-words", r"\d+\. (\w+)", 10), ("frequent-words", r"\w+", 3)]
)
def test_words_are_those_that_come_most_often(task, pattern, asked):
    example = sample(task, seed=1)
    counts = Counter(re.findall(pattern, example.document))
    ranked = counts.most_common()
    assert {word for word, _ in ranked[:asked]} == set(example.references)
    assert ranked[asked - 1][1] > ranked[asked][1]
    assert {word for word, _ in ranked[asked:]} == set(example.distractors)


def test_frequency_falls_as_the_power_of_rank():
    example = make("frequent-words", tokenizer(), tokens=4000, alpha=1.5)
    counts = [number for _, number in Counter(example.document.split()).most_common()]
    expected = [counts[0] * rank**-1.5 for rank in range(1, len(counts) + 1)]
    assert all(abs(number - mean) <= 1 for number, mean in zip(counts, expected, strict=True))


def test_question_is_answered_by_one_document():
    example = sample("qa", seed=3)
    person = re.search(r"workshop of ([\w. ]+)\?", example.question).group(1)
    passages = re.split(r"Document \d+:\n", example.document)[1:]
    assert [example.references[0] in passage for passage in passages].count(True) == 1
    assert sum(person in passage and example.references[0] in passage for passage in passages) == 1


def test_given_documents_are_asked_and_those_with_the_answer_left_out():
    documents = [
        Passage("The capital of France is Paris.", "What is the capital of France?", ("Paris", "capital of France")),
        *(Passage(f"Village {number} is not far from Paris.") for number in range(20)),
        *(Passage(f"Village {number} lies in the hills, where few people come by.") for number in range(20)),
    ]
    example = qa(tokenizer(), tokens=500, documents=documents)
    assert example.document.count("Paris") == 1
    assert example.document.count("hills") > 3
    assert example.score("Why, paris!") == 1
    with pytest.raises(ValueError, match="no question"):
        qa(tokenizer(), tokens=500, documents=documents[1:])
    with pytest.raises(ValueError, match="'London' does not stand in its passage"):
        Passage("Paris.", "Where?", ("London",))


def test_text_goes_on_as_the_haystack_does():
    for seed in range(5):
        example = make("text", tokenizer(), tokens=300, seed=seed, new_tokens=20)
        assert example.modes == ("continuation",)
        assert example.document + example.answer in f"{manual()}\n\n{manual()}"
        assert 14 <= example.gold(tokenizer()).shape[1] <= 20
        assert example.score("anything") is example.chance is None


@given(
    text=st.text(min_size=1).filter(str.strip), seed=st.integers(0, 2**32), kind=st.sampled_from(["numbers", "uuids"])
)
@settings(max_examples=25)
def test_any_text_is_a_haystack(text, seed, kind):
    example = needles(tokenizer(), tokens=400, seed=seed, haystack=text, keys=2, kind=kind)
    assert example.prompt(tokenizer()).ids.shape[1] <= 400
    assert all(example.document.count(value) == 1 for value in (*example.references, *example.distractors))


def test_depth_places_the_needle():
    for depth in (0.0, 0.5, 1.0):
        example = needles(tokenizer(), tokens=1500, depth=depth)
        before = example.document.index(example.references[0]) / len(example.document)
        assert before == pytest.approx(depth, abs=0.06)


def test_kinds_of_values():
    assert re.fullmatch(r"[a-z]+-[a-z]+", needles(tokenizer(), tokens=400, kind="words").references[0])
    assert re.fullmatch(r"[0-9a-f-]{36}", needles(tokenizer(), tokens=400, kind="uuids").references[0])


def test_no_word_of_the_vocabulary_is_part_of_another():
    words = vocabulary(manual()[:60_000])
    assert len(words) > 300
    assert not any(short != long and short in long for short in words for long in words)


def test_lives_are_of_different_people():
    assert len({passage.question for passage in lives(7800)}) == 7800
    assert lives(5, seed=1) == lives(5, seed=1)
    assert lives(5, seed=1) != lives(5, seed=2)


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("multkey", {}, "Did you mean 'multikey'"),
        ("single", {"tokens": 30}, "tokens is 30; accepted: at least"),
        ("single", {"haystack": " \n"}, "haystack holds no word"),
        ("single", {"kind": "names"}, "kind is 'names'; accepted: numbers, words, uuids"),
        ("single", {"kind": "words", "haystack": "few words"}, "haystack has 1 words to draw from"),
        ("single", {"depth": 1.5}, "depth is 1.5"),
        ("single", {"values": 0}, "values is 0"),
        ("multiquery", {"queries": 9}, "queries is 9; accepted: at most the number of keys, 4"),
        ("single", {"keys": 1000}, "keys is 1000; accepted: at most"),
        ("variables", {"hops": 0}, "hops is 0"),
        ("common-words", {"times": 1}, "times is 1"),
        ("common-words", {"common": 0}, "common is 0"),
        ("common-words", {"haystack": "two words"}, "haystack has 1 words to draw from"),
        ("frequent-words", {"alpha": 0}, "alpha is 0"),
        ("frequent-words", {"asked": 0}, "asked is 0"),
        ("text", {"new_tokens": 0}, "new_tokens is 0"),
        ("text", {"tokens": 1}, "tokens is 1"),
    ],
)
def test_wrong_arguments_are_named(task, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        make(task, tokenizer(), **{"tokens": 600, **options})
