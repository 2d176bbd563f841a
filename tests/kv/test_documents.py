"""Compressed documents: their answers are those of `answer`, alone, in a batch, as a stream, saved, and in a chat."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import DynamicCache

from suffice.kv import CompressedCache, answer, compress, open_document
from suffice.kv.eval.generation import greedy_generate
from suffice.kv.eval.prompt import tokenize_prompt, tokenize_turn
from suffice.kv.eval.tasks import python_manual
from suffice.kv.policy.policy import Policy
from suffice.kv.policy.weights import KeyNorm
from tests.kv.families import build as build_family
from tests.kv.tiny import TOKENS, build, tokenizer
from tests.wrong_arguments import each_wrong_argument, expect_error

TEXT = python_manual()[60_000:60_900]
QUESTIONS = ["Who?", "What is the name of the parrot that lives in the harbour?", "Where is it now, and why?"]
LENGTH = {"max_new_tokens": 6}
OPTIONS = [
    {"memory": 0.2},
    {"memory": 0.3, "interval": 4},
    {"memory": "60KiB"},
    {"budget": 0.25},
    {"policy": "h2o", "budget": 0.3, "bits": 4},
    {"policy": "capkv", "budget": 0.3, "allocation": "adakv", "repair": True},
    {"policy": "capkv-replay", "budget": 0.2},
]


def make(family="llama"):
    if family == "falcon_h1":
        return build_family(family, vocab_size=TOKENS)
    return build(family, vocab_size=TOKENS, max_position_embeddings=1024)


@pytest.fixture(scope="module")
def model():
    return make()


def expected(model, tok, options):
    return [answer(model, tok, TEXT, question, aware=False, **LENGTH, **options)[0].answer for question in QUESTIONS]


@pytest.mark.parametrize(("options", "chat"), [*((options, True) for options in OPTIONS), (OPTIONS[0], False)], ids=str)
def test_answers_equal_those_of_answer(model, options, chat, tmp_path):
    tok = tokenizer(chat)
    wanted = expected(model, tok, options)
    document = compress(model, tok, TEXT, **options)
    before = document.report()
    assert [document.ask(question, **LENGTH) for question in QUESTIONS] == wanted
    assert document.ask_all(QUESTIONS, **LENGTH) == wanted
    assert "".join(document.stream(QUESTIONS[1], **LENGTH)) == wanted[1]
    assert document.chat().ask(QUESTIONS[2], **LENGTH) == wanted[2]
    assert document.report() == before
    assert before.bytes < before.bytes_full
    assert before.tokens_seen == document.input_ids.shape[1]
    opened = open_document(document.save(tmp_path / "document.safetensors"), model, tok)
    assert (opened.text, opened.report()) == (TEXT, before)
    assert opened.ask_all(QUESTIONS, **LENGTH) == wanted


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_models_with_other_layers_answer_in_a_batch_as_alone(family):
    model, tok = make(family), tokenizer(True)
    document = compress(model, tok, TEXT, memory=0.3)
    questions = [*QUESTIONS, "Why?"]
    assert document.ask_all(questions, **LENGTH) == [document.ask(question, **LENGTH) for question in questions]


@pytest.mark.parametrize("options", [{"memory": 0.3}, {"policy": "h2o", "budget": 120}])
def test_texts_are_read_in_chunks_with_an_eviction_after_each(model, options):
    tok = tokenizer()
    document = compress(model, tok, TEXT, chunk_size=100, **options)
    prompts = [tokenize_prompt(tok, TEXT, question) for question in QUESTIONS]
    cache = CompressedCache(model, evict="always", **options)
    with torch.no_grad():
        for chunk in prompts[0].document.split(100, dim=1):
            model(chunk, past_key_values=cache)
    wanted = [greedy_generate(model, prompt.input_ids, cache.copy(), 6)[0] for prompt in prompts]
    wanted = [tok.decode(tokens, skip_special_tokens=True).strip() for tokens in wanted]
    assert [document.ask(question, **LENGTH) for question in QUESTIONS] == wanted
    assert document.ask_all(QUESTIONS, **LENGTH) == wanted


def test_texts_beyond_the_context_window():
    model, tok = build("llama", vocab_size=TOKENS, max_position_embeddings=256), tokenizer()
    with pytest.raises(ValueError, match=r"text must have fewer tokens than the context window of the model, 256, got"):
        compress(model, tok, TEXT)
    document = compress(model, tok, TEXT, "capkv", 64, chunk_size=64, rerotate=True)
    assert document.input_ids.shape[1] > 256
    assert document.report().tokens_kept == 64
    assert document.ask(QUESTIONS[0], **LENGTH) == document.ask_all(QUESTIONS[:1], **LENGTH)[0]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("ends", [True, False])
def test_turns_of_a_chat_equal_the_stock_cache_on_the_whole_conversation(chat, ends):
    """At full budget. The conversation is put together from the template and the generated tokens."""
    tok = tokenizer(chat)
    model = make()
    parts = tokenize_prompt(tok, TEXT, QUESTIONS[0])
    if ends:  # make the model end its answers early
        model.lm_head.weight.data[0] = 3 * model.lm_head.weight.data.abs().max()
        model.generation_config.eos_token_id = list(range(0, TOKENS, 9))
    document = compress(model, tok, TEXT, budget=1.0)
    talk, ids, stops = document.chat(), parts.input_ids, []
    for number, question in enumerate(QUESTIONS):
        if number:
            template = f"<end>[user] {question}<end>[assistant] " if chat else f"\n\nQuestion: {question}\nAnswer:"
            turn = tok(template, return_tensors="pt", add_special_tokens=False).input_ids
            assert torch.equal(tokenize_turn(tok, question), turn)
            ids = torch.cat([ids, turn], dim=1)
        found = talk.ask(question, **LENGTH) if number != 1 else "".join(talk.stream(question, **LENGTH))
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=DynamicCache(), do_sample=False, **LENGTH
        )
        new = out[:, ids.shape[1] :]
        assert found == tok.decode(new[0], skip_special_tokens=True).strip()
        stops.append(new.shape[1] < 6)
        is_end = model.generation_config.eos_token_id is not None and int(new[0, -1]) % 9 == 0
        ids = out[:, :-1] if is_end else out
        assert torch.equal(talk.input_ids, ids)
    assert any(stops) == ends
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 3
    assert [message["content"] for message in talk.messages[::2]] == QUESTIONS
    assert document.cache.get_seq_length() == document.input_ids.shape[1] < talk.report().tokens_seen


def test_rows_that_end_early_are_not_padded_with_text():
    model, tok = make(), tokenizer(True)
    model.generation_config.eos_token_id = list(range(0, TOKENS, 7))
    model.generation_config.pad_token_id = 60  # a token with text
    document = compress(model, tok, TEXT, budget=0.5)
    questions = [f"{word}?" for word in ("Who", "What", "Where", "When", "Why", "How much")]
    alone = [document.ask(question, max_new_tokens=12) for question in questions]
    assert len({len(text) for text in alone}) > 1
    assert document.ask_all(questions, max_new_tokens=12) == alone


def test_a_stream_that_is_closed_stops_the_generation(model):
    document = compress(model, tokenizer(True), TEXT, budget=0.5)
    talk, num_threads = document.chat(), threading.active_count()
    whole = document.ask(QUESTIONS[1], max_new_tokens=300)
    stream = talk.stream(QUESTIONS[1], max_new_tokens=300)
    assert threading.active_count() == num_threads  # it starts with the first piece
    assert talk.messages == []
    pieces = [next(stream), next(stream)]
    stream.close()
    assert threading.active_count() == num_threads
    heard = talk.messages[1]["content"]
    assert whole.startswith("".join(pieces))
    assert whole.startswith(heard)
    assert len("".join(pieces)) <= len(heard) < len(whole)
    assert talk.ask("And then?", **LENGTH) is not None


def test_errors_reach_the_reader_of_a_stream_and_leave_the_chat_as_it_was(model):
    talk = compress(model, tokenizer(True), TEXT, budget=0.5).chat()
    talk.ask(QUESTIONS[0], **LENGTH)
    before = len(talk.messages), talk.input_ids, talk.report()

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(talk.stream(QUESTIONS[1], **LENGTH))
    with pytest.raises(RuntimeError, match="out of memory"):
        talk.ask(QUESTIONS[1], **LENGTH)
    handle.remove()
    assert (len(talk.messages), talk.input_ids, talk.report()) == before


def test_options_of_generate_are_passed_on(model):
    document = compress(model, tokenizer(True), TEXT, budget=0.5)
    torch.manual_seed(0)
    sampled = document.ask(QUESTIONS[0], do_sample=True, **LENGTH)
    torch.manual_seed(0)
    assert document.ask(QUESTIONS[0], do_sample=True, **LENGTH) == sampled != document.ask(QUESTIONS[0], **LENGTH)
    whole = document.ask(QUESTIONS[0], max_new_tokens=20)
    stop = whole[len(whole) // 2 :][:2]
    stopped = document.ask(QUESTIONS[0], max_new_tokens=20, stop_strings=[stop])
    assert stop in stopped
    assert whole.startswith(stopped)
    assert len(stopped) < len(whole)


def test_an_own_loop_gives_the_same_answer(model):
    tok = tokenizer(True)
    document = compress(model, tok, TEXT, memory=0.3)
    prompt, cache = document.prompt(QUESTIONS[1]), document.cache.copy()
    ids, tokens = prompt.question, []
    with torch.no_grad():
        for _ in range(6):
            ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
    assert tok.decode(tokens, skip_special_tokens=True).strip() == document.ask(QUESTIONS[1], **LENGTH)


def test_files_that_do_not_fit_are_rejected(model, tmp_path):
    tok = tokenizer(True)
    document = compress(model, tok, TEXT, "capkv", 0.5)
    file = document.save(tmp_path / "document")
    assert CompressedCache.load(file, model).report() == document.report()
    with pytest.raises(ValueError, match=r"tokenizer must be the one that the document in '.*' was compressed with"):
        open_document(file, model, tokenizer(False))
    with pytest.raises(ValueError, match=r"model must be the one that the cache in '.*' was made with"):
        open_document(file, build("llama", vocab_size=TOKENS, max_position_embeddings=1024, seed=1), tok)
    plain = document.cache.save(model, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"path must be a file that Document.save has written, got '.*plain'"):
        open_document(plain, model, tok)
    with pytest.raises(FileNotFoundError, match="path must be a file that `save` has written"):
        open_document(tmp_path / "none", model, tok)
    own = Policy(weights=KeyNorm(), name="mine")
    file = compress(model, tok, "Grüße, 東京 🦜. " * 20, own, 0.5).save(tmp_path / "own")
    with pytest.raises(ValueError, match="policy must be"):
        open_document(file, model, tok)
    assert open_document(file, model, tok, policy=own).text == "Grüße, 東京 🦜. " * 20


def test_a_template_that_changes_the_messages_is_rejected(model):
    tok = tokenizer(True)
    original = tok.chat_template
    try:
        tok.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
        with pytest.raises(ValueError, match="chat_template of the tokenizer must contain the message unchanged"):
            compress(model, tok, TEXT)
        with pytest.raises(ValueError, match="chat_template of the tokenizer must contain the messages unchanged"):
            tokenize_turn(tok, "Who?")
    finally:
        tok.chat_template = original


def test_reprs(model):
    document = compress(model, tokenizer(True), TEXT, "capkv", 0.5)
    assert repr(document).startswith(f"Document({document.input_ids.shape[1]} tokens, policy='capkv', ")
    assert repr(document.chat()).startswith("Chat(0 turns, ")
    assert document.ask_all([]) == []


MODEL = make()
DOCUMENT = None


def ask(**own):
    global DOCUMENT
    DOCUMENT = DOCUMENT or compress(MODEL, tokenizer(True), TEXT, "capkv", 0.5)
    return DOCUMENT.ask(**{"question": "Who?", **own})


def stream(**own):
    ask(max_new_tokens=1)
    return DOCUMENT.stream(**{"question": "Who?", **own})


def ask_all(**own):
    ask(max_new_tokens=1)
    return DOCUMENT.ask_all(**{"questions": ["Who?"], **own})


def chat(**own):
    ask(max_new_tokens=1)
    return DOCUMENT.chat().stream(**{"message": "Who?", **own})


def compress_text(**own):
    return compress(**{"model": MODEL, "tokenizer": tokenizer(True), "text": TEXT, **own})


def open_file(**own):
    return open_document(**{"path": "x", "model": MODEL, "tokenizer": tokenizer(True), **own})


WRONG = [
    (compress_text, "model", "llama", TypeError, "model must be a transformers PreTrainedModel, got str"),
    (compress_text, "tokenizer", None, TypeError, "tokenizer must be the model's tokenizer, .* got None"),
    (compress_text, "text", 3, TypeError, "text must be a string, got 3"),
    (compress_text, "text", " ", ValueError, "text must contain text, got ' '"),
    (compress_text, "chunk_size", 0, ValueError, "chunk_size must be at least 1 token, got 0"),
    (compress_text, "memory", "much", ValueError, "memory must be"),
    (compress_text, "policy", "capkw", ValueError, "policy must be one of .* Did you mean 'capkv'"),
    (
        compress_text,
        "memry",
        0.1,
        TypeError,
        "arguments of compress must be among .* got 'memry'. Did you mean 'memory'",
    ),
    (open_file, "path", 3, TypeError, "path must be a path"),
    (open_file, "path", "missing", FileNotFoundError, "path must be a file that `save` has written, got 'missing'"),
    (ask, "question", None, TypeError, "question must be a string, got None"),
    (ask, "question", "", ValueError, "question must contain text, got ''"),
    (ask, "max_new_tokens", 0, ValueError, "max_new_tokens must be at least 1, got 0"),
    (ask, "max_new_tokens", 2000, ValueError, "prompt and answer must have at most 1024 tokens"),
    (
        ask,
        "past_key_values",
        None,
        ValueError,
        "options must be arguments of `generate` other than .* 'past_key_values'",
    ),
    (stream, "max_new_tokens", "8", TypeError, "max_new_tokens must be an int"),
    (ask_all, "questions", "Who?", TypeError, r"questions must be a list of questions, such as .* got 'Who\?'"),
    (ask_all, "questions", ["Who?", ""], ValueError, r"questions\[1\] must contain text, got ''"),
    (ask_all, "num_return_sequences", 2, ValueError, "options must be arguments of `generate`"),
    (chat, "message", " ", ValueError, "message must contain text, got ' '"),
    (chat, "max_new_tokens", 2000, ValueError, "prompt and answer must have at most 1024 tokens"),
]


@each_wrong_argument(WRONG)
def test_wrong_arguments_are_rejected_at_once(call, argument, value, error, words):
    expect_error(call, argument, value, error, words)
