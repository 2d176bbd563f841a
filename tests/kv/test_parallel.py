"""Tensor parallelism over two processes, and models whose layers are spread over devices."""

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
from tests.kv.parallel import BITS, CASES, QUANTIZED_CASES, SETTINGS, inputs, run
from tests.kv.tiny import answer, build, left_padded, prompt

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory, own_cache):
    """A tiny model, loaded from its files in one process, and their folder."""
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
    """Results of two processes with half of the heads each, and the folder of their files."""
    single, path = model
    get_profile(single)  # measured here, and read by both processes
    out = tmp_path_factory.mktemp("out")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONFAULTHANDLER"] = "1"  # a crashed process prints its traceback
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
def test_two_processes_equal_one(model, processes, policy, allocation):
    """Both generate the same tokens, and each head keeps the same entries."""
    expected = json.loads(json.dumps(run(model[0], policy, allocation)))
    for rank, results in enumerate(processes[0]):
        case = results["cases"][f"{policy}/{allocation}"]
        assert case["tokens"] == expected["tokens"]
        assert case["kept"] == {name: kept for name, kept in expected["kept"].items() if name.endswith(f".{rank}")}


@pytest.mark.parametrize(("policy", "allocation"), QUANTIZED_CASES)
def test_two_processes_equal_one_with_quantized_entries(model, processes, policy, allocation):
    """Both quantize their heads as one process does, which decides what later tokens read."""
    expected = run(model[0], policy, allocation, BITS)
    lengths = {len(row) for head in expected["kept"].values() for row in head}
    assert (len(lengths) > 2) == (allocation == "profile")
    for rank, results in enumerate(processes[0]):
        case = results["cases"][f"{policy}/{allocation}/{BITS}"]
        assert case["tokens"] == expected["tokens"]
        own = {name for name in expected["kept"] if name.endswith(f".{rank}")}
        assert case["kept"] == {name: expected["kept"][name] for name in own}
        assert case["errors"].keys() == own
        for name, errors in case["errors"].items():
            assert all(0.01 < error < 0.2 for error in errors)
            assert errors == pytest.approx(expected["errors"][name], rel=1e-3)


def test_number_of_collective_operations(processes):
    """Policies of single heads need none; if heads compete, each eviction of a layer needs three, for any length."""
    for results in processes[0]:
        collectives = results["collectives"]
        for name in ("capkv/equal", "criticalkv/equal", "random/equal", "capkv/pyramid"):
            assert collectives[name] == 0
        # A new cache takes the profile of the first process: its length, and its content.
        assert collectives["capkv/profile"] == 2
        # An average over all heads needs two for each eviction of a layer: for its width, and for itself.
        evictions = collectives["tova/equal"] // 2
        assert evictions > 0
        assert collectives["capkv/adakv"] == 3 * evictions
        assert 3 * evictions <= collectives["capkv/marginal"] <= 4 * evictions


def test_profile_and_fingerprint_equal_those_of_one_process(model, processes):
    expected = torch.tensor(calibrate(model[0], tokens=64).attention)
    for results in processes[0]:
        torch.testing.assert_close(torch.tensor(results["profile"]), expected, atol=1e-5, rtol=1e-3)
        assert results["fingerprint"] == fingerprint(model[0])


def test_each_process_saves_its_heads(model, processes):
    single, (results, out) = model[0], processes
    assert [each["saved"] for each in results] == [
        {"file": f"cache-{rank}-of-2.safetensors", "same answer": True} for rank in (1, 2)
    ]
    message = r"model must be split as when the cache in .* was saved \(process 2 of 2\), got one process"
    with pytest.raises(ValueError, match=message):
        CompressedCache.load(out / "cache-2-of-2.safetensors", single)


def test_topk_masks_of_two_processes(processes):
    assert [results["selection"] for results in processes[0]] == [True, True]


def test_topk_masks_of_one_process():
    values = [torch.tensor([3.0, float("-inf"), 5.0, 4.0]), torch.tensor([1.0, 2.0])]
    masks = topk_masks(values, [2, 5])
    assert [mask.tolist() for mask in masks] == [[False, False, True, True], [True, True]]


def test_heads_must_be_split_evenly_or_not_at_all():
    sharding = Sharding(None, rank=1, world_size=2, num_key_value_heads=8)
    assert [sharding.is_split(heads) for heads in (8, 4)] == [False, True]
    with pytest.raises(ValueError, match="process 1 of 2 must be all 8 or 8/2 of them, got 3"):
        sharding.is_split(3)
    assert sharding.local_part(torch.arange(8), 0).tolist() == [4, 5, 6, 7]


def test_output_projection_that_does_not_fit_the_heads_is_rejected():
    weight = torch.zeros(5, 4)
    assert local_columns(weight, 4) is weight
    with pytest.raises(ValueError, match=r"output projection must have 8 columns, .*, got 4:"):
        local_columns(weight, 8)


def test_model_in_one_process_is_not_sharded():
    assert Sharding.from_model(build("llama")) is None


@pytest.fixture(scope="module")
def spread(model, tmp_path_factory):
    """The model with accelerate's hooks on every layer, and the weights of one layer on disk."""
    device_map = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    folder = tmp_path_factory.mktemp("offload")
    options = {"dtype": torch.float32, "device_map": device_map, "offload_folder": folder}
    return AutoModelForCausalLM.from_pretrained(model[1], **options)


@pytest.mark.parametrize(("policy", "allocation"), CASES)
def test_a_device_map_changes_nothing(model, spread, policy, allocation):
    assert run(spread, policy, allocation) == run(model[0], policy, allocation)


def test_cache_of_a_spread_model_can_be_loaded_for_the_model_in_memory(model, spread, tmp_path):
    """Offloaded weights give the same fingerprint, and entries are loaded to the device of their layer."""
    single = model[0]
    cache = CompressedCache(spread, "capkv", 18, **SETTINGS)
    answer(spread, inputs(), cache, 4)
    cache.save(spread, tmp_path / "cache.safetensors")
    for each in (single, spread):
        loaded = CompressedCache.load(tmp_path / "cache.safetensors", each)
        assert {layer.storage.keys.device.type for layer in loaded.compressed_layers} == {"cpu"}
        # Spare slots are not saved.
        assert replace(loaded.report(), bytes_index=0) == replace(cache.report(), bytes_index=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("allocation", ["equal", "marginal"])
def test_layers_accept_copies_of_their_inputs(attention, allocation):
    """A layer on another device gets copies, which lack the attributes that the mask function sets on a mask."""

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
        batch = left_padded([prompt(61), prompt(20, seed=2)])  # the second row has only padding in the first chunk
        with torch.no_grad():
            out = network.generate(
                **batch, past_key_values=cache, prefill_chunk_size=20, max_new_tokens=8, do_sample=False
            )
        found.append((out.tolist(), [cache.kept_positions(layer.index).tolist() for layer in cache.compressed_layers]))
    assert found[0] == found[1]
