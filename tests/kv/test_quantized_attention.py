"""Attention over quantized entries: equal to ordinary attention over the entries that they stand for."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from suffice.kv import CompressedCache
from suffice.kv.storage.quantized import QuantizedStorage
from tests.kv.test_softcap_and_sinks import CONFIGS
from tests.kv.tiny import VOCABULARY, build, left_padded


def text(length, seed=0, rows=1):
    """Return random token ids of any length, [rows, length]."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)


@functools.cache
def model_of(name, attn="sdpa"):
    """Return a model, in float64 if its attention supports that with padding."""
    if name not in CONFIGS:
        model = build(name, attn)
        return model.double() if attn == "sdpa" else model
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter, 1.0, 2.0)
    return model


def ordinary_attention(call, entries):
    """Return output and weights of new tokens, in float64, with NaN for the queries of padding."""
    keys, values, positions = entries.keys.double(), entries.values.double(), entries.positions
    batch, heads, new, _ = call.query.shape
    groups = heads // keys.shape[1]
    queries = positions[:, :, positions.shape[2] - new :]
    output = torch.full((batch, new, heads, values.shape[-1]), torch.nan, dtype=torch.float64)
    weights = torch.full((batch, heads, new, keys.shape[2]), torch.nan, dtype=torch.float64)
    scaling = call.scaling or keys.shape[-1] ** -0.5
    for row in range(batch):
        for head in range(heads):
            own = row, head // groups
            for query in range(new):
                if queries[own][query] < 0:
                    continue
                logits = keys[own] @ call.query[row, head, query].double() * scaling
                if call.softcap is not None:
                    logits = call.softcap * torch.tanh(logits / call.softcap)
                unreadable = (positions[own] < 0) | (positions[own] > queries[own][query])
                logits = logits.masked_fill(unreadable, -torch.inf)
                if call.sink_logits is not None:
                    logits = torch.cat((logits, call.sink_logits[head : head + 1].double()))
                weights[row, head, query] = logits.softmax(0)[: keys.shape[2]]
                output[row, query, head] = weights[row, head, query] @ values[own]
    return output, weights


@pytest.fixture
def checked(monkeypatch):
    """Compare every attention call over quantized entries with ordinary attention; return the compared numbers."""
    attend = QuantizedStorage.attend
    compared = []

    def attend_and_compare(self, call, backend):
        output, weights = attend(self, call, backend)
        assert output.is_contiguous()
        assert output.dtype == call.query.dtype
        expected, expected_weights = ordinary_attention(call, self.entries)
        is_token = ~expected.isnan()
        tolerance = {"rtol": 0.0, "check_dtype": False, "atol": 1e-8 if output.dtype == torch.float64 else 1e-4}
        torch.testing.assert_close(output[is_token], expected[is_token], **tolerance)
        if weights is not None:
            is_token = ~expected_weights.isnan()
            torch.testing.assert_close(weights[is_token], expected_weights[is_token], **tolerance)
        compared.append((sum(map(sum, self.quantized.lengths)), call.query.shape[2], weights is not None))
        return output, weights

    monkeypatch.setattr(QuantizedStorage, "attend", attend_and_compare)
    return compared


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def read_chunks(model, cache, rows, chunks, **options):
    """Read a padded batch, then chunks of further tokens, of which the second row has some masked at the start."""
    batch = left_padded(rows)
    model(**batch, past_key_values=cache)
    mask = batch["attention_mask"]
    for seed, size in enumerate(chunks):
        new = torch.ones(len(rows), size, dtype=torch.long)
        if size > 4:
            new[-1, :3] = 0
        mask = torch.cat((mask, new), dim=1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -size:]
        ids = text(size, seed + 1, rows=len(rows))
        out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, **options)
    return out


POLICIES = [
    {"policy": "capkv"},
    {"policy": "capkv-profile"},
    {"policy": "keydiff", "allocation": "pyramid"},
    {"policy": "capkv", "allocation": "marginal"},
    {"policy": "h2o", "allocation": "adakv"},
]


@pytest.mark.parametrize("options", POLICIES, ids=str)
@pytest.mark.parametrize(("budget", "evict"), [(60, "prefill"), (0.6, "always"), (1.0, "prefill")])
def test_attention_equals_that_over_the_dequantized_entries(checked, options, budget, evict):
    model = model_of("llama")
    cache = CompressedCache(model, budget=budget, evict=evict, interval=3, bits=(4, 2), **options)
    read_chunks(model, cache, [text(110), text(75, seed=1)], [6, 1, 1, 40, 1])
    assert len(checked) == 15
    assert max(number for number, _, _ in checked) > 70


@pytest.mark.parametrize("name", ["mistral", "qwen3", "gemma3", *CONFIGS])
@pytest.mark.parametrize("options", POLICIES[:2], ids=str)
def test_families_attend_to_the_dequantized_entries(checked, name, options):
    model = model_of(name)
    cache = CompressedCache(model, budget=60, bits=3, **options)
    read_chunks(model, cache, [text(90), text(75, seed=1)], [6, 1, 40, 1])
    assert max(number for number, _, _ in checked) > 20
    assert {new for _, new, _ in checked} == {6, 1, 40}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_returned_weights_are_those_over_the_dequantized_entries(checked, name):
    model = model_of(name, "eager")
    cache = CompressedCache(model, "capkv", 60, allocation="adakv", bits=4)
    out = read_chunks(model, cache, [text(90), text(75, seed=1)], [1, 7, 40, 2], output_attentions=True)
    assert any(has_weights for _, _, has_weights in checked)
    assert out.attentions[0].shape[:3] == (2, 4, 2)


@pytest.mark.parametrize("numbers", ["_BLOCK_NUMBERS", "_MAX_LOGITS"])
def test_blocks_of_entries_and_queries_do_not_matter(checked, monkeypatch, numbers):
    monkeypatch.setattr(f"suffice.kv.attention.quantized_attention.{numbers}", 200)
    model = model_of("llama")
    cache = CompressedCache(model, "capkv", 60, allocation="adakv", bits=4)
    read_chunks(model, cache, [text(110), text(45, seed=1), text(10, seed=1)], [6, 1, 40, 1])
    assert len(checked) == 12


def test_heads_without_quantized_entries(checked):
    model = model_of("llama")
    cache = CompressedCache(model, "capkv", 30, bits=4)
    read_chunks(model, cache, [text(50), text(20, seed=1)], [6, 1])
    assert {number for number, _, _ in checked} == {0}


def attend_with_autograd(storage, call, backend):
    """Compute ordinary attention over the entries of a storage, in operations that autograd supports."""
    entries, new = storage.entries, call.query.shape[2]
    groups = call.query.shape[1] // entries.keys.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (entries.keys, entries.values))
    unreadable = torch.ones(new, keys.shape[2]).triu(keys.shape[2] - new + 1).bool()
    unreadable = unreadable | (entries.positions < 0).repeat_interleave(groups, 1)[:, :, None]
    logits = (call.query @ keys.mT * call.scaling).masked_fill(unreadable, -torch.inf)
    return (logits.softmax(-1) @ values).transpose(1, 2).contiguous(), None


@torch.enable_grad()
def test_gradients_equal_those_of_ordinary_attention(monkeypatch):
    model = model_of("llama")
    cache = CompressedCache(model, "capkv", 60, bits=4)
    model(text(110), past_key_values=cache)
    gradients = []
    for _ in range(2):
        own = cache.copy()
        hidden = model.get_input_embeddings()(text(30, seed=1)).detach().requires_grad_()
        model(inputs_embeds=hidden, past_key_values=own)
        last = model.get_input_embeddings()(text(1, seed=2)).detach().requires_grad_()
        model(inputs_embeds=last, past_key_values=own).logits[0, -1, 5].backward()
        gradients.append((hidden.grad, last.grad))
        monkeypatch.setattr(QuantizedStorage, "attend", attend_with_autograd)
    for got, wanted in zip(*gradients, strict=True):
        if wanted is None:
            assert got is None
        else:
            assert float(wanted.norm()) > 0.1
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", ["capkv", "capkv-profile"])
def test_models_of_other_dtypes(dtype, policy):
    model = build("llama").to(dtype)
    caches = [CompressedCache(model, policy, 60, bits=bits) for bits in (None, 8)]
    for cache in caches:
        model(text(110), past_key_values=cache)
    for step in range(3):
        got, wanted = (model(text(1, seed=step), past_key_values=cache).logits.float() for cache in reversed(caches))
        assert float((got - wanted).norm() / wanted.norm()) < 0.2
    storage = caches[1].layers[0].storage
    assert storage.exact.keys.dtype == storage.entries.keys.dtype == storage.quantized.means.dtype == dtype


def test_prefill_in_inference_mode_is_continued_outside_of_it():
    model = build("llama")
    inside, outside = (CompressedCache(model, "capkv", 60, bits=4) for _ in range(2))
    with torch.inference_mode():
        model(text(110), past_key_values=inside)
    model(text(110), past_key_values=outside)
    for cache in (inside, outside):
        model(text(40, seed=1), past_key_values=cache)
    for step in range(40):
        ids = text(1, seed=step)
        with torch.inference_mode(step % 7 == 2), torch.enable_grad() if step % 5 == 1 else torch.no_grad():
            got = model(ids, past_key_values=inside).logits
        assert torch.equal(got, model(ids, past_key_values=outside).logits)
