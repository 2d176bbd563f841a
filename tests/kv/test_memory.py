"""Caches whose bytes are limited: `CompressedCache(model, memory=...)`."""

import contextlib
import dataclasses
import functools
import math
import os
import random
import re
import sys

import pytest
import torch
from torch import nn

from suffice.kv import DEFAULT_POLICY, CompressedCache, Policy
from suffice.kv.budget.memory_limit import parse_memory
from suffice.kv.budget.protection import Protection
from suffice.kv.cache.layer_report import report_layer
from suffice.kv.cache.memory import LayerShape, MemoryBudget
from suffice.kv.hf.layers import compressed_layers
from suffice.kv.policy.registry import allocations, get_policy, policies
from suffice.kv.policy.weights import ExpectedAttention, MeanQuery
from tests.kv.families import families
from tests.kv.family_cases import get_case
from tests.kv.test_holes import _extend, _read
from tests.kv.test_quantized import distance, generate, read
from tests.kv.test_quantized_attention import text
from tests.kv.tiny import build, left_padded, tiny

NUM_CONFIGURATIONS = int(os.environ.get("SUFFICE_MEMORY_CONFIGURATIONS", "40"))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# ---- The limit -------------------------------------------------------------------------------------------------------


@functools.cache
def model_in(family, dtype):
    return tiny(family) if dtype == torch.float32 else build(family).to(dtype)


def tensors_in(x, found):
    """Collect all tensors that an object refers to, by the memory that they use."""
    if isinstance(x, torch.Tensor):
        memory = x.untyped_storage()  # empty tensors of a file have the address of another tensor
        found[memory.data_ptr()] = max(memory.nbytes(), found.get(memory.data_ptr(), 0))
    elif isinstance(x, (list, tuple, set)):
        for part in x:
            tensors_in(part, found)
    elif isinstance(x, dict):
        tensors_in(list(x.values()), found)
    elif not isinstance(x, nn.Module) and type(x).__module__.startswith("suffice.kv"):
        tensors_in(dict(vars(x)), found)
    return found


def held_bytes(cache):
    """Return the bytes of all tensors that the compressed layers hold between two passes."""
    found = {}
    for layer in cache.compressed_layers:
        state = {field.name: getattr(layer.state, field.name) for field in dataclasses.fields(layer.state)}
        tensors_in(state, found)
    return sum(found.values())


def full_bytes(cache, model, rows, width, window=None):
    """Return the bytes of the same layers without compression."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tokens = rows * (width if window is None else min(width, window - 1))
    entry = 2 * head_dim * config.num_key_value_heads * model.dtype.itemsize
    return len(compressed_layers(model)) * tokens * entry


def check_limit(cache, model, rows, width, memory):
    report = cache.report()
    held = report.bytes_kept + report.bytes_index
    others = sum(
        x.nbytes
        for layer in cache.layers
        if layer not in cache.compressed_layers
        for x in (layer.keys, layer.values)
        if x is not None
    )
    limit = memory if isinstance(memory, int) else int(memory * full_bytes(cache, model, rows, width) + 1e-3)
    assert held - others <= limit
    assert report.bytes_limit - others <= limit
    assert held_bytes(cache) <= held - others


@pytest.mark.parametrize("seed", range(NUM_CONFIGURATIONS))
def test_limit_is_never_exceeded(seed):
    """Random policies, limits, batches, prompts in chunks, generated and masked tokens."""
    draw = random.Random(seed)
    model = model_in(draw.choice(["llama", "qwen3", "gemma3"]), draw.choice([torch.float32, torch.bfloat16]))
    policy = draw.choice(sorted(policies(replay=False)))
    rows = [draw.randint(20, 240) for _ in range(draw.choice([1, 1, 2, 3]))]
    full = full_bytes(None, model, len(rows), max(rows))
    fraction = min(1.0, 2 ** draw.uniform(-5, 0.3))
    memory = fraction if draw.random() < 0.6 else max(1, int(fraction * full))
    options = {
        "memory": memory,
        "evict": draw.choice([None, None, "always", "prefill"]),
        "interval": draw.choice([None, None, 1, 7, 40]),
        "bits": draw.choice([None, None, 2, 4, (5, 3), 8]),
        "window": draw.choice([None, None, 0, 10]),
        "sinks": draw.choice([None, None, 0, 6]),
    }
    if draw.random() < 0.3:
        options["allocation"] = draw.choice(sorted(allocations()))
    cache = CompressedCache(model, policy, **options)
    texts = [text(length, seed=seed + row) for row, length in enumerate(rows)]
    batch = (
        left_padded(texts) if len(rows) > 1 else {"input_ids": texts[0], "attention_mask": torch.ones_like(texts[0])}
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    chunk = draw.choice([ids.shape[1], ids.shape[1], 50])
    if options["evict"] == "prefill":
        chunk = ids.shape[1]
    try:
        for start in range(0, ids.shape[1], chunk):
            end = min(start + chunk, ids.shape[1])
            if len(rows) == 1:
                model(ids[:, start:end], past_key_values=cache)
            else:
                _read(model, cache, ids[:, start:end], mask[:, :end])
            check_limit(cache, model, len(rows), end, memory)
        if options["evict"] == "prefill":
            return
        has_masks = draw.random() < 0.2
        for step in range(draw.choice([0, 10, 90])):
            new = torch.randint(2, 97, (len(rows), draw.choice([1, 1, 1, 1, 1, 1, 5])))
            is_token = torch.ones_like(new)
            if has_masks and len(rows) > 1 and step % 4 == 1:
                is_token[0] = 0
            mask = _extend(mask, is_token)
            if has_masks:
                _read(model, cache, new, mask)
            else:
                model(new, past_key_values=cache, attention_mask=mask)
            check_limit(cache, model, len(rows), mask.shape[1], memory)
    except ValueError as error:
        assert "memory must be" in str(error), error  # noqa: PT017


def test_bytes_that_hold_all_entries_quantize_nothing():
    model, tokens = tiny("llama"), text(150)
    cache, full = CompressedCache(model, "capkv", memory="1MB"), CompressedCache(model, "full")
    for cached in (cache, full):
        model(tokens[:, :100], past_key_values=cached)
    for step in range(100, 150):
        got, wanted = (model(tokens[:, step : step + 1], past_key_values=cached).logits for cached in (cache, full))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert cache.report().tokens_kept == 150
    assert all(head.key_error is None for head in cache.report().heads)


def test_growing_text_is_quantized_when_it_no_longer_fits():
    """A limit in bytes keeps entries as they are, then quantizes older ones, then evicts."""
    model, tokens = tiny("llama"), text(500)
    full = full_bytes(None, model, 1, 100)
    cache = CompressedCache(model, "capkv", memory=int(1.1 * full))
    phases = []
    for start in range(0, 500, 50):
        model(tokens[:, start : start + 50], past_key_values=cache)
        report = cache.report()
        phases.append("quantized" if report.heads[0].key_error is not None else "exact")
        if report.tokens_kept < start + 50:
            phases[-1] = "evicted"
    assert phases[0] == "exact"
    assert phases[-1] == "evicted"
    assert phases == sorted(phases, key=["exact", "quantized", "evicted"].index)


@pytest.mark.parametrize(
    ("memory", "bits", "share_kept"),
    [(1.0, (8, 8), 1), (0.4, (5, 4), 1), (0.25, (5, 3), 0.67), (0.1, (4, 3), 0.25), (0.06, (3, 2), 0.2)],
)
def test_bits_follow_from_the_memory(memory, bits, share_kept):
    """In bfloat16 with 16-bit numbers, as on a GPU; the heads are as large as those of common models."""
    model = model_with_large_heads()
    cache = CompressedCache(model, memory=memory)
    model(text(1000), past_key_values=cache)
    report = cache.report()
    assert report.heads[0].bits == bits
    assert share_kept <= report.tokens_kept / 1000 <= min(1, 1.5 * share_kept)
    assert report.bytes_kept + report.bytes_index <= memory * report.bytes_full
    assert f" tokens ({','.join(map(str, bits)) if bits != (8, 8) else 8} bits), " in str(report)
    assert f"of {report.bytes_limit / 1e6:.1f} MB allowed" in str(report)


@functools.cache
def model_with_large_heads():
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return build("llama", **shape, head_dim=64, max_position_embeddings=2048).to(torch.bfloat16)


def test_prompts_alone_may_take_all_of_the_memory():
    """With evict='prefill', no room is left for new tokens, so more entries are kept."""
    model = model_with_large_heads()
    kept = []
    for evict in ("always", "prefill"):
        cache = CompressedCache(model, memory=0.15, evict=evict)
        model(text(500), past_key_values=cache)
        assert cache.report().bytes_kept + cache.report().bytes_index <= 0.15 * cache.report().bytes_full
        kept.append(cache.report().tokens_kept)
    assert kept[1] > 1.1 * kept[0]


def test_more_rows_take_the_memory_of_others():
    """A limit in bytes is that of all rows: after rows are repeated, the next pass evicts."""
    model, tokens = tiny("llama"), text(300)
    memory = full_bytes(None, model, 1, 150)
    cache = CompressedCache(model, "capkv", memory=memory)
    model(tokens[:, :200], past_key_values=cache)
    before = cache.report().tokens_kept
    cache.batch_repeat_interleave(4)
    assert memory - 3 * 4 <= cache.report().bytes_limit <= memory
    model(tokens[:, 200:210].expand(4, -1), past_key_values=cache)
    check_limit(cache, model, 4, 210, memory)
    assert cache.report().tokens_kept / 4 < before


def test_saved_caches_keep_their_limit(tmp_path):
    model = tiny("llama")
    cache = CompressedCache(model, "capkv", memory="60kB", interval=5)
    model(text(200), past_key_values=cache)
    loaded = CompressedCache.load(cache.save(model, tmp_path / "x"), model)
    assert loaded.report() == cache.report()
    assert torch.equal(generate(model, loaded, 60, 1), generate(model, cache, 60, 1))
    check_limit(loaded, model, 1, 259, 60_000)
    assert "memory=60000" in repr(loaded)


def supported_case(family):
    """Return the case of a family, or skip the test if this version of transformers does not support it."""
    if family not in families():
        pytest.skip("needs a newer transformers")
    case = get_case(family)
    try:
        CompressedCache(case.model, "capkv")
    except ValueError as error:  # test_families.py checks that the newest transformers is supported
        pytest.skip(f"needs a newer transformers: {error}")
    return case


@pytest.mark.parametrize("family", ["gpt2", "deepseek_v3", "mistral", "gemma3n_text", "lfm2"])
def test_limit_holds_for_models_of_other_kinds(family):
    """Queries, keys and values in one tensor; latents; sliding windows; layers that share entries; convolutions."""
    case = supported_case(family)
    cache = CompressedCache(case.model, "capkv", memory=0.9)
    for step in range(20):
        case.forward(case.prompt(1 if step else 160, seed=step), cache)
        report, layers = cache.report(), [report_layer(layer) for layer in cache.compressed_layers]
        others = report.bytes_limit - sum(layer.bytes_limit for layer in layers)
        held = report.bytes_kept + report.bytes_index - others
        assert held <= 0.9 * sum(layer.bytes_full for layer in layers) + len(layers)
        assert held_bytes(cache) <= held


def test_reported_bytes_are_exact_after_tokens_were_removed():
    """What is left of queries and positions does not keep the memory of the removed ones."""
    model = tiny("llama")
    cache = CompressedCache(model, memory=0.5)
    model(text(150, rows=2), past_key_values=cache)
    generate(model, cache, 5)
    for count in (0, 3, 2):
        cache.crop(-count)
        report = cache.report()
        assert held_bytes(cache) == report.bytes_kept + report.bytes_index


@pytest.mark.parametrize("options", [{}, {"repair": True}, {"evict": "always", "interval": 4}])
@pytest.mark.parametrize("policy", ["capkv-profile", "keydiff"])
def test_reported_bytes_are_exact_while_tokens_are_generated(policy, options):
    model = tiny("llama")
    cache = CompressedCache(model, policy, 0.3, allocation="adakv", **options)
    model(text(60, rows=2), past_key_values=cache)
    for _ in range(9):
        assert held_bytes(cache) == cache.report().bytes
        generate(model, cache, 1)


def test_means_of_latents_count():
    """Policies score latents with queries that are longer than those of the model, whose moments they store."""
    case = supported_case("deepseek_v3")
    weights = MeanQuery(half_life=20.0) + ExpectedAttention(future=0, diagonal=True, half_life=5.0)
    memory = 19_500
    cache = CompressedCache(case.model, Policy(weights=weights), memory=memory, interval=5)
    for step in range(12):
        case.forward(case.prompt(1 if step else 90, seed=step), cache)
        assert held_bytes(cache) == cache.report().bytes_kept + cache.report().bytes_index <= memory


def test_only_some_of_the_first_tokens_are_certainly_exact():
    """Of the protected first tokens, those after the first four are quantized, and take the same bytes as others."""
    plans = [
        MemoryBudget(100_000, get_policy("capkv"), Protection(sinks, 0), evict_always=True).plan(
            LayerShape(2, 64, 64, 2, 512, 256), 4000, 1, (4, 4)
        )
        for sinks in (4, 30)
    ]
    assert plans[0] == plans[1]
    assert plans[0].num_entries < 4000


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (0.1, 0.1),
        (1.0, 1.0),
        (7, 7),
        ("2GiB", 2 << 30),
        ("1.5 MB", 1_500_000),
        ("300", 300),
        ("4kib", 4096),
        pytest.param("1" * 400, sys.maxsize, id="long text"),
        pytest.param(10**400, sys.maxsize, id="large number"),
    ],
)
def test_limits_are_fractions_or_bytes(text, wanted):
    parsed = parse_memory(text)
    assert (type(parsed), parsed) == (type(wanted), wanted)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"memory": 0.0}, ValueError, "memory must be a fraction .*, got 0.0"),
        ({"memory": 1.5}, ValueError, "memory must be a fraction .*, got 1.5"),
        ({"memory": float("nan")}, ValueError, "memory must be a fraction .*, got nan"),
        ({"memory": -3}, ValueError, "memory must be a fraction .*, got -3"),
        ({"memory": True}, TypeError, "memory must be a fraction .*, got True"),
        ({"memory": [1]}, TypeError, r"memory must be a fraction .*, got \[1\]"),
        ({"memory": "2 gigs"}, ValueError, "memory must be a fraction .*, got '2 gigs'"),
        ({"memory": "-2GiB"}, ValueError, "memory must be a fraction .*, got '-2GiB'"),
        ({"memory": "0.5"}, ValueError, "memory must be a fraction .*, got '0.5'"),
        ({"memory": "1.0"}, ValueError, "memory must be a fraction .*, got '1.0'"),
        ({"memory": 0.1, "budget": 0.5}, ValueError, "budget must be None with memory=0.1, .*, got 0.5"),
        ({"memory": 0.1, "rerotate": True}, ValueError, "memory must be None with rerotate=True"),
        ({"memory": 0.1, "bits": 6}, ValueError, "bits must be 2, 3, 4, 5 or 8, got 6"),
    ],
)
def test_invalid_limits_are_rejected(settings, error, message):
    with pytest.raises(error, match=message):
        CompressedCache(tiny("llama"), "capkv", **settings)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (0.01, r"memory must be at least 0\.\d+ for the entries that always stay of a text of 150 tokens, got 0.01"),
        (2000, r"memory must be at least \d+ bytes for the entries that always stay, got 2000 bytes"),
    ],
)
def test_too_little_memory_changes_nothing(memory, message):
    model = tiny("llama")
    cache = CompressedCache(model, "capkv", memory=memory)
    with pytest.raises(ValueError, match=message):
        model(text(150), past_key_values=cache)
    assert cache.get_seq_length() == 0


def test_short_texts_need_bytes():
    cache = CompressedCache(tiny("llama"), "capkv", memory=0.5)
    with pytest.raises(ValueError, match=r"memory must be a number of bytes, .* only 5 tokens, got 0\.5"):
        tiny("llama")(text(5), past_key_values=cache)


def test_error_says_that_the_interval_needs_memory():
    cache = CompressedCache(tiny("llama"), "capkv", memory=0.5, interval=1000)
    with pytest.raises(ValueError, match=r"always stay and 1000 new tokens \(interval\) take more bytes"):
        tiny("llama")(text(200), past_key_values=cache)


@pytest.mark.parametrize("seed", range(NUM_CONFIGURATIONS))
def test_limits_that_errors_name_are_enough(seed):
    draw = random.Random(seed)
    model = model_in("llama", draw.choice([torch.float32, torch.bfloat16]))
    options = {
        "policy": draw.choice(["capkv", "capkv-profile", "h2o", "full", "expected-attention"]),
        "evict": draw.choice(["always", "prefill"]),
        "interval": draw.choice([None, None, 20]),
        "bits": draw.choice([None, None, 2, (5, 4)]),
        "sinks": draw.choice([None, 0, 10]),
        "window": draw.choice([None, 0, 30]),
    }
    tokens = text(draw.choice([3, 9, 30, 60, 150, 400])).expand(draw.choice([1, 3]), -1)
    memory = draw.choice([1e-3, 0.1, 0.3, 1, 1000])
    with contextlib.suppress(ValueError):
        model(tokens, past_key_values=CompressedCache(model, memory=memory, **options))
        return
    with pytest.raises(ValueError, match="memory must be") as error:
        model(tokens, past_key_values=CompressedCache(model, memory=memory, **options))
    named = re.findall(r"at least ([\d.]*\d)", str(error.value))
    assert named
    for number in named:
        limit = float(number) if "." in number else int(number)
        cache = CompressedCache(model, memory=limit, **options)
        model(tokens, past_key_values=cache)
        assert cache.report().bytes_kept + cache.report().bytes_index <= (cache.report().bytes_limit or math.inf)


def test_policies_that_evict_nothing_get_the_bits_with_which_all_entries_fit():
    """With 5 and 3 bits, more than a third of the entries would fit, but not all of them."""
    model = model_with_large_heads()
    cache = CompressedCache(model, "full", memory=0.3)
    model(text(1000), past_key_values=cache)
    assert cache.report().heads[0].bits == (4, 3)
    assert cache.report().tokens_kept == 1000


def test_too_little_memory_for_a_policy_that_evicts_nothing():
    cache = CompressedCache(tiny("llama"), "full", memory=0.2)
    with pytest.raises(ValueError, match=r"for all entries \(this policy evicts none\) of a text of 150 tokens"):
        tiny("llama")(text(150), past_key_values=cache)


def test_cache_works_after_an_error():
    """Nine rows are too many for the bytes, but one row still works."""
    model = tiny("llama")
    cache = CompressedCache(model, "capkv", memory=full_bytes(None, model, 1, 30))
    model(text(60), past_key_values=cache)
    wanted = read(model, cache.copy(), text(5, seed=3))
    cache.batch_repeat_interleave(9)
    with pytest.raises(ValueError, match="memory must be at least"):
        model(text(5, seed=3).expand(9, -1), past_key_values=cache)
    cache.batch_select_indices(torch.tensor([0]))
    assert distance(read(model, cache, text(5, seed=3)), wanted) < 1e-5


@pytest.mark.parametrize("family", ["gemma3_text", "lfm2"])
def test_too_little_memory_for_later_tokens_changes_nothing(family):
    """Sliding windows and convolutions of earlier layers cannot be undone, so the error comes before the first one."""
    case = supported_case(family)
    cache = CompressedCache(case.model, "full", memory=22_000)
    case.forward(case.prompt(80), cache)
    expected = cache.copy()
    with pytest.raises(ValueError, match="memory must be at least"):
        case.forward(case.prompt(100), cache)
    got, wanted = (case.forward(case.prompt(5), each).logits for each in (cache, expected))
    assert torch.equal(got, wanted)


def test_layers_of_different_sizes_are_checked_together():
    model = build("llama")
    attention = model.model.layers[2].self_attn  # it gets as many KV heads as query heads
    for name in ("k_proj", "v_proj"):
        torch.manual_seed(0)
        setattr(attention, name, nn.Linear(model.config.hidden_size, 4 * attention.head_dim, bias=False))
    attention.num_key_value_groups = 1
    cache = CompressedCache(model, "capkv", memory=30_000)
    model(text(160), past_key_values=cache)
    single = cache.copy()
    cache.batch_repeat_interleave(4)  # the first two layers have enough memory for four rows
    with pytest.raises(ValueError, match="memory must be at least"):
        model(text(20).expand(4, -1), past_key_values=cache)
    cache.batch_select_indices(torch.tensor([0]))
    assert distance(read(model, cache, text(5)), read(model, single, text(5))) < 1e-5


@pytest.mark.parametrize("policy", [DEFAULT_POLICY, "snapkv", "h2o"])
def test_a_limit_far_above_the_text_reserves_nothing(policy):
    """Queries and buffers grow with the text, not with the limit."""
    model = tiny("llama")
    cache = CompressedCache(model, policy, memory="2GiB")
    for new in (100, *[1] * 20):
        model(text(new, seed=new), past_key_values=cache)
    for layer in cache.compressed_layers:
        assert len(layer.state.queries) <= 120
        buffers = sum(x.untyped_storage().nbytes() for x in layer.storage.buffers)
        needed = 120 * layer.storage.bytes_per_entry * layer.storage.num_heads
        assert needed <= buffers <= (1 + 1 / 16) * needed + 500  # spare slots, and means and scales of keys
