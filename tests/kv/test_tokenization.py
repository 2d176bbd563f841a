"""Prompts in two parts have the tokens of the whole text, with every way of marking the start of a word."""

from __future__ import annotations

import functools

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from suffice.kv.budget.calibration import calibrate
from suffice.kv.eval.prompt import tokenize_prompt
from suffice.kv.eval.tasks import make_example, python_manual
from suffice.kv.hf.tokenization import tokenize, tokenize_continuation
from tests.kv.tiny import build, tokenizer

DOCUMENT = "The parrot is called Otto.  It sleeps."
QUESTION = "What is the parrot called?"
TEMPLATE = (
    "{% for m in messages %}<end>[{{ m.role }} is called]\n{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


@functools.cache
def made(kind: str, chat: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer that marks words as one of the common kinds does, trained on part of Python's manual."""
    core = Tokenizer(models.BPE())
    alphabet = sorted(set(python_manual()[:20_000]) | set("\n▁"))
    if kind == "bytes with a space":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:  # as newer versions of SentencePiece tokenizers
        scheme = "always" if kind == "prepended" else kind
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    # No token contains a line break, as in SentencePiece.
    core.train_from_iterator([python_manual()[:20_000].replace("\n", " ")], trainer)
    if kind == "prepended":  # as Llama 2: a normalizer puts "▁" before the text and for each space
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        core.pre_tokenizer = None
    core.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    result = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", clean_up_tokenization_spaces=False)
    if chat:
        result.chat_template = TEMPLATE
    return result


KINDS = ["prepended", "always", "first", "bytes with a space"]
kinds = pytest.mark.parametrize("kind", KINDS)


def ids(encoder, text: str) -> list[int]:
    return encoder(text, add_special_tokens=False).input_ids


@kinds
def test_a_continuation_has_the_tokens_that_it_has_within_the_text(kind):
    encoder = made(kind)
    for text in ("\n\nQuestion: why?\nAnswer:", " and so on", "?", "\n", "7 days", " The answer is"):
        for before in (":", "\n"):
            whole, start = ids(encoder, before + text), ids(encoder, before)
            if whole[: len(start)] == start:
                assert tokenize_continuation(encoder, text)[0].tolist() == whole[len(start) :]
    assert tokenize_continuation(encoder, "").shape == (1, 0)


def test_byte_level_continuations_are_tokenized_alone():
    for text in ("\n\nQuestion: why?\nAnswer:", " and so on", "word", "\n", "7"):
        assert torch.equal(tokenize_continuation(tokenizer(), text), tokenize(tokenizer(), text))


@kinds
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("prefix", ["", "The answer is"])
def test_both_parts_of_a_prompt_are_the_tokens_of_the_whole_text(kind, chat, prefix):
    encoder = made(kind, chat)
    prompt = tokenize_prompt(encoder, DOCUMENT, QUESTION, answer_prefix=prefix)
    if chat:
        text = f"<end>[user is called]\n{DOCUMENT}\n\n{QUESTION}<end>\n[assistant]\n{prefix}"
    else:
        text = f"{DOCUMENT}\n\nQuestion: {QUESTION}\nAnswer:" + (f" {prefix}" if prefix else "")
    assert prompt.input_ids[0].tolist() == ids(encoder, text)
    assert prompt.document[0].tolist() == ids(encoder, text[: text.index(DOCUMENT) + len(DOCUMENT)])


@kinds
def test_right_answers_continue_the_prompt(kind):
    encoder = made(kind)
    example = make_example("text", encoder, tokens=200, max_new_tokens=20)
    prompt, answer = example.prompt(encoder).input_ids[0].tolist(), example.answer_ids(encoder)[0].tolist()
    assert prompt + answer == ids(encoder, example.document + example.answer)


def test_words_of_the_template_are_not_taken_for_the_document():
    for document in ("user", "is called", "assistant"):
        prompt = tokenize_prompt(made("always", chat=True), document, "Who?")
        assert prompt.document[0].tolist() == ids(made("always"), f"<end>[user is called]\n{document}")


def test_messages_that_a_template_changes_are_rejected():
    encoder = PreTrainedTokenizerFast(tokenizer_object=made("always").backend_tokenizer)
    encoder.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    with pytest.raises(ValueError, match="chat_template of the tokenizer must contain the message unchanged, got one"):
        tokenize_prompt(encoder, DOCUMENT)


def test_empty_texts_are_rejected():
    with pytest.raises(ValueError, match="question must contain text, or be None, got ' '"):
        tokenize_prompt(tokenizer(), DOCUMENT, " ")
    model = build("llama", vocab_size=400)
    with pytest.raises(ValueError, match="text must contain text, or be None, got ''"):
        calibrate(model, tokenizer(), "")
    with pytest.raises(ValueError, match="text must have at least 32 tokens, got 1"):
        calibrate(model, tokenizer(), "a")
    with pytest.raises(ValueError, match=r"tokenizer must be given with a text, got None. Without both, random tokens"):
        calibrate(model, text=DOCUMENT)
