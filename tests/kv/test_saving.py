"""Saved and loaded caches, copies, several turns, rows and beams: a cache can be continued."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from suffice.kv import CompressedCache, Policy, prefill
from suffice.kv.cache.batched import BatchedCaches
from suffice.kv.policy.registry import allocations, policies
from suffice.kv.policy.weights import ExpectedAttention, KeyNorm
from tests.kv.tiny import answer, build, left_padded, prompt, tiny

HALF_LIFE = Policy(weights=ExpectedAttention(future=0, pooled=True, diagonal=True, half_life=20.0), name="half-life")


def fill(model, cache, rows=None):
    inputs = {"input_ids": prompt(30)} if rows is None else left_padded(rows)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)


def continue_reading(model, cache, rows=1):
    """Return the logits of further chunks and single tokens, between which the cache may evict."""
    later = prompt(24, seed=7, rows=rows)
    logits = []
    with torch.no_grad():
        for start, stop in ((0, 9), (9, 10), (10, 11), (11, 12), (12, 24)):
            logits.append(model(later[:, start:stop], past_key_values=cache).logits[:, -1])
    return torch.cat(logits)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("allocation", list(allocations()))
@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("capkv", {}),
        ("h2o", {"evict": "always", "interval": 2}),
        (HALF_LIFE, {"evict": "always", "interval": 2, "rerotate": True}),
    ],
)
def test_loaded_cache_continues_like_the_saved_one(tmp_path, family, allocation, policy, settings):
    model = tiny(family)
    cache = CompressedCache(model, policy, 12, allocation=allocation, **settings)
    rows = [prompt(30), prompt(22)]
    fill(model, cache, rows)
    file = cache.save(model, tmp_path / "name with spaces.safetensors")
    own = None if isinstance(policy, str) else cache.policy
    loaded = CompressedCache.load(file, model, own)
    assert loaded.report() == cache.report()
    assert loaded.settings == cache.settings
    assert torch.equal(continue_reading(model, loaded, 2), continue_reading(model, cache, 2))
    assert loaded.report() == cache.report()


def test_another_process_can_continue(tmp_path):
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


def test_caches_and_files_that_do_not_fit_are_rejected(tmp_path):
    model = tiny("llama")
    cache = CompressedCache(model, "capkv", 12)
    with pytest.raises(ValueError, match="the cache must hold tokens to be saved, got an empty cache"):
        cache.save(model, tmp_path / "x")
    fill(model, cache)
    file = cache.save(model, tmp_path / "x")
    with pytest.raises(ValueError, match="model must be the one that the CompressedCache was made for, got another"):
        cache.save(tiny("qwen2"), tmp_path / "y")
    with pytest.raises(
        FileNotFoundError, match=r"path must be a file that `save` has written, got '.*none', which does not exist"
    ):
        CompressedCache.load(tmp_path / "none", model)
    message = r"model must be the one that the cache in '.*x' was made with \(fingerprint \w+\), got one with .* \w+"
    with pytest.raises(ValueError, match=message):
        CompressedCache.load(file, build("llama", seed=1))
    with pytest.raises(ValueError, match=r"model must have the dtype .* \(torch.float32\), got torch.bfloat16"):
        CompressedCache.load(file, build("llama").to(torch.bfloat16))
    with pytest.raises(ValueError, match=r"policy must be None or 'capkv' for '.*x', got 'custom'"):
        CompressedCache.load(file, model, Policy(weights=KeyNorm()))
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match=r"path must be a saved CompressedCache, got '.*text'"):
        CompressedCache.load(tmp_path / "text", model)


def test_missing_folders_are_created_and_files_that_cannot_be_written_are_errors(tmp_path):
    model = tiny("llama")
    cache = CompressedCache(model, "capkv", 12)
    fill(model, cache)
    file = cache.save(model, tmp_path / "new" / "folder" / "x")
    assert CompressedCache.load(file, model).report().tokens_kept == cache.report().tokens_kept
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "folder", file / "below a file", tmp_path / ("long" * 62)):
        with pytest.raises(OSError, match=r"directory|exists|path must be a file that can be written, got"):
            cache.save(model, place)
    assert not list(tmp_path.rglob("*.part"))


def test_pickling_a_cache_names_save(tmp_path):
    model = tiny("llama")
    cache = CompressedCache(model, "capkv", 12)
    fill(model, cache)
    for each in (cache, BatchedCaches([cache.copy(), cache.copy()]), {"cache": cache}):
        with pytest.raises(TypeError, match=r"cannot be pickled.*Write it with cache\.save\(model, path\)"):
            pickle.dumps(each)
        with pytest.raises(TypeError, match=r"cannot be pickled.*Write it with cache\.save\(model, path\)"):
            torch.save(each, tmp_path / "x")


def test_every_kind_of_copy_is_independent():
    model = tiny("llama")
    cache = CompressedCache(model, "capkv", 12)
    fill(model, cache)
    seen = cache.report().tokens_seen
    for other in (cache.copy(), copy.copy(cache), copy.deepcopy(cache)):
        with torch.no_grad():
            model(prompt(5, seed=3), past_key_values=other)
        assert other.report().tokens_seen == seen + 5
        assert cache.report().tokens_seen == seen


@pytest.mark.parametrize("allocation", ["equal", "adakv"])
def test_numpy_numbers_are_accepted_as_arguments(tmp_path, allocation):
    model = tiny("llama")
    options = {"sinks": 2, "window": 5, "interval": 4, "evict": "always", "allocation": allocation}
    arrays = {**options, **{name: np.int64(options[name]) for name in ("sinks", "window", "interval")}}
    for budget, own in ((12, np.int32(12)), (0.5, np.float32(0.5)), (0.5, np.float64(0.5))):
        plain, cache = (
            CompressedCache(model, "capkv", budget, **options),
            CompressedCache(model, "capkv", own, **arrays),
        )
        assert cache.settings == plain.settings
        assert type(cache.budget) is type(budget)
        fill(model, cache)
        assert CompressedCache.load(cache.save(model, tmp_path / "x"), model).settings == plain.settings
    for wrong in (True, "4", np.float32(4.5)):
        with pytest.raises(TypeError, match="interval must be an int"):
            CompressedCache(model, "capkv", 12, interval=wrong)


@pytest.mark.parametrize(("part", "factor"), [("norm", 1.5), ("v_proj", 0.1), ("k_proj", 1.001)])
def test_cache_of_a_model_with_other_weights_is_rejected(tmp_path, part, factor):
    model = build("llama")
    cache = CompressedCache(model, "capkv", 12)
    fill(model, cache)
    file = cache.save(model, tmp_path / "x")
    assert CompressedCache.load(file, build("llama")).report().tokens_kept == cache.report().tokens_kept
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if part in name:
                weight *= factor
    with pytest.raises(ValueError, match=r"model must be the one that the cache in '.*x' was made with"):
        CompressedCache.load(file, model)


@pytest.mark.parametrize("metadata", [None, {"other": "{}"}])
def test_files_without_our_metadata_are_rejected(tmp_path, metadata):
    """An early version wrote its metadata under another key."""
    save_file({"a": torch.zeros(1)}, tmp_path / "file", metadata)
    message = (
        r"must be a saved CompressedCache, got '.*file' \(it has no metadata .* early version\). Read the prompt again"
    )
    with pytest.raises(ValueError, match=message):
        CompressedCache.load(tmp_path / "file", tiny("llama"))


@pytest.mark.parametrize(
    ("version", "remedy"), [(2, "Read the prompt again and save the new cache"), (99, "Update suffice")]
)
def test_files_of_another_format_are_rejected(tmp_path, version, remedy):
    model = tiny("llama")
    cache = CompressedCache(model, "capkv", 12)
    fill(model, cache)
    file = cache.save(model, tmp_path / "cache.safetensors")
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["suffice"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert facts["format"] == 3
    save_file(tensors, file, {"suffice": json.dumps({**facts, "format": version})})
    message = rf"path must be a saved cache of format 3, got '.*' of format {version}, written by suffice .*\. {remedy}"
    with pytest.raises(ValueError, match=message):
        CompressedCache.load(file, model)


@pytest.mark.parametrize("options", [{"repair": True}, {"memory": 0.8, "bits": 4}, {"allocation": "equal"}])
@pytest.mark.parametrize("policy", [name for name, policy in policies().items() if policy.needs_replay])
def test_policies_with_a_replay_are_loaded_by_name(tmp_path, policy, options):
    model = tiny("llama")
    cache = CompressedCache(model, policy, **options)
    prefill(model, {"input_ids": prompt(60)}, [cache])
    loaded = CompressedCache.load(cache.save(model, tmp_path / "x"), model)
    assert (loaded.policy, loaded.settings, loaded.report()) == (cache.policy, cache.settings, cache.report())
    assert torch.equal(continue_reading(model, loaded), continue_reading(model, cache))


def test_composed_policy_must_be_passed_to_load(tmp_path):
    model, own = tiny("llama"), Policy(weights=KeyNorm(), name="mine")
    cache = CompressedCache(model, own, 12)
    fill(model, cache)
    file = cache.save(model, tmp_path / "x")
    message = r"policy must be the custom policy that .* was made with \(name mine, weights exp\(−‖k‖\).*\), got None"
    with pytest.raises(ValueError, match=message):
        CompressedCache.load(file, model)
    assert CompressedCache.load(file, model, own).policy == own


@pytest.mark.parametrize("allocation", list(allocations()))
def test_copies_share_tensors_and_do_not_change_the_original(allocation):
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
    first = continue_reading(model, copied)
    assert cache.report() == before
    assert torch.equal(continue_reading(model, cache.copy()), first)
    assert torch.equal(continue_reading(model, cache), first)


@pytest.mark.parametrize("allocation", list(allocations()))
def test_several_turns_share_one_cache(allocation):
    """Each turn continues the tokens before it, and entries after the first prompt are not evicted."""
    model = tiny("llama")
    cache = CompressedCache(model, "keydiff", 0.5, allocation=allocation)
    ids, tokens = prompt(20), []
    for turn in range(3):
        tokens = answer(model, {"input_ids": ids}, cache, new=3)
        ids = torch.cat((ids, tokens, prompt(6, seed=turn + 2)), dim=1)
    # The last generated token is only read in the next turn.
    assert cache.get_seq_length() == 20 + 2 * 9 + 2
    for head in cache.kept_positions(0)[0].tolist():
        assert set(range(20, 40)) <= set(head)


@pytest.mark.parametrize("allocation", ["equal", "profile", "marginal"])
def test_rows_of_a_ragged_cache_can_be_selected(allocation):
    model = tiny("llama")
    cache = CompressedCache(model, "capkv", 12, allocation=allocation)
    fill(model, cache, [prompt(17), prompt(29)])
    model(prompt(1, seed=4, rows=2), past_key_values=cache)

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
def test_beam_search_does_not_mix_rows(allocation):
    """The scores of beams equal those computed with a cache of its own for each beam."""
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
