"""One prefill that fills several caches."""

import pytest
import torch

from suffice.kv import CompressedCache
from suffice.kv.cache.prefill import prefill
from tests.kv.tiny import answer, left_padded, prompt, tiny


@pytest.mark.parametrize("share_statistics", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_shared_prefill_fills_each_cache_like_a_prefill_of_its_own(family, share_statistics):
    model = tiny(family)
    settings = [("full", 1.0), ("capkv", 0.5), ("pyramidkv", 0.4), ("h2o", 12), ("h2o", 0.6), ("capkv", 0.3)]
    document = left_padded([prompt(31), prompt(24)])
    question = prompt(5, seed=2, rows=2)
    caches = [CompressedCache(model, name, budget) for name, budget in settings]
    shared = prefill(model, document, caches, share_statistics=share_statistics)
    assert len(shared.seconds) == len(settings)
    inputs = {
        "input_ids": torch.cat((document["input_ids"], question), 1),
        "attention_mask": torch.cat((document["attention_mask"], torch.ones_like(question)), 1),
    }
    for (name, budget), cache in zip(settings, caches, strict=True):
        alone = CompressedCache(model, name, budget)
        with torch.no_grad():
            logits = model(**document, past_key_values=alone).logits[:, -1]
        torch.testing.assert_close(shared.logits, logits)
        for index in (layer.index for layer in alone.compressed_layers):
            assert torch.equal(cache.kept_positions(index), alone.kept_positions(index))
        assert torch.equal(answer(model, inputs, cache), answer(model, inputs, alone))


def test_missing_and_used_caches_are_rejected():
    model = tiny("llama")
    with pytest.raises(ValueError, match="caches must hold at least one CompressedCache, got none"):
        prefill(model, {"input_ids": prompt(10)}, [])
    used = CompressedCache(model)
    prefill(model, {"input_ids": prompt(20)}, [used])
    with pytest.raises(ValueError, match=r"caches\[1\] must be empty, got one that has seen 20 tokens"):
        prefill(model, {"input_ids": prompt(20)}, [CompressedCache(model), used])
