"""Several caches as the rows of one batch."""

import pytest
import torch

from suffice.kv import CompressedCache
from suffice.kv.cache.batched import BatchedCaches
from suffice.kv.cache.prefill import prefill
from tests.kv.families import build as build_family
from tests.kv.tiny import FAMILIES, answer, build, left_padded, prompt, tiny

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
    first = CompressedCache(model)
    prefill(model, {"input_ids": prompt(20)}, [first])
    with pytest.raises(ValueError, match="the batch must have 1 rows, one for each cache, got 2"):
        model(prompt(3, rows=2), past_key_values=BatchedCaches([first.copy()]))
    padded = CompressedCache(model)
    prefill(model, left_padded([prompt(20), prompt(15)]), [padded])
    message = r"caches\[0\] must hold one row without padding, got 2 rows with 5 tokens of padding"
    with pytest.raises(ValueError, match=message):
        BatchedCaches([padded])


@pytest.mark.parametrize("family", ["gemma3", "falcon_h1"])
def test_rows_of_different_lengths_need_layers_that_are_all_compressed(family):
    model = tiny(family) if family == "gemma3" else build_family(family)
    caches = [CompressedCache(model, "capkv", 0.5) for _ in range(2)]
    for length, cache in zip((20, 21), caches, strict=True):
        prefill(model, {"input_ids": prompt(length)}, [cache])
    with pytest.raises(ValueError, match=r"caches must have seen the same number of tokens, got \[20, 21\], because"):
        BatchedCaches(caches)


ROWS = [  # a cache, and new tokens for each turn
    ({"policy": "capkv", "budget": 12, "evict": "always", "interval": 3}, 31, (6, 4)),
    ({"policy": "h2o", "budget": 0.4, "allocation": "adakv"}, 40, (2, 7)),
    ({"memory": 0.5}, 25, (9, 1)),
    ({"policy": "capkv", "budget": 0.5, "bits": 4}, 60, (1, 3)),
    ({"policy": "capkv", "budget": 20, "evict": "always", "rerotate": True}, 44, (4, 2)),
]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral with windows"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_rows_of_different_lengths_continue_exactly_as_alone(family, attn):
    """Two turns that are padded on the left, and single tokens after each, of documents of different lengths."""
    has_windows = family.endswith("windows")
    model = build("mistral", attn, sliding_window=24) if has_windows else tiny(family, attn)
    settings = [row for row in ROWS if not (has_windows and row[0].get("rerotate"))]
    caches, ids = [], []
    for number, (options, length, _) in enumerate(settings):
        caches.append(CompressedCache(model, **options))
        ids.append(prompt(length, seed=number))
        with torch.no_grad():
            model(ids[-1], past_key_values=caches[-1])
    alone, rows = [cache.copy() for cache in caches], BatchedCaches(caches)
    mask = left_padded(ids)["attention_mask"]
    for turn in range(2):
        new = [prompt(lengths[turn], seed=50 + number) for number, (_, _, lengths) in enumerate(settings)]
        batch = left_padded(new)
        for step in range(6):
            tokens, own_mask = (
                (batch["input_ids"], batch["attention_mask"])
                if step == 0
                else (
                    prompt(6, seed=99)[:, step : step + 1].expand(len(caches), -1),
                    torch.ones(len(caches), 1, dtype=torch.long),
                )
            )
            mask = torch.cat((mask, own_mask), dim=1)
            positions = (mask.cumsum(1) - 1)[:, -tokens.shape[1] :]
            with torch.no_grad():
                got = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=rows).logits
                for row, cache in enumerate(alone):
                    own = tokens[row : row + 1][own_mask[row : row + 1].bool()][None]
                    wanted = model(own, past_key_values=cache).logits
                    torch.testing.assert_close(got[row, -own.shape[1] :], wanted[0], rtol=1e-4, atol=1e-4)
    assert rows.get_seq_length() == mask.shape[1]
    for row, cache in zip(caches, alone, strict=True):
        assert row.get_seq_length() == cache.get_seq_length() < mask.shape[1]
        assert torch.equal(row.kept_positions(1), cache.kept_positions(1))
        assert row.report().bytes == cache.report().bytes


def test_masks_and_positions_of_rows_are_checked():
    model = tiny("llama")
    caches = [CompressedCache(model, "capkv", 12) for _ in range(2)]
    for length, cache in zip((20, 24), caches, strict=True):
        prefill(model, {"input_ids": prompt(length)}, [cache])
    ids, mask = prompt(3, rows=2), torch.ones(2, 27, dtype=torch.long)
    mask[0, :4] = 0
    inputs = {"position_ids": (mask.cumsum(1) - 1)[:, -3:], "past_key_values": BatchedCaches(caches)}
    with pytest.raises(ValueError, match=r"position_ids must be given for rows that have seen .* \(\[20, 24\]\)"):
        model(ids, attention_mask=mask, past_key_values=inputs["past_key_values"])
    with pytest.raises(
        ValueError, match=r"attention_mask must mark the 20 tokens that caches\[0\] has seen, .* got 24"
    ):
        model(ids, attention_mask=torch.ones_like(mask), **inputs)
    for hole in (25, 26):
        with pytest.raises(ValueError, match=r"attention_mask must pad new tokens on the left only, .* in row 1"):
            model(
                ids,
                attention_mask=mask.clone().index_put((torch.tensor(1), torch.tensor(hole)), torch.tensor(0)),
                **inputs,
            )
    assert [cache.get_seq_length() for cache in caches] == [20, 24]
    model(ids, attention_mask=mask, **inputs)
    assert [cache.get_seq_length() for cache in caches] == [23, 27]
