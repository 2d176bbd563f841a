"""Models inside the objects of other libraries: results equal those of the model itself."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from suffice.kv import CompressedCache, answer, calibrate, evaluate, prefill
from suffice.kv.budget.profile_from_weights import profile_from_weights
from suffice.kv.eval.fidelity import CacheConfig
from suffice.kv.eval.tasks import make_example
from suffice.kv.hf.fingerprint import fingerprint
from suffice.kv.hf.wrappers import unwrap_model
from tests.kv.tiny import TOKENS, build, prompt, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in peft


class Adapter(nn.Module):
    """A projection with a low-rank update, with the attributes of a layer of PEFT."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)
        self.active_adapters = ["default"]
        self.disable_adapters = False
        self.scaling = {"default": 2.0}

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.scaling["default"] * self.up(self.down(x))


class Tuner(nn.Module):
    """Stands in for `peft.LoraModel`, which replaces projections of the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        for layer in model.model.layers:
            layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
            layer.self_attn.v_proj = Adapter(layer.self_attn.v_proj)


class StandInPeftModel(nn.Module):
    """Stands in for `peft.PeftModel`: not a PreTrainedModel, but it has its attributes."""

    def __init__(self, model, **config):
        super().__init__()
        self.base_model = Tuner(model)
        self.active_peft_config = SimpleNamespace(**config)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model.model, name)

    def get_base_model(self):
        return self.base_model.model

    def forward(self, *arguments, **options):
        return self.base_model.model(*arguments, **options)

    def generate(self, *arguments, **options):
        return self.base_model.model.generate(*arguments, **options)


class StandInDataParallel(nn.Module):
    """Stands in for `DistributedDataParallel`, which has no attribute of the model but `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *arguments, **options):
        return self.module(*arguments, **options)


def peft_model(model):
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).eval()


WRAPPERS = {
    "stand-in for PEFT": StandInPeftModel,
    "data-parallel": StandInDataParallel,
    "data-parallel PEFT": lambda model: StandInDataParallel(StandInPeftModel(model)),
    "PEFT": peft_model,
}
NEEDS_PEFT = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")


@pytest.fixture(params=[pytest.param(name, marks=NEEDS_PEFT if name == "PEFT" else ()) for name in WRAPPERS])
def wrapped(request):
    return WRAPPERS[request.param](build("llama", vocab_size=TOKENS, max_position_embeddings=1024))


def generate(model, cache):
    ids = prompt(60)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        return model.generate(ids, past_key_values=cache, **options).tolist()


@pytest.mark.parametrize("policy", ["capkv-profile", "h2o"])
def test_generation_equals_that_of_the_model_inside(wrapped, policy):
    model = unwrap_model(wrapped)
    caches = CompressedCache(wrapped, policy, 0.3), CompressedCache(model, policy, 0.3)
    outer = wrapped if hasattr(wrapped, "generate") else model
    assert generate(outer, caches[0]) == generate(model, caches[1])
    assert caches[0].report().tokens_kept < 40
    for layer in range(3):
        assert torch.equal(*(cache.kept_positions(layer) for cache in caches))
    # The forward pass of the wrapper uses the cache too.
    caches = CompressedCache(wrapped, policy, 0.3), CompressedCache(model, policy, 0.3)
    with torch.no_grad():
        pairs = zip((wrapped, model), caches, strict=True)
        logits = [each(prompt(60), past_key_values=cache).logits for each, cache in pairs]
    assert torch.equal(*logits)
    assert caches[0].report().tokens_kept == caches[1].report().tokens_kept < 40


def test_all_functions_accept_it(wrapped, tmp_path):
    model = unwrap_model(wrapped)
    assert calibrate(wrapped, tokens=40) == calibrate(model, tokens=40)
    cache = CompressedCache(wrapped, "capkv", 20)
    prefill(wrapped, {"input_ids": prompt(50)}, [cache])
    file = cache.save(wrapped, tmp_path / "cache")
    for each in (wrapped, model):
        loaded = CompressedCache.load(file, each)
        assert torch.equal(loaded.kept_positions(1), cache.kept_positions(1))
    text = "The parrot is called Otto. " * 10
    found = [answer(each, tokenizer(), text, "Who?", max_new_tokens=4)[0].answer for each in (wrapped, model)]
    assert found[0] == found[1]
    example = make_example("text", tokenizer(), tokens=100, max_new_tokens=8)
    rows = [
        evaluate(each, tokenizer(), example, [CacheConfig("h2o", 0.3)], mode="continuation")
        for each in (wrapped, model)
    ]
    assert [row["kl"] for row in rows[0]] == [row["kl"] for row in rows[1]]


def test_compiled_models_are_accepted():
    model = build("llama")
    compiled = torch.compile(model, backend="eager")
    assert compiled is not model
    assert unwrap_model(compiled) is model
    assert generate(model, CompressedCache(compiled, "h2o", 0.3)) == generate(model, CompressedCache(model, "h2o", 0.3))


def test_weights_are_read_inside_the_wrapper():
    model = build("llama")
    assert profile_from_weights(StandInDataParallel(model)) == profile_from_weights(model)


def test_adapters_are_part_of_the_fingerprint():
    model = build("llama")
    seen = {fingerprint(model)}
    wrapped = StandInPeftModel(model)
    seen.add(fingerprint(wrapped.get_base_model()))
    projection = model.model.layers[0].self_attn.q_proj
    projection.disable_adapters = True
    seen.add(fingerprint(model))
    projection.disable_adapters = False
    projection.scaling = {"default": 1.0}
    seen.add(fingerprint(model))
    assert len(seen) == 4


def test_prompt_learning_and_other_objects_are_rejected():
    wrapped = StandInPeftModel(build("llama"), is_prompt_learning=True)
    with pytest.raises(ValueError, match="model must have adapters that change its weights, such as LoRA, got Simple"):
        CompressedCache(wrapped)
    for other in (nn.Linear(2, 2), StandInDataParallel(nn.Linear(2, 2)), "llama"):
        with pytest.raises(TypeError, match=f"PreTrainedModel, got {type(other).__name__}"):
            CompressedCache(other)


@NEEDS_PEFT
def test_prefix_tuning_is_rejected():
    import peft

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="got PrefixTuningConfig: prompt learning puts entries into the cache"):
        CompressedCache(peft.get_peft_model(build("llama"), config))
