"""Heads split over two processes by transformers' tensor parallelism, layers spread over devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from suffice.kv import CompressedCache
from suffice.kv.budget.calibration import calibrate, get_profile
from suffice.kv.hf.fingerprint import fingerprint
from suffice.kv.hf.tensor_parallel import Sharding, local_columns, topk_masks
from tests.kv.parallel import CASES, SETTINGS, inputs, run
from tests.kv.tiny import answer, build, left_padded, prompt

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory, own_cache):
    """A tiny model as loaded from its files, in one process, and where they are."""
    path = tmp_path_factory.mktemp("model")
    build("llama").save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), path


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUFFICE_CACHE", str(tmp_path_factory.mktemp("suffice")))
        yield


@pytest.fixture(scope="module")
def processes(model, tmp_path_factory):
    """What two processes saw, each with half of the heads."""
    single, path = model
    get_profile(single)  # measured once, and read by both
    out = tmp_path_factory.mktemp("out")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONFAULTHANDLER"] = "1"  # says where a process was that something outside of Python ended
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        [*command, str(ROOT / "tests/kv/parallel.py"), str(path), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)], out


@pytest.mark.parametrize(("policy", "allocation"), CASES)
def test_two_processes_answer_as_one(model, processes, policy, allocation):
    """The same tokens, and each process holds what one would have kept in its heads."""
    expected = json.loads(json.dumps(run(model[0], policy, allocation)))
    for rank, found in enumerate(processes[0]):
        own = found["cases"][f"{policy}/{allocation}"]
        assert own["tokens"] == expected["tokens"]
        assert own["kept"] == {name: held for name, held in expected["kept"].items() if name.endswith(f".{rank}")}


def test_what_is_exchanged(processes):
    """Per head: nothing. Where heads compete, three counts by layer and eviction, whatever the length of the text."""
    for found in processes[0]:
        exchanged = found["exchanged"]
        for name in ("capkv/equal", "criticalkv/equal", "random/equal", "capkv/pyramid"):
            assert exchanged[name] == 0
        assert exchanged["capkv/profile"] == 1  # the first process's profile, when the cache is made
        # Two for an average over all heads, by layer and eviction: its width and itself.
        evictions = exchanged["tova/equal"] // 2
        assert evictions > 0
        assert exchanged["capkv/pooled"] == 3 * evictions
        assert 3 * evictions <= exchanged["capkv/marginal"] <= 4 * evictions


def test_a_profile_measured_by_two_is_that_of_one(model, processes):
    expected = torch.tensor(calibrate(model[0], tokens=64).attention)
    for found in processes[0]:
        torch.testing.assert_close(torch.tensor(found["profile"]), expected, atol=1e-5, rtol=1e-3)
        assert found["fingerprint"] == fingerprint(model[0])


def test_each_process_saves_its_heads(model, processes):
    single, (found, out) = model[0], processes
    assert [each["saved"] for each in found] == [
        {"file": f"cache-{rank}-of-2.safetensors", "goes on": True} for rank in (1, 2)
    ]
    with pytest.raises(ValueError, match="holds a cache of process 2 of 2, this is one process; accepted: the same"):
        CompressedCache.load(out / "cache-2-of-2.safetensors", single)


def test_the_largest_of_two_processes(processes):
    assert [found["selection"] for found in processes[0]] == [True, True]


def test_the_largest_of_one():
    values = [torch.tensor([3.0, float("-inf"), 5.0, 4.0]), torch.tensor([1.0, 2.0])]
    found = topk_masks(values, [2, 5])
    assert [own.tolist() for own in found] == [[False, False, True, True], [True, True]]


def test_heads_are_all_here_or_evenly_split():
    sharding = Sharding(None, rank=1, world_size=2, num_kv_heads=8)
    assert [sharding.is_split(heads) for heads in (8, 4)] == [False, True]
    with pytest.raises(ValueError, match="process 1 of 2 must be all 8 or 8/2 of them, got 3"):
        sharding.is_split(3)
    assert sharding.local_part(torch.arange(8), 0).tolist() == [4, 5, 6, 7]


def test_a_projection_that_is_split_without_its_heads_is_named():
    weight = torch.zeros(5, 4)
    assert local_columns(weight, 4) is weight
    with pytest.raises(ValueError, match=r"output projection must have 8 columns, .*, got 4:"):
        local_columns(weight, 8)


def test_a_model_in_one_process_is_not_sharded():
    assert Sharding.from_model(build("llama")) is None


@pytest.fixture(scope="module")
def spread(model, tmp_path_factory):
    """The model with accelerate's hooks on every layer, the weights of one waiting on a disk."""
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    folder = tmp_path_factory.mktemp("offload")
    return AutoModelForCausalLM.from_pretrained(model[1], dtype=torch.float32, device_map=places, offload_folder=folder)


@pytest.mark.parametrize(("policy", "allocation"), CASES)
def test_a_device_map_changes_nothing(model, spread, policy, allocation):
    assert run(spread, policy, allocation) == run(model[0], policy, allocation)


def test_a_cache_of_a_spread_model_is_that_of_the_model(model, spread, tmp_path):
    """Its identity is that of the weights, wherever they wait; what is loaded lies where it is computed with."""
    single = model[0]
    cache = CompressedCache(spread, "capkv", 18, **SETTINGS)
    answer(spread, inputs(), cache, 4)
    cache.save(spread, tmp_path / "cache.safetensors")
    for each in (single, spread):
        loaded = CompressedCache.load(tmp_path / "cache.safetensors", each)
        assert {layer.storage.keys.device.type for layer in loaded.compressed_layers} == {"cpu"}
        # The room for new tokens is not in the file.
        assert replace(loaded.report(), bytes_index=0) == replace(cache.report(), bytes_index=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("allocation", ["equal", "marginal"])
def test_layers_need_nothing_but_their_own_tensors(attention, allocation):
    """What reaches a layer on another device are copies, without what the mask function has noted on the mask."""

    def copied(x):
        return x.clone() if isinstance(x, torch.Tensor) else tuple(map(copied, x)) if isinstance(x, tuple) else x

    def before(module, arguments, options):
        return copied(arguments), {name: copied(x) for name, x in options.items()}

    found = []
    for moves in (False, True):
        network = build("llama", attention)
        for layer in network.model.layers if moves else ():
            layer.register_forward_pre_hook(before, with_kwargs=True)
        cache = CompressedCache(network, "capkv", 18, allocation=allocation, **SETTINGS)
        batch = left_padded([prompt(61), prompt(20, seed=2)])  # of the first chunk, a row has padding alone
        with torch.no_grad():
            out = network.generate(
                **batch, past_key_values=cache, prefill_chunk_size=20, max_new_tokens=8, do_sample=False
            )
        found.append((out.tolist(), [cache.kept_positions(layer.index).tolist() for layer in cache.compressed_layers]))
    assert found[0] == found[1]
