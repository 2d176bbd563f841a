"""The text generation pipeline with a compressed cache, on the oldest and the newest transformers."""

import pytest
import torch
from transformers import pipeline

from suffice.kv import CompressedCache, CompressedTextGenerationPipeline
from suffice.kv.eval.generation import fill_cache
from suffice.kv.eval.tasks import python_manual
from tests.kv.tiny import TOKENS, build, tokenizer

TEXT = python_manual()[60_000:60_600]
CHAT = [{"role": "user", "content": TEXT}]
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}


@pytest.fixture(scope="module")
def model():
    return build("llama", vocab_size=TOKENS, max_position_embeddings=1024)


def make(model, **options):
    return pipeline(
        "text-generation",
        model=model,
        tokenizer=tokenizer(True),
        pipeline_class=CompressedTextGenerationPipeline,
        **options,
    )


def generate(model, ids, **options):
    """Return the text that `generate` writes with a compressed cache."""
    cache = CompressedCache(model, **options)
    if cache.needs_replay:
        fill_cache(model, ids[:, :-1], cache, tokenizer=tokenizer(True))
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=6, do_sample=False
    )
    return tokenizer(True).decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def encode(text):
    return tokenizer(True)(text, return_tensors="pt").input_ids


@pytest.mark.parametrize(
    "options", [{"memory": 0.3}, {"policy": "h2o", "budget": 20}, {"policy": "kvzip", "budget": 0.3}]
)
def test_texts_and_chats_equal_generate_with_the_same_cache(model, options):
    pipe = make(model, **options)
    assert pipe(TEXT, **OPTIONS)[0]["generated_text"] == generate(model, encode(TEXT), **options)
    ids = tokenizer(True).apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert pipe(CHAT, **OPTIONS)[0]["generated_text"] == generate(model, ids["input_ids"], **options)


def test_options_of_a_call_replace_those_of_the_pipeline(model):
    pipe = make(model, policy="capkv", budget=12)
    few, most = (generate(model, encode(TEXT), policy="capkv", budget=budget) for budget in (12, 0.9))
    assert few != most
    assert pipe(TEXT, **OPTIONS)[0]["generated_text"] == few
    assert pipe(TEXT, budget=0.9, **OPTIONS)[0]["generated_text"] == most
    assert pipe(TEXT, **OPTIONS)[0]["generated_text"] == few


def test_a_full_budget_equals_the_stock_pipeline(model):
    stock = pipeline("text-generation", model=model, tokenizer=tokenizer(True))
    pipe = make(model, budget=1.0)
    for prompt in (TEXT, CHAT):
        assert pipe(prompt, **OPTIONS) == stock(prompt, **OPTIONS)


def test_rows_of_a_batch_equal_single_prompts(model):
    tok = tokenizer(True)
    tok.pad_token, padding_side = tok.eos_token, tok.padding_side
    try:
        tok.padding_side = "right"
        pipe = make(model, policy="h2o", budget=20)
        texts = [TEXT, TEXT[:300], TEXT[100:450]]
        batch = [row[0]["generated_text"] for row in pipe(texts, batch_size=3, **OPTIONS)]
        assert batch == [generate(model, encode(text), policy="h2o", budget=20) for text in texts]
    finally:
        tok.pad_token, tok.padding_side = None, padding_side


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"memory": "much"}, ValueError, "memory must be"),
        ({"policy": "capkw"}, ValueError, "policy must be one of .* Did you mean 'capkv'"),
        ({"budget": 0.5, "bits": 9}, ValueError, "bits must be"),
    ],
)
def test_wrong_arguments_are_rejected_when_the_pipeline_is_made(model, options, error, words):
    with pytest.raises(error, match=words):
        make(model, **options)
