"""Runs caches on a pretended GPU and on the CPU; prints a JSON line for each: what differs, and where it waited."""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from suffice.kv import CompressedCache, policies
from tests.kv.tiny import answer, build, left_padded, prompt
from tests.pretended.device import LAUNCHED, NAME, WAITS

KERNELS = os.environ.get("TRITON_INTERPRET") == "1"
OPTIONS = (
    {"allocation": "pooled"},
    {"allocation": "marginal"},
    {"allocation": "pyramid"},
    {"evict": "always", "interval": 3},
    {"evict": "always", "interval": 3, "positions": "compact"},
    {"evict": "always", "allocation": "marginal", "interval": 3},
)


def cases():
    """Model, its attention, policy and options; heads of dimension 16 for kernels, which take no smaller ones."""
    if KERNELS:
        yield from (("qwen3", "sdpa", "capkv-profile", own) for own in ({}, *OPTIONS))
        yield from (("qwen3", "sdpa", "capkv", own) for own in ({}, {"evict": "always", "interval": 3}))
        yield "qwen3", "sdpa", "h2o", {}
        return
    for name in policies():
        yield "llama", "sdpa", name, {}
    for own in OPTIONS:
        yield "qwen3", "sdpa", "capkv-profile", own
    for family in ("llama", "qwen2", "phi3", "gemma3"):
        yield family, "eager", "capkv-profile", {}


def compare(family, attention, name, options):
    """Answer two padded prompts on both devices."""
    model = build(family, attention)
    inputs = left_padded([prompt(17), prompt(29)])
    cpu = CompressedCache(model, name, 0.4, **options)
    expected = answer(model, inputs, cpu)
    model.to(NAME)
    LAUNCHED.clear()
    cache = CompressedCache(model, name, 0.4, **options)
    found = answer(model, {key: x.to(NAME) for key, x in inputs.items()}, cache)
    return {
        "same": torch.equal(found.cpu(), expected) and same_report(cache, cpu),
        "waits": waits(model, name, options),
        "launched": sorted(set(LAUNCHED)),
    }


def same_report(one, other):
    """Whether two caches hold as much, up to the rounding of capacities."""
    pairs = zip(one.report().heads, other.report().heads, strict=True)
    return all(
        (a.tokens_kept, a.bytes_kept) == (b.tokens_kept, b.bytes_kept)
        and (a.capacity_retained is None or abs(a.capacity_retained - b.capacity_retained) < 1e-4)
        for a, b in pairs
    )


def waits(model, name, options):
    """Where a cache waits while it is made, in a prefill with padding or without, and in five steps; layers."""
    found = {}
    WAITS.clear()
    cache = CompressedCache(model, name, 0.4, **options)
    found["made"] = list(WAITS)
    with torch.no_grad():
        for part, ids in (("prefill", prompt(40)), ("steps", None)):
            WAITS.clear()
            for one in [ids] if ids is not None else prompt(5).split(1, dim=1):
                model(one.to(NAME), past_key_values=cache)
            found[part] = list(WAITS)
        WAITS.clear()
        padded = {key: x.to(NAME) for key, x in left_padded([prompt(17), prompt(29)]).items()}
        model(**padded, past_key_values=CompressedCache(model, name, 0.4, **options))
        found["padded"] = list(WAITS)
    return found | {"layers": len(cache.compressed_layers)}


def declined():
    """Values that no kernel can hold are scored all the same."""
    found = []
    for device in ("cpu", NAME):
        model = build("qwen3").to(device)
        model.model.layers[1].self_attn.v_proj.weight.data.zero_()
        LAUNCHED.clear()
        cache = CompressedCache(model, "capkv-profile", 0.4)
        found.append(answer(model, {"input_ids": prompt(40).to(device)}, cache).cpu())
    return {"same": torch.equal(*found), "launched": sorted(set(LAUNCHED))}


def refused():
    """Keys that are not finite are refused, whatever computes the scores."""
    model = build("qwen3").to(NAME)
    told = []
    for bad in (float("nan"), float("inf")):
        model.model.layers[1].self_attn.k_norm.weight.data[0] = bad
        cache = CompressedCache(model, "capkv", 0.4)
        try:
            with torch.no_grad():
                model(prompt(40).to(NAME), past_key_values=cache)
        except ValueError as error:
            told.append("NaN" in str(error) and cache.compressed_layers[1].storage is None)
    return {"same": told == [True, True]}


def life(folder):
    """A cache's copies, its file and beams give on the device what they give on the CPU."""
    found = {}
    path = folder / "cache.safetensors"
    for device in ("cpu", NAME):
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
        found[device] = (*logits, beams.cpu().float())
    pairs = zip(found["cpu"], found[NAME], strict=True)
    return {"same": all(torch.allclose(one, other, atol=1e-4) for one, other in pairs)}


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
    print(json.dumps({"case": ["values of zero"], **declined()}))
    print(json.dumps({"case": ["keys that are not finite"], **refused()}))
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"case": ["copies, a file, beams"], **life(Path(folder))}))
