"""Several caches as the rows of one batch."""

import pytest
import torch

from suffice.kv import CompressedCache
from suffice.kv.cache.batched import BatchedCaches
from suffice.kv.cache.prefill import prefill
from tests.kv.tiny import FAMILIES, answer, left_padded, prompt, tiny

SETTINGS = [
    ("full", 1.0, None),
    ("capkv", 0.5, None),
    ("h2o", 12, "adakv"),
    ("keydiff", 0.4, "marginal"),
    ("tova", 9, None),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_each_row_continues_as_its_cache_alone(family, attn):
    model = tiny(family, attn)
    caches = [CompressedCache(model, name, budget, allocation=allocation) for name, budget, allocation in SETTINGS]
    prefill(model, {"input_ids": prompt(31)}, caches)
    more = prompt(6, seed=3)
    rows = BatchedCaches([cache.copy() for cache in caches])
    assert rows.get_seq_length() == 31
    with torch.no_grad():
        together = model(more.expand(len(caches), -1), past_key_values=rows).logits
        alone = torch.cat([model(more, past_key_values=cache.copy()).logits for cache in caches])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    ids = torch.cat((prompt(31), more), dim=1)
    rows = BatchedCaches([cache.copy() for cache in caches])
    tokens = answer(model, {"input_ids": ids.expand(len(caches), -1)}, rows)
    for row, cache in enumerate(caches):
        assert torch.equal(tokens[row], answer(model, {"input_ids": ids}, cache)[0])


def test_caches_that_do_not_fit_together_are_rejected():
    model = tiny("llama")
    with pytest.raises(ValueError, match="caches must hold at least one CompressedCache, got none"):
        BatchedCaches([])
    first, second = CompressedCache(model), CompressedCache(model)
    prefill(model, {"input_ids": prompt(20)}, [first])
    prefill(model, {"input_ids": prompt(21)}, [second])
    with pytest.raises(ValueError, match=r"caches must have seen the same number of tokens, got \[20, 21\]"):
        BatchedCaches([first, second])
    with pytest.raises(ValueError, match="the batch must have 1 rows, one for each cache, got 2"):
        model(prompt(3, rows=2), past_key_values=BatchedCaches([first.copy()]))
    padded = CompressedCache(model)
    prefill(model, left_padded([prompt(20), prompt(15)]), [padded])
    message = r"caches\[0\] must hold one row without padding, got 2 rows with 5 tokens of padding"
    with pytest.raises(ValueError, match=message):
        BatchedCaches([padded])
