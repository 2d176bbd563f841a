"""Caches on disk, copies, rows: a cache is a thing that goes on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from suffice.kv import CompressedCache, Policy
from suffice.kv.policy.registry import allocations
from suffice.kv.policy.weights import ExpectedAttention, KeyNorm
from tests.kv.tiny import answer, build, left_padded, prompt, tiny

MOVING = Policy(weights=ExpectedAttention(future=0, pooled=True, diagonal=True, half_life=20.0), name="moving")


def fill(model, cache, rows=None):
    inputs = {"input_ids": prompt(30)} if rows is None else left_padded(rows)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)


def go_on(model, cache, rows=1):
    """Logits of further chunks and single tokens, the cache evicting where it does."""
    later = prompt(24, seed=7, rows=rows)
    found = []
    with torch.no_grad():
        for start, stop in ((0, 9), (9, 10), (10, 11), (11, 12), (12, 24)):
            found.append(model(later[:, start:stop], past_key_values=cache).logits[:, -1])
    return torch.cat(found)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("allocation", list(allocations()))
@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("capkv", {}),
        ("h2o", {"evict": "always", "interval": 2}),
        (MOVING, {"evict": "always", "interval": 2, "rerotate": True}),
    ],
)
def test_a_loaded_cache_goes_on_as_the_saved_one(tmp_path, family, allocation, policy, settings):
    model = tiny(family)
    cache = CompressedCache(model, policy, 12, allocation=allocation, **settings)
    rows = [prompt(30), prompt(22)]
    fill(model, cache, rows)
    file = cache.save(model, tmp_path / "a cache.safetensors")
    own = None if isinstance(policy, str) else cache.policy
    loaded = CompressedCache.load(file, model, own)
    assert loaded.report() == cache.report()
    assert loaded.settings == cache.settings
    assert torch.equal(go_on(model, loaded, 2), go_on(model, cache, 2))
    assert loaded.report() == cache.report()


def test_another_process_goes_on(tmp_path):
    """The same weights, built again where nothing of this process is left."""
    model = build("llama")
    cache = CompressedCache(model, "capkv", 12, allocation="adakv")
    fill(model, cache)
    file = cache.save(model, tmp_path / "cache.safetensors")
    script = (
        "import sys, torch; from suffice.kv import CompressedCache; from tests.kv.tiny import build, prompt, answer\n"
        "model = build('llama'); cache = CompressedCache.load(sys.argv[1], model)\n"
        "ids = torch.cat((prompt(30), prompt(5, seed=3)), 1)\n"
        "print(answer(model, {'input_ids': ids}, cache).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=True)
    ids = torch.cat((prompt(30), prompt(5, seed=3)), 1)
    assert json.loads(done.stdout.splitlines()[-1]) == answer(model, {"input_ids": ids}, cache).tolist()


def test_what_does_not_fit_is_refused(tmp_path):
    model = tiny("llama")
    cache = CompressedCache(model, "capkv", 12)
    with pytest.raises(ValueError, match="has seen nothing"):
        cache.save(model, tmp_path / "x")
    fill(model, cache)
    file = cache.save(model, tmp_path / "x")
    with pytest.raises(ValueError, match="model is not the one"):
        cache.save(tiny("qwen2"), tmp_path / "y")
    with pytest.raises(FileNotFoundError, match="accepted: a file that `save` wrote"):
        CompressedCache.load(tmp_path / "none", model)
    with pytest.raises(ValueError, match=r"holds a cache of model \w+, this model is \w+"):
        CompressedCache.load(file, build("llama", seed=1))
    with pytest.raises(ValueError, match=r"in torch.float32, this model is in torch.bfloat16"):
        CompressedCache.load(file, build("llama").to(torch.bfloat16))
    with pytest.raises(ValueError, match="policy is 'custom'"):
        CompressedCache.load(file, model, Policy(weights=KeyNorm()))
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="is no saved CompressedCache"):
        CompressedCache.load(tmp_path / "text", model)
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="is no saved CompressedCache"):
        CompressedCache.load(tmp_path / "other", model)
    with safe_open(file, "pt") as held:
        facts = json.loads(held.metadata()["suffice"])
        tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "newer", {"suffice": json.dumps({**facts, "format": 99})})
    with pytest.raises(ValueError, match=r"has format 99.*Update suffice"):
        CompressedCache.load(tmp_path / "newer", model)


def test_a_policy_of_ones_own_is_asked_for(tmp_path):
    model, own = tiny("llama"), Policy(weights=KeyNorm(), name="mine")
    cache = CompressedCache(model, own, 12)
    fill(model, cache)
    file = cache.save(model, tmp_path / "x")
    with pytest.raises(ValueError, match=r"policy is None.*name mine, weights exp\(−‖k‖\)"):
        CompressedCache.load(file, model)
    assert CompressedCache.load(file, model, own).policy == own


@pytest.mark.parametrize("allocation", list(allocations()))
def test_one_document_answers_many_questions(allocation):
    """Copies share what is stored; the original stays as it is, whatever the copies do."""
    model = tiny("gemma3")
    cache = CompressedCache(model, "capkv", 12, allocation=allocation, evict="always", interval=2)
    fill(model, cache)
    before = cache.report()
    copied = cache.copy()
    stored = [
        (one.storage.buffers, two.storage.buffers)
        for one, two in zip(cache.compressed_layers, copied.compressed_layers, strict=True)
    ]
    assert all(a.data_ptr() == b.data_ptr() for one, two in stored for a, b in zip(one, two, strict=True) if a.numel())
    first = go_on(model, copied)
    assert cache.report() == before
    assert torch.equal(go_on(model, cache.copy()), first)
    assert torch.equal(go_on(model, cache), first)


@pytest.mark.parametrize("allocation", list(allocations()))
def test_several_turns_on_one_cache(allocation):
    """Each turn goes on from the tokens before; what was kept is read as if all had come at once."""
    model = tiny("llama")
    cache = CompressedCache(model, "keydiff", 0.5, allocation=allocation)
    ids, tokens = prompt(20), []
    for turn in range(3):
        tokens = answer(model, {"input_ids": ids}, cache, new=3)
        ids = torch.cat((ids, tokens, prompt(6, seed=turn + 2)), dim=1)
    # The last token generated is not read before the next turn.
    assert cache.get_seq_length() == 20 + 2 * 9 + 2
    for head in cache.kept_positions(0)[0].tolist():
        assert set(range(20, 40)) <= set(head)


@pytest.mark.parametrize("allocation", ["equal", "profile", "marginal"])
def test_rows_of_a_ragged_cache(allocation):
    model = tiny("llama")
    cache = CompressedCache(model, "capkv", 12, allocation=allocation)
    fill(model, cache, [prompt(17), prompt(29)])
    go = {"input_ids": prompt(1, seed=4, rows=2)}
    model(**go, past_key_values=cache)

    def rows():
        return [[[p for p in head if p >= 0] for head in row] for row in cache.kept_positions(1).tolist()]

    before = rows()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert rows() == [before[1], before[0]]
    cache.batch_repeat_interleave(2)
    assert rows() == [before[1], before[1], before[0], before[0]]
    cache.batch_select_indices(torch.tensor([2]))
    assert rows() == [before[0]]


@pytest.mark.parametrize("allocation", ["equal", "adakv"])
def test_beams_do_not_mix_rows(allocation):
    """Beam search over a compressed prompt, against the same search with each beam's cache kept apart by hand."""
    model = tiny("llama")
    inputs = {"input_ids": prompt(20), "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    options = {
        "num_beams": 3,
        "num_return_sequences": 3,
        "max_new_tokens": 5,
        "do_sample": False,
        "output_scores": True,
    }
    found = model.generate(
        **inputs,
        **options,
        return_dict_in_generate=True,
        past_key_values=CompressedCache(model, "capkv", 12, allocation=allocation),
    )
    for ids, score in zip(found.sequences, found.sequences_scores, strict=True):
        alone = CompressedCache(model, "capkv", 12, allocation=allocation)
        with torch.no_grad():
            logits = [model(ids[None, :20], past_key_values=alone).logits[:, -1]]
            logits += [model(ids[None, i : i + 1], past_key_values=alone).logits[:, -1] for i in range(20, 24)]
        total = sum(x.log_softmax(-1)[0, token] for x, token in zip(logits, ids[20:], strict=True))
        torch.testing.assert_close(score, total / 5, atol=1e-4, rtol=1e-4)
