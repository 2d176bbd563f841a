"""Runs caches on the CPU and on the fake GPU; prints a JSON line for each case: whether they agree, and the waits."""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from suffice.kv import CompressedCache, policies
from tests.fake_gpu.device import DEVICE, LAUNCHED, WAITS
from tests.kv.tiny import answer, build, left_padded, prompt

WITH_KERNELS = os.environ.get("TRITON_INTERPRET") == "1"
OPTIONS = (
    {"allocation": "adakv"},
    {"allocation": "marginal"},
    {"allocation": "pyramid"},
    {"evict": "always", "interval": 3},
    {"evict": "always", "interval": 3, "rerotate": True},
    {"evict": "always", "allocation": "marginal", "interval": 3},
)


def cases():
    """Yield model family, attention implementation, policy and options of the cache.

    Kernels need heads of at least 16 dimensions, which only `qwen3` has.
    """
    if WITH_KERNELS:
        yield from (("qwen3", "sdpa", "capkv-profile", options) for options in ({}, *OPTIONS))
        yield from (("qwen3", "sdpa", "capkv", options) for options in ({}, {"evict": "always", "interval": 3}))
        yield "qwen3", "sdpa", "h2o", {}
        return
    for name in policies(replay=False):
        yield "llama", "sdpa", name, {}
    for options in OPTIONS:
        yield "qwen3", "sdpa", "capkv-profile", options
    for family in ("llama", "qwen2", "phi3", "gemma3"):
        yield family, "eager", "capkv-profile", {}


def compare(family, attention, name, options):
    """Generate answers to two padded prompts on both devices."""
    model = build(family, attention)
    inputs = left_padded([prompt(17), prompt(29)])
    cpu_cache = CompressedCache(model, name, 0.4, **options)
    expected = answer(model, inputs, cpu_cache)
    model.to(DEVICE)
    LAUNCHED.clear()
    cache = CompressedCache(model, name, 0.4, **options)
    tokens = answer(model, {key: x.to(DEVICE) for key, x in inputs.items()}, cache)
    return {
        "equal": torch.equal(tokens.cpu(), expected) and reports_agree(cache, cpu_cache),
        "waits": record_waits(model, name, options),
        "launched": sorted(set(LAUNCHED)),
    }


def reports_agree(one, other):
    """Whether the reports of two caches are equal, up to the rounding of capacities."""
    pairs = zip(one.report().heads, other.report().heads, strict=True)
    return all(
        (a.tokens_kept, a.bytes_kept) == (b.tokens_kept, b.bytes_kept)
        and (a.capacity_retained is None or abs(a.capacity_retained - b.capacity_retained) < 1e-4)
        for a, b in pairs
    )


def record_waits(model, name, options):
    """Return where a new cache, a prefill and five decoding steps wait, and the number of layers."""
    waits = {}
    WAITS.clear()
    cache = CompressedCache(model, name, 0.4, **options)
    waits["new cache"] = list(WAITS)
    with torch.no_grad():
        for stage, inputs in (("prefill", [prompt(40)]), ("decoding", prompt(5).split(1, dim=1))):
            WAITS.clear()
            for ids in inputs:
                model(ids.to(DEVICE), past_key_values=cache)
            waits[stage] = list(WAITS)
    return waits | {"layers": len(cache.compressed_layers)}


def score_zero_values():
    """Values of zero, for which the kernels are not precise enough, are scored by torch."""
    answers = []
    for device in ("cpu", DEVICE):
        model = build("qwen3").to(device)
        model.model.layers[1].self_attn.v_proj.weight.data.zero_()
        LAUNCHED.clear()
        cache = CompressedCache(model, "capkv-profile", 0.4)
        answers.append(answer(model, {"input_ids": prompt(40).to(device)}, cache).cpu())
    return {"equal": torch.equal(*answers), "launched": sorted(set(LAUNCHED))}


def reject_keys_that_are_not_finite():
    """Keys that are not finite are rejected, with and without kernels."""
    model = build("qwen3").to(DEVICE)
    rejected = []
    for bad in (float("nan"), float("inf")):
        model.model.layers[1].self_attn.k_norm.weight.data[0] = bad
        cache = CompressedCache(model, "capkv", 0.4)
        try:
            with torch.no_grad():
                model(prompt(40).to(DEVICE), past_key_values=cache)
        except ValueError as error:
            rejected.append("NaN" in str(error) and cache.compressed_layers[1].storage is None)
    return {"equal": rejected == [True, True]}


def continue_caches(folder):
    """Copies, a saved cache and beam search give the same on both devices."""
    results = {}
    path = folder / "cache.safetensors"
    for device in ("cpu", DEVICE):
        model = build("qwen3").to(device)
        ids = prompt(40).to(device)
        cache = CompressedCache(model, "capkv-profile", 0.4)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        if device == "cpu":
            cache.save(model, path)
        rows = cache.copy()
        rows.batch_repeat_interleave(2)
        with torch.no_grad():
            logits = [
                model(ids[:, :1].expand(count, -1), past_key_values=one).logits.cpu()
                for one, count in ((cache, 1), (rows, 2), (CompressedCache.load(path, model), 1))
            ]
        beams = model.generate(ids, past_key_values=CompressedCache(model, "h2o", 0.4), num_beams=3, max_new_tokens=5)
        results[device] = (*logits, beams.cpu().float())
    pairs = zip(results["cpu"], results[DEVICE], strict=True)
    return {"equal": all(torch.allclose(one, other, atol=1e-4) for one, other in pairs)}


def quantize_entries():
    """Quantized caches give the same on both devices. Prompts are longer than the window that is not quantized."""
    results, model = {}, build("qwen3")
    ids = torch.cat((prompt(60), prompt(31)), dim=1)
    for device in ("cpu", DEVICE):
        model.to(device)
        LAUNCHED.clear()
        cache = CompressedCache(model, "capkv", 70, allocation="adakv", bits=(5, 4))
        with torch.no_grad():
            parts = ids.to(device).split((85, 1, 1, 4), dim=1)
            logits = [model(part, past_key_values=cache).logits[:, -1].cpu() for part in parts]
        results[device] = torch.cat(logits)
    return {"equal": torch.allclose(*results.values(), atol=1e-4), "launched": sorted(set(LAUNCHED))}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for case in cases():
        try:
            print(json.dumps({"case": case, **compare(*case)}), flush=True)
        except Exception as error:
            print(json.dumps({"case": case, "error": f"{type(error).__name__}: {error}"}), flush=True)
            if "--raise" in sys.argv:
                raise
    print(json.dumps({"case": ["values of zero"], **score_zero_values()}))
    print(json.dumps({"case": ["keys that are not finite"], **reject_keys_that_are_not_finite()}))
    print(json.dumps({"case": ["quantized entries"], **quantize_entries()}))
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"case": ["copies, a saved cache, beams"], **continue_caches(Path(folder))}))
