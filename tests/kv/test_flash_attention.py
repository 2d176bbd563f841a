"""Models with FlashAttention and flex attention: prefills and equal heads use it, heads of unequal length do not."""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from suffice.kv import BatchedCaches, CompressedCache
from suffice.kv.attention.masks import MaskFormat, mask_format
from suffice.kv.cache.prefill import prefill as shared_prefill
from tests.kv import test_softcap_and_sinks
from tests.kv.flash import HUB_KERNELS, flash_package, with_flash
from tests.kv.tiny import answer, build, left_padded, prompt

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of flex attention
FAMILIES = ("llama", "gemma3", "mistral", "gemma2", "gpt_oss")
NAME = {"gpt_oss": "kernels-community/vllm-flash-attn3"}  # the only one that the oldest transformers accepts
every_family = pytest.mark.parametrize("family", FAMILIES)
NAMES = ("flash_attention_2", "flash_attention_3", *HUB_KERNELS)


def eager(family):
    if family in test_softcap_and_sinks.CONFIGS:
        return test_softcap_and_sinks.build(family)
    return build(family, "eager")


@pytest.fixture
def package(monkeypatch):
    with flash_package(monkeypatch) as package:
        yield package


def read(model, cache, ids, mask=None):
    with torch.no_grad():
        return model(ids, past_key_values=cache, attention_mask=mask).logits[:, -1]


@every_family
@pytest.mark.parametrize("policy", ["capkv-profile", "capkv"])
def test_full_budget_generates_the_same_tokens_as_the_stock_cache(package, family, policy):
    model, inputs = with_flash(eager(family), NAME.get(family, "flash_attention_2")), {"input_ids": prompt(40)}
    expected = answer(model, inputs)
    assert torch.equal(answer(model, inputs, CompressedCache(model, policy, 1.0)), expected)
    assert package.loaded == [NAME.get(family, "flash_attention_2")]


@every_family
@pytest.mark.parametrize("policy", ["capkv-profile", "capkv", "h2o"])
@pytest.mark.parametrize("options", [{}, {"evict": "always", "interval": 3}, {"repair": True}], ids=str)
def test_compression_is_the_same_as_with_eager_attention(package, family, policy, options):
    """A prompt, a question in one pass, a question token by token; the second row of the batch is padded."""
    tolerance = 2e-3 if "repair" in options else 2e-4  # a fit enlarges rounding errors
    results = []
    for name in ("eager", NAME.get(family, "flash_attention_2")):
        model = eager(family) if name == "eager" else with_flash(eager(family), name)
        cache = CompressedCache(model, policy, 0.5, **options)
        ids, mask = left_padded([prompt(40), prompt(27)]).values()
        logits = [read(model, cache, ids, mask)]
        for new in (7, 1, 1, 1):
            mask = torch.cat((mask, mask.new_ones(2, new)), dim=1)
            logits.append(read(model, cache, prompt(new, seed=new, rows=2), mask))
        results.append((torch.stack(logits), [cache.kept_positions(x.index) for x in cache.compressed_layers]))
    (expected, positions), (got, flash_positions) = results
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)
    for own, other in zip(flash_positions, positions, strict=True):
        assert torch.equal(own, other)


@every_family
@pytest.mark.parametrize("policy", ["capkv-profile", "capkv"])
def test_rows_of_a_padded_batch_equal_single_runs(package, family, policy):
    model, prompts = with_flash(eager(family), NAME.get(family, "flash_attention_2")), [prompt(44), prompt(30)]
    together = answer(model, left_padded(prompts), CompressedCache(model, policy, 0.5))
    for row, own in enumerate(prompts):
        alone = answer(model, {"input_ids": own}, CompressedCache(model, policy, 0.5))
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_flash_attention_is_supported(package, name):
    model, inputs = with_flash(build("llama"), name), {"input_ids": prompt(40)}
    cache = CompressedCache(model, "capkv", 0.5)
    assert model.config._attn_implementation == f"suffice_{name}"
    got = answer(model, inputs, cache)
    assert set(package.loaded) == {name}
    del cache
    gc.collect()
    assert model.config._attn_implementation == name
    stock = build("llama")
    assert torch.equal(got, answer(stock, inputs, CompressedCache(stock, "capkv", 0.5)))


def test_flash_attention_computes_prefills_and_equal_heads_only(package):
    model = with_flash(build("llama"), "flash_attention_2")
    layers = model.config.num_hidden_layers
    for policy, decoded in (("capkv", layers), ("capkv-profile", 0)):
        cache = CompressedCache(model, policy, 0.5)
        package.shapes.clear()
        read(model, cache, prompt(40))
        assert package.shapes == [(40, 40)] * layers
        package.shapes.clear()
        read(model, cache, prompt(5))
        assert package.shapes == [(5, 25)] * decoded


def test_window_of_the_configuration_does_not_hide_kept_entries(package):
    """The layers have full attention. A window in their options must not count kept entries."""
    results = []
    for name in ("eager", "flash_attention_2"):
        model = build("mistral", "eager")
        model.config.sliding_window = 30
        for layer in model.model.layers:
            layer.self_attn.sliding_window = 30
        model = model if name == "eager" else with_flash(model, name)
        model.config.sliding_window = None  # the layers have full attention
        cache = CompressedCache(model, "capkv", 24)
        read(model, cache, prompt(30))
        results.append(torch.stack([read(model, cache, prompt(1, seed=step)) for step in range(12)]))
    torch.testing.assert_close(results[1], results[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
@pytest.mark.parametrize("policy", ["capkv-profile", "capkv"])
def test_windows_of_several_new_tokens_apply_the_soft_cap_and_sinks(package, family, policy):
    """All layers have a window, which ends within the new tokens."""
    results = []
    for name in ("eager", NAME.get(family, "flash_attention_2")):
        torch.manual_seed(0)
        config = test_softcap_and_sinks.CONFIGS[family]()
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for layer in model.model.layers:
            if hasattr(layer.self_attn, "sinks"):
                torch.nn.init.normal_(layer.self_attn.sinks, 1.0, 2.0)
        model = model if name == "eager" else with_flash(model, name)
        cache = CompressedCache(model, policy, 0.75)
        results.append(torch.stack([read(model, cache, prompt(new, seed=new)) for new in (30, 7, 1, 20)]))
    torch.testing.assert_close(results[1], results[0], atol=2e-4, rtol=1e-4)


def test_positions_of_later_tokens_do_not_divide_them_into_packed_texts(package):
    """transformers takes positions that do not increase for texts that follow each other, which are not in a cache."""
    results = []
    for model in (build("llama", "eager"), with_flash(build("llama"), "flash_attention_2")):
        cache = CompressedCache(model, "capkv", 0.5)
        read(model, cache, prompt(30))
        with torch.no_grad():
            positions = torch.tensor([[30, 31, 31, 33]])
            results.append(model(prompt(4), past_key_values=cache, position_ids=positions).logits)
    torch.testing.assert_close(results[1], results[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_caches_that_share_a_pass(package, name):
    """One prefill fills two caches; one pass continues from both of them."""
    with torch.compiler.set_stance("force_eager"):
        stock, model = build("llama"), with_flash(build("llama"), name)
        results = []
        for own in (stock, model):
            caches = [CompressedCache(own, policy, 0.5) for policy in ("capkv", "h2o")]
            shared_prefill(own, {"input_ids": prompt(30)}, caches)
            rows = BatchedCaches(caches)
            mask = torch.ones(2, 33, dtype=torch.long)
            results.append(read(own, rows, prompt(3, rows=2), mask))
    torch.testing.assert_close(results[1], results[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2"])
@pytest.mark.parametrize("policy", ["capkv-profile", "capkv"])
@pytest.mark.parametrize("repair", [False, True])
def test_flex_attention_equals_eager_attention(family, policy, repair):
    """The stance avoids torch.compile, which takes minutes for flex attention on a CPU."""
    results = []
    with torch.compiler.set_stance("force_eager"):
        for name in ("eager", "flex_attention"):
            model = eager(family) if name == "eager" else with_flash(eager(family), name)
            cache = CompressedCache(model, policy, 0.5, repair=repair)
            ids, mask = left_padded([prompt(40), prompt(27)]).values()
            logits = [read(model, cache, ids, mask)]
            for new in (7, 1, 1):
                mask = torch.cat((mask, mask.new_ones(2, new)), dim=1)
                logits.append(read(model, cache, prompt(new, seed=new, rows=2), mask))
            results.append(torch.stack(logits))
    tolerance = 2e-3 if repair else 2e-4
    torch.testing.assert_close(results[1], results[0], atol=tolerance, rtol=tolerance)


def test_flex_attention_without_padding_equals_the_stock_cache():
    with torch.compiler.set_stance("force_eager"):
        model = with_flash(build("llama"), "flex_attention")
        expected = read(model, DynamicCache(config=model.config), prompt(30))
        cache = CompressedCache(model, "capkv-profile", 1.0)
        torch.testing.assert_close(read(model, cache, prompt(30)), expected)


def test_formats_of_masks(package):
    assert {mask_format(name) for name in NAMES} == {MaskFormat.PADDING}
    assert mask_format("sdpa") is mask_format("eager") is MaskFormat.DENSE
    assert mask_format("flex_attention") is MaskFormat.BLOCK
    assert mask_format("paged|eager") is mask_format("unknown") is None
