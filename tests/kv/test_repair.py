"""Repair of kept entries: numbers that are added to the logits, and refitted values."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import EncoderDecoderCache
from typer.testing import CliRunner

import suffice.kv
from suffice.cli import app
from suffice.kv import BatchedCaches, CacheConfig, CompressedCache, CrossAttentionCache, prefill
from suffice.kv.attention.call import AttentionCall
from suffice.kv.backend.torch_backend import TORCH_BACKEND
from suffice.kv.cache.settings import STORAGES
from suffice.kv.hf.layers import caches_latents, compressed_layers
from suffice.kv.policy import repair as repair_module
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.layer_context import EntryPositions
from suffice.kv.policy.repair import repair_entries
from suffice.kv.storage.base import LOGIT_BIAS, Entries
from suffice.kv.storage.quantization import Quantization
from suffice.kv.storage.quantized import QuantizedStorage
from suffice.kv.storage.ragged import RaggedStorage
from suffice.kv.storage.uniform import UniformStorage
from tests.kv.families import build as build_family
from tests.kv.test_memory import supported_case
from tests.kv.tiny import TOKENS, build, left_padded, prompt, tiny, tokenizer

# ---- Attention with a bias -------------------------------------------------------------------------------------------

BATCH, KV_HEADS, GROUPS, WIDTH, DIM = 2, 2, 3, 70, 16


def entries_with_bias():
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(BATCH, KV_HEADS, WIDTH, DIM, generator=generator) for _ in range(2))
    bias = 2 * torch.randn(BATCH, KV_HEADS, WIDTH, generator=generator)
    positions = torch.arange(WIDTH).expand(BATCH, KV_HEADS, -1)
    return Entries(keys, values, positions, columns={LOGIT_BIAS: bias})


def make_storage(kind, entries, counts):
    """Store the last entries of each head."""
    slots = torch.arange(WIDTH)
    kept = slots.where(slots >= WIDTH - torch.tensor(counts)[..., None], -1)
    if kind == "quantized":
        return QuantizedStorage.gather(entries, kept, Quantization(8, 8, window=8, block=4))
    return {"uniform": UniformStorage, "ragged": RaggedStorage}[kind].gather(entries, kept)


def dense_attention(query, entries, new, softcap, sinks):
    """Compute the attention of `new` tokens over entries in float64, with their bias."""
    logits = torch.einsum("bkgqd,bknd->bkgqn", query.double().unflatten(1, (KV_HEADS, -1)), entries.keys.double())
    logits = logits * DIM**-0.5
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    logits = logits + entries.columns[LOGIT_BIAS].double()[:, :, None, None]
    readable = (entries.positions >= 0)[:, :, None, None].repeat(1, 1, 1, new, 1)
    readable[..., -new:] &= torch.ones(new, new, dtype=torch.bool).tril()
    logits = logits.masked_fill(~readable, -torch.inf)
    if sinks is not None:
        own = sinks.double().view(1, KV_HEADS, GROUPS, 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat((logits, own), dim=-1)
    weights = logits.softmax(-1)[..., : entries.keys.shape[2]]
    return (weights @ entries.values.double()[:, :, None]).flatten(1, 2).transpose(1, 2)


@pytest.mark.parametrize("kind", list(STORAGES))
@pytest.mark.parametrize("counts", [[[40, 40], [40, 40]], [[60, 21], [35, 50]], [[30, 9], [30, 9]]], ids=str)
@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks"])
def test_bias_is_added_to_the_logits(kind, counts, new, extra):
    if kind == "uniform":
        counts = [[max(row)] * 2 for row in counts]
    storage = make_storage(kind, entries_with_bias(), counts)
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(BATCH, KV_HEADS, new, DIM, generator=generator) for _ in range(2))
    query = torch.randn(BATCH, KV_HEADS * GROUPS, new, DIM, generator=generator)
    storage.append(key, value, torch.arange(WIDTH, WIDTH + new).expand(BATCH, -1))
    softcap = 1.5 if extra == "softcap" else None
    sinks = torch.randn(KV_HEADS * GROUPS, generator=generator) if extra == "sinks" else None
    options = {"softcap": softcap, "s_aux": sinks, "output_attentions": True}
    call = AttentionCall(torch.nn.Module(), query, key, value, None, None, options, implementation="eager")
    output, weights = storage.attend(call, TORCH_BACKEND)
    stored = storage.entries
    assert stored.columns[LOGIT_BIAS][..., -new:].eq(0).all()
    exact = dense_attention(query, stored, new, softcap, sinks)
    torch.testing.assert_close(output.double(), exact, atol=2e-5, rtol=2e-5)
    with_weights = weights.double() @ stored.values.double().repeat_interleave(GROUPS, 1)
    torch.testing.assert_close(with_weights.transpose(1, 2), exact, atol=2e-5, rtol=2e-5)


def test_statistics_include_the_bias():
    entries = entries_with_bias()
    query = torch.randn(BATCH, KV_HEADS * GROUPS, 6, DIM, generator=torch.Generator().manual_seed(1))
    bias = entries.columns[LOGIT_BIAS]
    stats = AttentionStats(query, entries.keys, entries.values, logit_bias=bias)
    weights = stats.attention_weights(slice(-6, None), WIDTH)
    output = (weights @ entries.values[:, :, None]).flatten(1, 2).transpose(1, 2)
    exact = dense_attention(query, entries, 6, None, None)
    torch.testing.assert_close(output.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.window_attention(6), weights.mean((2, 3)))


# ---- The fit ---------------------------------------------------------------------------------------------------------


def random_stats(num_entries=64, sinks=False, heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(1, 2 * heads, num_entries, DIM, generator=generator)
    keys, values = (torch.randn(1, heads, num_entries, DIM, generator=generator) for _ in range(2))
    sink_logits = 3 + torch.randn(2 * heads, generator=generator) if sinks else None
    # The queries come after all entries.
    positions = torch.arange(2 * num_entries).view(2, 1, -1)
    positions = EntryPositions(entries=positions[:1], queries=positions[1])
    return AttentionStats(queries, keys, values, positions=positions, sink_logits=sink_logits)


def every_second(num_entries, heads=2):
    return torch.arange(0, num_entries, 2).expand(1, heads, -1)


@pytest.mark.parametrize("sinks", [False, True])
def test_one_of_two_equal_entries_stands_for_both(sinks):
    stats = random_stats(sinks=sinks)
    for x in (stats.keys, stats.values):
        x[:, :, 1::2] = x[:, :, 0::2]
    repaired = repair_entries(stats, every_second(64))
    bias = repaired.logit_bias[..., 0::2]
    if sinks:  # without sinks, equal weights of all entries change nothing
        torch.testing.assert_close(bias, torch.full_like(bias, math.log(2)), atol=1e-3, rtol=0)
        assert (repaired.errors[..., 0] > 0.05).all()
    else:
        assert bias.eq(0).all()
    assert (repaired.errors[..., 1] < 1e-3).all()
    torch.testing.assert_close(repaired.values[:, :, 0::2], stats.values[:, :, 0::2], atol=1e-3, rtol=0)


def test_an_entry_that_stood_for_two_others_as_well_gets_three_times_the_weight(monkeypatch):
    monkeypatch.setattr(repair_module, "NUM_UPDATES", 100)
    monkeypatch.setattr(repair_module, "MAX_BIAS", 2.0)
    stats = random_stats(num_entries=40)
    for x in (stats.keys, stats.values):
        x[:, :, 21:23] = x[:, :, 20:21]
    kept = torch.tensor([i for i in range(40) if i not in (21, 22)]).expand(1, 2, -1)
    repaired = repair_entries(stats, kept)
    torch.testing.assert_close(repaired.logit_bias[..., 20], torch.full((1, 2), math.log(3)), atol=0.2, rtol=0)
    assert (repaired.errors[..., 1] < 0.2 * repaired.errors[..., 0]).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [4, 16, 60])
def test_held_out_error_never_grows(seed, count):
    stats = random_stats(seed=seed)
    kept = torch.arange(64 - count, 64).expand(1, 2, -1)
    repaired = repair_entries(stats, kept)
    before, after = repaired.errors.unbind(-1)
    is_kept = after < before
    assert (after <= before).all()
    assert (after[is_kept] <= (1 - repair_module.MARGIN) * before[is_kept] * (1 + 1e-5)).all()
    unchanged = ~is_kept
    assert torch.equal(repaired.values[unchanged], stats.values[unchanged])
    assert repaired.logit_bias[unchanged].eq(0).all()
    evicted = repaired.values[:, :, : 64 - count]
    assert torch.equal(evicted, stats.values[:, :, : 64 - count])


@pytest.mark.parametrize("sinks", [False, True])
def test_entries_are_read_in_blocks(monkeypatch, sinks):
    stats = random_stats(sinks=sinks)
    whole = repair_entries(stats, every_second(64))
    monkeypatch.setattr(repair_module, "_BLOCK", 10)
    in_blocks = repair_entries(stats, every_second(64))
    for name in ("values", "logit_bias", "errors"):
        torch.testing.assert_close(getattr(in_blocks, name), getattr(whole, name), atol=1e-3, rtol=1e-3)


def fit_all_heads_in_one_batch(monkeypatch):
    """Fit the heads like on a GPU, with padding."""
    monkeypatch.setattr(repair_module, "_parts", lambda counts, is_fitted, width: [((slice(None),) * 2, width)])


@pytest.mark.parametrize("extra", ["plain", "softcap", "sinks", "bias", "padding", "evicted"])
@pytest.mark.parametrize("refit_values", [True, False])
def test_heads_are_fitted_in_one_batch_as_one_by_one(extra, refit_values, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    num_entries, num_queries, num_seen = 90, 60, (90, 50)
    queries = torch.randn(2, 6, num_queries, DIM, generator=generator)
    keys, values = (torch.randn(2, 3, num_entries, DIM, generator=generator) for _ in range(2))
    options = {
        "plain": {},
        "softcap": {"softcap": 1.5},
        "sinks": {"sink_logits": 2 + torch.randn(6, generator=generator)},
        "bias": {"logit_bias": torch.randn(2, 3, num_entries, generator=generator)},
        "padding": {
            "positions": EntryPositions(
                valid=torch.arange(num_entries) >= num_entries - torch.tensor(num_seen)[:, None], num_seen=num_seen
            ),
            "sink_logits": torch.randn(6, generator=generator),
        },
        "evicted": {
            "positions": EntryPositions(
                entries=torch.arange(num_entries).mul(3).expand(2, 3, -1),
                queries=torch.arange(270 - num_queries, 270).expand(2, -1),
            ),
            "rotary": "not known, so that the queries are not moved",
        },
    }[extra]
    kept = torch.full((2, 3, num_entries), -1)
    counts = torch.tensor([[90, 40, 7], [20, 0, 1]])
    for row, head in counts.nonzero().tolist():
        count = int(counts[row, head])
        first = num_entries - (num_seen[row] if extra == "padding" else num_entries)
        chosen = first + torch.randperm(num_entries - first, generator=generator)[:count]
        kept[row, head, num_entries - count :] = chosen.sort().values

    def repaired():
        return repair_entries(AttentionStats(queries, keys, values, **options), kept, refit_values=refit_values)

    one_by_one = repaired()
    fit_all_heads_in_one_batch(monkeypatch)
    in_one_batch = repaired()
    for name in ("values", "logit_bias", "errors"):
        found, expected = getattr(in_one_batch, name), getattr(one_by_one, name)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3, equal_nan=True)
    is_fitted = one_by_one.errors[..., 0].isfinite()
    assert is_fitted.tolist() == [[False, True, True], [True, False, True]]


class CountOperations(TorchDispatchMode):
    """Counts the operations that are not views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_all_heads_need_the_same_operations_without_a_synchronization():
    """On the meta device, tensors have no numbers, so that an operation that reads one on the host fails."""
    num_operations = set()
    for heads in (2, 8):
        queries = torch.empty(2, 3 * heads, 300, DIM, device="meta")
        keys, values = torch.empty(2, 2, heads, 300, DIM, device="meta")
        with CountOperations() as operations:
            repaired = repair_entries(
                AttentionStats(queries, keys, values), torch.empty(2, heads, 100, dtype=torch.long, device="meta")
            )
        assert repaired.values.shape == values.shape
        num_operations.add(operations.count)
    assert len(num_operations) == 1


def test_a_query_that_reads_no_kept_entry_has_no_effect(monkeypatch):
    """All but one of the kept entries come after some of the queries, which are not moved."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = torch.randn(3, 1, 1, 60, DIM, generator=generator)
    stats = AttentionStats(queries, keys, values, rotary="not known")
    repaired = repair_entries(stats, torch.arange(50, 60)[None, None])
    assert repaired.values.isfinite().all()
    assert repaired.logit_bias.isfinite().all()
    assert repaired.errors[0, 0, 1] < repaired.errors[0, 0, 0]
    fit_all_heads_in_one_batch(monkeypatch)
    in_one_batch = repair_entries(stats, torch.cat((torch.full((80,), -1), torch.arange(50, 60)))[None, None])
    torch.testing.assert_close(in_one_batch.values, repaired.values, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(in_one_batch.logit_bias, repaired.logit_bias, atol=1e-4, rtol=1e-3)


def test_a_head_that_keeps_all_entries_is_not_repaired():
    stats = random_stats()
    kept = torch.arange(64).repeat(1, 2, 1)
    kept[0, 1, :30] = -1
    repaired = repair_entries(stats, kept)
    assert torch.equal(repaired.values[:, 0], stats.values[:, 0])
    assert repaired.errors[0, 0].isnan().all()
    assert repaired.errors[0, 1].isfinite().all()


def test_the_weights_continue_from_those_of_the_last_repair():
    """Bias and entries together mean the same as the entries that they replaced."""
    stats = random_stats()
    for x in (stats.keys, stats.values):
        x[:, :, 1::2] = x[:, :, 0::2]
    half = every_second(64)[0, 0]
    bias = torch.full((1, 2, 32), math.log(2))
    positions = EntryPositions(entries=torch.arange(32)[None, None], queries=torch.arange(32, 96)[None])
    keys, values = stats.keys[:, :, half], stats.values[:, :, half]
    replaced = AttentionStats(stats.queries, keys, values, positions=positions, logit_bias=bias)
    kept = torch.arange(16, 32).expand(1, 2, -1)
    found = repair_entries(replaced, kept)
    assert (found.logit_bias[..., :16] == bias[..., :16]).all()
    assert found.logit_bias.abs().amax() <= repair_module.MAX_BIAS + 1e-4


def test_only_weights_are_fitted_where_values_cannot_change():
    stats = random_stats()
    repaired = repair_entries(stats, every_second(64), refit_values=False)
    assert torch.equal(repaired.values, stats.values)


# ---- Caches ----------------------------------------------------------------------------------------------------------


def logits_after(model, cache, new, **options):
    with torch.no_grad():
        return model(new, past_key_values=cache, **options).logits


def filled(model, ids, *arguments, **options):
    cache = CompressedCache(model, *arguments, **options)
    logits_after(model, cache, ids)
    return cache


STORED = pytest.mark.parametrize(
    "options",
    [{}, {"allocation": "equal"}, {"bits": 4}, {"memory": "15kB"}],
    ids=["ragged", "uniform", "bits", "memory"],
)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@STORED
def test_repair_lowers_the_error_of_the_output(family, attn, options):
    model, ids = tiny(family, attn), prompt(90)
    options = {"budget": None if "memory" in options else 0.3, **options}
    if family == "gemma3" and "memory" in options:
        options["memory"] = "9kB"
    cache = filled(model, ids, "capkv", repair=True, **options)
    report = cache.report()
    assert report.heads_repaired > 0
    assert report.repair_error_after < report.repair_error_before
    assert all(LOGIT_BIAS in layer.storage.columns for layer in cache.compressed_layers)
    logits = logits_after(model, cache, prompt(5, seed=2))
    assert logits.isfinite().all()


def test_a_cache_without_repair_has_no_bias():
    model, ids = tiny("llama"), prompt(90)
    cache = filled(model, ids, "capkv", 0.3)
    assert cache.report().heads_repaired is None
    assert all(LOGIT_BIAS not in layer.storage.columns for layer in cache.compressed_layers)


@STORED
def test_copies_and_files_hold_the_repair(options, tmp_path):
    model, ids = tiny("llama"), prompt(90)
    options = {"budget": None if "memory" in options else 0.3, **options}
    cache = filled(model, ids, "capkv", repair=True, **options)
    cache.save(model, tmp_path / "cache.safetensors")
    loaded, copied = CompressedCache.load(tmp_path / "cache.safetensors", model), cache.copy()
    assert loaded.report().to_dict() == cache.report().to_dict()
    new = prompt(5, seed=2)
    expected = logits_after(model, cache, new)
    assert torch.equal(logits_after(model, copied, new), expected)
    assert torch.equal(logits_after(model, loaded, new), expected)


@STORED
def test_padded_rows_are_repaired_like_single_rows(options):
    model, prompts = tiny("llama"), [prompt(60), prompt(90, seed=1)]
    if "memory" in options:
        pytest.skip("the budgets of rows depend on the padding")
    cache = CompressedCache(model, "snapkv", 20, repair=True, **options)
    batch = left_padded(prompts)
    logits_after(model, cache, batch["input_ids"], attention_mask=batch["attention_mask"])
    new = prompt(4, seed=3, rows=2)
    mask = torch.cat((batch["attention_mask"], torch.ones(2, 4, dtype=torch.long)), 1)
    found = logits_after(model, cache, new, attention_mask=mask)
    for row, ids in enumerate(prompts):
        single = filled(model, ids, "snapkv", 20, repair=True, **options)
        torch.testing.assert_close(found[row], logits_after(model, single, new[row : row + 1])[0], atol=2e-3, rtol=2e-3)


def test_rows_with_and_without_repair_in_one_batch():
    model, ids = tiny("llama"), prompt(90)
    caches = [filled(model, ids, "capkv", 0.3, repair=repair) for repair in (True, False)]
    new = prompt(5, seed=2)
    expected = torch.cat([logits_after(model, cache.copy(), new) for cache in caches])
    found = logits_after(model, BatchedCaches([cache.copy() for cache in caches]), new.expand(2, -1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"allocation": "equal"}, {"bits": 4}], ids=str)
def test_beams_and_removed_tokens(options):
    model, ids = tiny("llama"), prompt(60)
    cache = filled(model, ids, "capkv", 0.3, repair=True, **options)
    reordered = cache.copy()
    reordered.batch_repeat_interleave(2)
    reordered.reorder_cache(torch.tensor([1, 0]))
    new = prompt(4, seed=2)
    expected = logits_after(model, cache.copy(), new)
    found = logits_after(model, reordered, new.expand(2, -1))
    torch.testing.assert_close(found, expected.expand(2, -1, -1), atol=1e-5, rtol=1e-5)
    logits_after(model, cache, prompt(3, seed=5))
    cache.crop(-3)
    torch.testing.assert_close(logits_after(model, cache, new), expected, atol=1e-5, rtol=1e-5)


def test_generation_with_beams():
    model, ids = tiny("llama"), prompt(60)
    cache = CompressedCache(model, "capkv", 0.5, repair=True)
    with torch.no_grad():
        out = model.generate(ids, past_key_values=cache, max_new_tokens=5, num_beams=3, do_sample=False)
    assert out.shape == (1, 65)


@pytest.mark.parametrize("policy", ["capkv", "keydiff", "h2o"])
@STORED
def test_entries_are_repaired_again_at_later_evictions(policy, options):
    model = tiny("llama")
    if policy != "capkv" and "memory" in options:
        pytest.skip("one policy is enough")
    options = {"budget": None if "memory" in options else 24, **options}
    cache = CompressedCache(model, policy, evict="always", interval=8, repair=True, **options)
    num_repaired = []
    for seed in range(3):
        logits_after(model, cache, prompt(40, seed=seed))
        num_repaired.append(cache.report().heads_repaired or 0)
    # Where values are quantized or few queries are remembered, heads may keep no repair.
    assert max(num_repaired) > 0 or options.keys() & {"bits", "memory"}
    for token in prompt(30, seed=4)[0]:
        logits = logits_after(model, cache, token.view(1, 1))
    assert logits.isfinite().all()
    for layer in cache.compressed_layers:
        bias = layer.storage.columns[LOGIT_BIAS]
        assert bias.abs().max() <= repair_module.MAX_BIAS + 1e-3


@STORED
def test_a_head_that_refuses_a_later_repair_reports_the_earlier_one(options, monkeypatch):
    model = tiny("llama")
    options = {"budget": None if "memory" in options else 0.3, **options}
    cache = CompressedCache(model, "capkv", evict="always", repair=True, **options)
    logits_after(model, cache, prompt(90))
    first = cache.report()
    assert first.heads_repaired > 0
    monkeypatch.setattr(repair_module, "MARGIN", 1.0)  # no later repair is kept
    logits_after(model, cache, prompt(40, seed=1))
    assert cache.get_seq_length() == 130
    second = cache.report()
    assert second.heads_repaired == first.heads_repaired
    for before, after in zip(first.heads, second.heads, strict=True):
        if before.repair.is_kept:
            assert after.repair == before.repair
        else:
            assert after.repair.error_after == after.repair.error_before


def test_reported_bytes_count_the_bias():
    model, ids = tiny("llama"), prompt(90)
    options = {"measure_capacity": False, "allocation": "equal"}
    plain, repaired = (filled(model, ids, "knorm", 0.25, repair=flag, **options).report() for flag in (False, True))
    num_heads = len(plain.heads)
    assert plain.bytes_kept == repaired.bytes_kept
    # 4 bytes for the number of each entry, and 8 bytes for the two errors of each head.
    assert repaired.bytes - plain.bytes == num_heads * (22 * 4 + 8)
    assert repaired.bytes == repaired.bytes_kept + repaired.bytes_index == repaired.to_dict()["bytes"]


def test_memory_counts_the_bias():
    model, ids = tiny("llama"), prompt(90)
    for evict in ("prefill", "always"):
        cache = filled(model, ids, "capkv", memory=0.5, evict=evict, repair=True)
        report = cache.report()
        assert report.bytes_kept + report.bytes_index <= report.bytes_limit


@pytest.mark.parametrize("policy", ["kvzip", "kvgrad"])
@pytest.mark.parametrize("bits", [None, 8])
def test_entries_of_a_replayed_prompt_are_repaired(policy, bits):
    """The layers share one budget, so an entry of the first layer may still be dropped by the last one."""
    model, ids = tiny("llama"), prompt(90)
    caches = [CompressedCache(model, policy, 0.3, repair=repair, bits=bits) for repair in (False, True)]
    prefill(model, {"input_ids": ids}, caches)
    plain, repaired = caches
    for layer in plain.compressed_layers:
        assert torch.equal(plain.kept_positions(layer.index), repaired.kept_positions(layer.index))
    assert repaired.report().heads_repaired > 0
    assert repaired.report().repair_error_after < repaired.report().repair_error_before


def test_models_without_rotary_embedding_are_repaired():
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        vocab_size=97, hidden_size=48, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=48
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    cache = filled(model, prompt(60), "snapkv", 0.3, repair=True)
    assert cache.report().heads_repaired is not None


def test_self_attention_of_decoders_with_an_encoder_is_repaired():
    model = build_family("m2m_100")
    cache = CompressedCache(model, "snapkv", 0.5, repair=True)
    with torch.no_grad():
        model(
            input_ids=prompt(20),
            decoder_input_ids=prompt(40),
            past_key_values=EncoderDecoderCache(cache, CrossAttentionCache(model)),
        )
    assert cache.report().heads_repaired is not None
    assert all(LOGIT_BIAS in layer.storage.columns for layer in cache.compressed_layers)


@pytest.mark.parametrize(("family", "what"), [("mistral", "sliding window"), ("deepseek_v3", "cached latents")])
def test_models_whose_layers_are_not_repaired(family, what):
    model = supported_case(family).model
    if family == "deepseek_v3" and not any(map(caches_latents, compressed_layers(model).values())):
        pytest.skip("early versions cache the keys of all heads")
    with pytest.raises(ValueError, match=f"repair must be False.*{what}"):
        CompressedCache(model, "capkv", 0.3, repair=True)


def test_answers_and_evaluations_accept_repair():
    assert CacheConfig("capkv", 0.3, repair=True).build(tiny("llama")).settings.repair
    _, report = suffice.kv.answer(
        build("llama", vocab_size=TOKENS), tokenizer(), "parrot " * 60, repair=True, max_new_tokens=3
    )
    assert report.heads_repaired is not None
    assert "heads repaired" in str(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = build("llama").to(dtype)
    cache = filled(model, prompt(90), "capkv", 0.3, repair=True)
    assert cache.report().heads_repaired > 0
    assert cache.compressed_layers[0].storage.values.dtype == dtype
    assert logits_after(model, cache, prompt(3, seed=1)).isfinite().all()


def test_values_that_a_short_dtype_cannot_hold_are_not_used():
    stats = random_stats()
    large = AttentionStats(stats.queries, stats.keys, (6e4 * stats.values.sign()).half())
    assert repair_entries(large, every_second(64)).values.isfinite().all()


# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"repair": 1}, TypeError, "repair must be True or False, got 1"),
        ({"policy": "full"}, ValueError, "repair must be False with policy 'full'"),
        ({"rerotate": True}, ValueError, "repair must be False with rerotate=True"),
        ({"allocation": "marginal"}, ValueError, "repair must be False with allocation"),
    ],
)
def test_settings_without_repair(arguments, error, message):
    with pytest.raises(error, match=message):
        CompressedCache(tiny("llama"), **{"policy": "capkv", "budget": 0.3, "repair": True, **arguments})


def test_a_text_without_enough_queries_is_refused():
    model = tiny("llama")
    cache = CompressedCache(model, "capkv", 3, sinks=0, window=1, repair=True)
    with pytest.raises(ValueError, match=r"at least 8 tokens in each row with repair=True.*got 6"):
        logits_after(model, cache, prompt(6))
    assert cache.get_seq_length() == 0
    logits_after(model, cache, prompt(20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "full"], "repair must be False with policy 'full'"),
        (["--allocation", "marginal"], "repair must be False with allocation"),
        (["--rerotate"], "repair must be False with rerotate=True"),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(options, message):
    done = CliRunner().invoke(app, ["kv", "generate", "--prompt", "a", "--repair", *options])
    assert message in str(done.exception)
