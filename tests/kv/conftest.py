"""Fixtures of several test files. A file may define another fixture of the same name."""

from __future__ import annotations

import pytest

from suffice.kv import load_model
from tests.kv.tiny import TOKENS, build, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a tiny model and its tokenizer."""
    place = tmp_path_factory.mktemp("ein Modell – ü")
    build("llama", vocab_size=TOKENS, max_position_embeddings=1024, seed=3).save_pretrained(place)
    tokenizer().save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def loaded(folder):
    """The model and the tokenizer of the folder."""
    return load_model(folder)
