"""Rotary embeddings: keys that are rotated to other positions equal the keys that the model computes there."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import DynamicCache

from suffice.kv import CompressedCache, Policy
from suffice.kv.hf.layers import find_decoder, stock_layers
from suffice.kv.hf.rotary import Frequencies, RotaryEmbedding
from suffice.kv.hf.rotary_probe import probe_positions
from suffice.kv.policy.directions import Key
from suffice.kv.policy.weights import Uniform, Weights
from tests.kv import families
from tests.kv.families import NOT_BUILDABLE
from tests.kv.family_cases import get_case
from tests.kv.family_checks import CHECKS
from tests.kv.support_page import VERSION
from tests.kv.tiny import build, prompt, tiny

# Families with different position embeddings. None: keys are not rotated, but sliding layers may be.
FAMILIES = [
    "llama", "mistral", "qwen3", "olmo2", "falcon_h1", "granite",  # halves of a head
    "phi", "gpt_neox", "stablelm", "nemotron", "glm4_moe", "qwen3_next", "lfm2", "bamba",  # part of a head
    "cohere", "glm", "glm4", "ernie4_5", "helium",  # neighbouring dimensions
    "cohere2", "exaone4", "smollm3", "afmoe", "flint",  # layers without positions
    "llama4_text",  # complex numbers, and layers without positions
    "gpt_oss",  # cosines and sines of half the width, YaRN
    "nanochat",  # by negative angles
    "gemma3", "olmo3", "laguna", "gemma4_text",  # frequencies by layer type
    "hunyuan_v1_dense", "hunyuan_v1_moe",  # a norm after the rotary embedding
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v",  # several axes, here with the same position on each
]  # fmt: skip

# Families with rotary or unknown positions that are refused, and why.
REFUSED = {
    "ernie4_5_vl_moe": "it has rotary frequencies, but keys depend on the positions, but not by a known",
    **dict.fromkeys(
        ("diffusion_gemma", "qwen2_5_omni", "qwen3_omni_moe"), "its decoder has rotary frequencies, but does not accept"
    ),
    # Decoders that need the states of an encoder.
    **dict.fromkeys(("canary", "cohere_asr", "dia", "t5gemma"), "its decoder failed on single tokens"),
}


def available(*names):
    """The families that this version of transformers has."""
    return [name for name in names if name in families.families()]


class RecordingCache(DynamicCache):
    """A cache of transformers that keeps the new keys of each layer."""

    def __init__(self, model):
        super().__init__(config=model.config)
        self.new_keys = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.new_keys[layer_idx] = key_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def stock_keys(model, ids, positions):
    """Keys that a model computes for tokens, each of which is a sequence of its own, at positions; by layer."""
    cache = RecordingCache(model)
    with torch.no_grad():
        find_decoder(model)(input_ids=ids[:, None], position_ids=positions[:, None], past_key_values=cache)
    return cache.new_keys


def build_supported(family):
    """Build a model of a family, or skip the test if caches do not support it in this version of transformers."""
    model = families.build(family)
    try:
        stock_layers(model)
    except ValueError as error:
        pytest.skip(str(error))
    return model


def assert_keys_are_rotated_as_by_the_model(model, tolerance):
    encoding = probe_positions(model)
    assert encoding.error is None
    assert encoding.is_rotary
    ids = torch.tensor([20, 51, 33, 77, 90])
    positions = torch.tensor([0, 3, 40, 41, 700])
    old, at_zero = (stock_keys(model, ids, each) for each in (positions, torch.zeros_like(positions)))
    for shift in (1, 29, 1000):
        new = stock_keys(model, ids, positions + shift)
        assert new.keys() == encoding.rotary.keys()
        for layer, expected in new.items():
            found, back, rotary = old[layer], expected, encoding.rotary[layer]
            if rotary is not None:
                found = rotary.rotate_keys(found, torch.full((len(ids), 1, 1), shift))
                back = rotary.rotate_keys(back, positions[:, None, None] + shift, back=True)
            assert (found - expected).norm() < tolerance * expected.norm(), layer
            assert (back - at_zero[layer]).norm() < tolerance * expected.norm(), layer


@pytest.mark.parametrize("family", available(*FAMILIES))
def test_rotated_keys_equal_the_keys_of_the_model_at_other_positions(family):
    assert_keys_are_rotated_as_by_the_model(build_supported(family), 1e-4)


@pytest.mark.families
@pytest.mark.parametrize("family", [name for name in families.families() if name not in {*FAMILIES, *NOT_BUILDABLE}])
def test_every_other_family_is_rotated_as_by_the_model_or_refused(family):
    try:
        model = families.build(family)
    except Exception as error:
        if transformers.__version__ == VERSION:
            raise
        pytest.skip(f"cannot be built with this version of transformers: {error}")
    try:
        layers = CompressedCache(model, "capkv", 20).compressed_layers
    except ValueError:
        return  # not supported at all; see test_families.py
    has_windows = any(layer.is_sliding for layer in layers)
    try:
        CompressedCache(model, "capkv", 20, rerotate=True)
    except ValueError as error:
        reason = str(error).partition(", got True: ")[2]
        if has_windows:
            assert reason == "the window refers to the original positions"
            return
        has_frequencies = any(name.endswith("inv_freq") for name, _ in find_decoder(model).named_buffers())
        expected = REFUSED.get(family, "the model has no rotary embedding, so keys cannot be moved to other positions")
        assert reason.startswith(expected)
        assert has_frequencies <= (family in REFUSED)
    else:
        assert family not in REFUSED
        assert not has_windows
        assert_keys_are_rotated_as_by_the_model(model, 1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float16, 0.002)])
@pytest.mark.parametrize("family", ["llama", "glm", "phi", "cohere2", "gemma3", "nanochat", "hunyuan_v1_dense"])
def test_rotary_embedding_is_found_in_half_precision(family, dtype, tolerance):
    model = families.build(family)
    frequencies = {name: x for name, x in model.named_buffers() if name.endswith("inv_freq")}
    model.to(dtype)
    for name, x in frequencies.items():  # models that are loaded in half precision have frequencies in float32
        model.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = x
    assert_keys_are_rotated_as_by_the_model(model, tolerance)


@pytest.mark.parametrize(
    "family", available("llama", "glm", "cohere2", "smollm3", "llama4_text", "olmo3", "gemma3", "hunyuan_v1_dense")
)
@pytest.mark.parametrize("allocation", ["equal", "adakv"])
def test_rerotated_keys_equal_those_of_the_model_under_shifted_positions(family, allocation):
    """The sinks move by 24 positions, to those right before the recent tokens, which stay."""
    model = families.build(family)
    ids = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:40][None] + 3
    cache = CompressedCache(model, "streaming-llm", 16, sinks=6, window=10, allocation=allocation, rerotate=True)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    decoder, positions = find_decoder(model), torch.arange(40)[None]
    stock = []
    for shift in (24, 0):
        recorded = RecordingCache(model)
        with torch.no_grad():
            decoder(input_ids=ids, position_ids=positions + shift, past_key_values=recorded)
        stock.append(recorded.new_keys)
    # The norm of Hunyuan makes hidden states of later layers depend on absolute positions.
    compressed = [layer.index for layer in cache.compressed_layers]
    for layer in compressed if "hunyuan" not in family else [0]:
        entries = cache.layers[layer].storage.entries
        assert entries.rope_positions.tolist() == [[list(range(24, 40))] * entries.keys.shape[1]]
        expected = torch.cat((stock[0][layer][:, :, :6], stock[1][layer][:, :, -10:]), dim=2)
        torch.testing.assert_close(entries.keys, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_large_dimensions_do_not_hide_the_rotation_of_others():
    """Trained Qwen 2 models have large biases in dimensions that are hardly rotated."""
    model = build("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e8})
    frequencies = model.model.rotary_emb.inv_freq
    model.to(torch.bfloat16).model.rotary_emb.inv_freq = frequencies
    for layer in model.model.layers:
        bias = layer.self_attn.k_proj.bias.data.view(2, 12)
        bias[:, [5, 11]] = 1000.0
    found = probe_positions(model).rotary
    assert len(found) == 3
    for rotary in found.values():
        assert (rotary.first, rotary.second) == (slice(0, 6), slice(6, 12))


def test_layers_with_the_same_rotation_share_it():
    rotary = list(probe_positions(tiny("gemma3")).rotary.values())
    assert rotary[0] is rotary[2]
    assert rotary[1] is rotary[3]
    assert rotary[0] is not rotary[1]


def test_model_is_run_once_and_left_as_it_was():
    model = build("llama").train()
    calls = []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    first = probe_positions(model)
    assert probe_positions(model) is first
    assert len(calls) == 1
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    CompressedCache(model, "capkv")  # needs no rotary embedding
    CompressedCache(model, "expected-attention")
    CompressedCache(model, "key-leverage", rerotate=True)
    assert len(calls) == 1


@pytest.mark.parametrize("family", available("gpt2", "opt", "jamba", "nemotron_h"))
def test_rerotation_is_rejected_without_rotary_embeddings(family):
    """Positions are added to the hidden states, or there are none: nothing can be rotated."""
    model = build_supported(family)
    with pytest.raises(ValueError, match=r"rerotate must be False for \w+, got True: the model has no rotary"):
        CompressedCache(model, "capkv", 20, rerotate=True)
    # Keys are not rotated, so that they are their own rotation back.
    assert probe_positions(model).error is None
    CompressedCache(model, "key-leverage", 20)


def test_unknown_rotations_are_rejected():
    model = build("llama")
    attention = model.model.layers[1].self_attn
    attention.k_proj.register_forward_hook(
        lambda module, inputs, output: output.flip(1) if output.shape[1] > 1 else output
    )
    rotate = attention.forward

    def forward(hidden_states, position_embeddings, **options):
        cos, sin = position_embeddings
        return rotate(hidden_states, position_embeddings=(cos, sin * sin.abs()), **options)

    attention.forward = forward
    message = "in layer 1, keys depend on the positions, but not by a known rotary embedding"
    with pytest.raises(ValueError, match=f"rerotate must be False for LlamaForCausalLM, got True: {message}"):
        CompressedCache(model, "capkv", 20, rerotate=True)
    refused = "policy must not rotate keys or queries back for LlamaForCausalLM, got 'key-leverage'"
    with pytest.raises(ValueError, match=f"{refused}: {message}"):
        CompressedCache(model, "key-leverage", 20)
    CompressedCache(model, "capkv", 20)


def test_queries_that_are_not_rotated_as_keys_are_rejected():
    """The norms of Hunyuan after the rotary embedding have other weights for queries than for keys."""
    model = families.build("hunyuan_v1_dense")
    CompressedCache(model, "key-leverage", 20)
    with pytest.raises(ValueError, match="got 'expected-attention': in layer 0, queries are not rotated as keys are"):
        CompressedCache(model, "expected-attention", 20)


class KeyWithoutProperty(Key):
    """Directions that rotate keys back and do not say so."""

    needs_rotary = False


def test_parts_that_rotate_back_must_say_so():
    model = tiny("llama")
    policy = Policy(weights=Uniform(), directions=KeyWithoutProperty(rotary=False))
    cache = CompressedCache(model, policy, 20)
    with pytest.raises(ValueError, match=r"embedding of layer 0 is not known: `needs_rotary` .* must return True"):
        model(prompt(40), past_key_values=cache)


def test_combined_weights_need_what_their_parts_need():
    class Rotating(Uniform):
        needs_rotary = True

    weights: list[Weights] = [Uniform() + Rotating(), Uniform() * Rotating(), 2 * Rotating()]
    assert all(each.needs_rotary for each in weights)
    assert not (Uniform() + Uniform()).needs_rotary


def test_frequencies_of_the_largest_position_are_used():
    """LongRoPE has other frequencies for long texts. The module of the model is not changed."""
    factors = {"short_factor": [1.0] * 6, "long_factor": [4.0] * 6}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    model = build("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    rotary = probe_positions(model).rotary[0]
    frequencies, of_model = rotary.frequencies, model.model.rotary_emb.inv_freq.clone()
    assert frequencies.depends_on_length
    short, long = (frequencies.values(torch.tensor([[0, last]])) for last in (40, 200))
    torch.testing.assert_close(short, 1e4 ** (-torch.arange(0, 12, 2) / 12))
    torch.testing.assert_close(long, short / 4)
    assert torch.equal(model.model.rotary_emb.inv_freq, of_model)


def test_rotation_back_undoes_a_rotation():
    frequencies = Frequencies(SimpleNamespace(inv_freq=torch.tensor([1.0, 0.1, 0.01])))
    x = torch.randn(2, 3, 5, 12)
    positions = torch.randint(0, 5000, (2, 3, 5))
    for first, second in ((slice(2, 5), slice(5, 8)), (slice(6, 12, 2), slice(7, 12, 2))):
        for scale in (None, torch.rand(12) + 0.5):
            rotary = RotaryEmbedding(frequencies, first, second, key_scale=scale)
            rotated = rotary.rotate_keys(x, positions)
            assert not torch.allclose(rotated, x)
            torch.testing.assert_close(rotary.rotate_keys(rotated, positions, back=True), x)
        matrix = rotary.mean_rotation(positions[:, 0, :1], 12)
        torch.testing.assert_close(
            (matrix @ x[:, 0, :1].mT).mT, rotary.rotate(x[:, :1, :1], positions[:, :1, :1])[:, 0]
        )


# ---- Positions of the model, and the context window ------------------------------------------------------------------


def image_prompt(model):
    """A prompt of 30 text tokens, an image of 64 tokens and 6 text tokens, for a model of the Qwen-VL families."""
    config, vision = model.config, model.config.vision_config
    text = torch.arange(60, 94)
    image = torch.full((64,), config.image_token_id)
    ids = torch.cat((text[:29], torch.tensor([config.vision_start_token_id]), image, text[28:]))[None]
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(256, patch, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 16, 16]]),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }
    accepted = inspect.signature(model.forward).parameters  # older versions find images by their token alone
    return {name: value for name, value in inputs.items() if name in accepted}


def generate(model, inputs, cache, new=4):
    return model.generate(**inputs, past_key_values=cache, max_new_tokens=new, do_sample=False)


def test_images_with_positions_on_several_axes_are_rejected_before_any_layer_runs():
    model = families.build("qwen2_5_vl")
    rerotated = CompressedCache(model, "streaming-llm", 24, sinks=20, window=4, rerotate=True)
    unrotated = CompressedCache(model, "expected-attention", 24)
    for cache, needed_by in ((rerotated, "rerotate=True"), (unrotated, "policy 'expected-attention'")):
        message = f"position_ids must be consecutive .* because {needed_by} rotates keys .* to images"
        with pytest.raises(ValueError, match=message):
            generate(model, image_prompt(model), cache)
        assert cache.get_seq_length() == 0
        ids = torch.arange(3, 43)[None]
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        generate(model, text, cache)  # text has the same position on each axis
        assert cache.report().tokens_seen == 43
    cache = CompressedCache(model, "capkv", 24)
    generate(model, image_prompt(model), cache)
    assert cache.report().tokens_seen == 103


def test_padding_may_count_as_positions_or_not():
    """`generate` does not count padding; a model that gets no positions does. Only differences matter."""
    model = tiny("llama")
    ids = torch.cat((torch.zeros(1, 10, dtype=torch.long), prompt(30)), dim=1)
    mask = (ids > 0).long()
    single = CompressedCache(model, "expected-attention", 16, evict="always", rerotate=True)
    with torch.no_grad():
        expected = model(prompt(30), past_key_values=single).logits[:, -1]
        for positions in (None, torch.arange(40)[None], (mask.cumsum(-1) - 1).clamp_min(0)):
            cache = CompressedCache(model, "expected-attention", 16, evict="always", rerotate=True)
            logits = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            assert torch.equal(cache.kept_positions(0), single.kept_positions(0))
        for wrong in (torch.arange(40)[None] * 2, torch.arange(40)[None] + 5):
            cache = CompressedCache(model, "expected-attention", 16)
            with pytest.raises(ValueError, match="position_ids must be consecutive numbers in each row"):
                model(ids, attention_mask=mask, position_ids=wrong, past_key_values=cache)


@pytest.mark.parametrize("options", [{"repair": True}, {"policy": "expected-attention"}, {"policy": "key-leverage"}])
def test_positions_may_begin_at_1(options):
    """Those of PaliGemma do. Only differences of positions matter, unless keys move to other positions."""
    model, pieces = tiny("llama"), prompt(48).split([40, 1, 7], 1)
    logits, kept = [], []
    for first in (0, 1):
        cache, start = CompressedCache(model, **{"policy": "capkv", "budget": 0.5, **options}), first
        for piece in pieces:
            positions = torch.arange(start, start + piece.shape[1])[None]
            with torch.no_grad():
                logits.append(model(piece, position_ids=positions, past_key_values=cache).logits)
            start += piece.shape[1]
        kept.append(cache.kept_positions(0))
    assert torch.equal(*kept)
    for one, other in zip(logits[:3], logits[3:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    rerotated = CompressedCache(model, "capkv", 0.5, rerotate=True)
    with pytest.raises(ValueError, match="position_ids must be consecutive numbers in each row, from 0, because"):
        model(pieces[0], position_ids=torch.arange(1, 41)[None], past_key_values=rerotated)


def test_paligemma_can_be_repaired():
    case = get_case("paligemma")
    assert CHECKS["repair"](case).support == "yes"


WINDOW = 128


@pytest.fixture(scope="module")
def short():
    """A model with a context window of 128 tokens."""
    return build("llama", max_position_embeddings=WINDOW)


def spans(cache):
    """For each compressed layer and head, from its first key to the next token, in rotary positions."""
    for layer in cache.compressed_layers:
        entries = layer.storage.entries
        rope, valid = entries.rope_positions, entries.positions >= 0
        first = rope.masked_fill(~valid, 10**6).amin(-1)
        yield from (cache.get_seq_length() - first).flatten().tolist()


@pytest.mark.parametrize("policy", ["capkv", "capkv-profile", "expected-attention", "streaming-llm"])
@pytest.mark.parametrize("allocation", ["equal", "pyramid", "adakv", "marginal", "profile"])
@pytest.mark.parametrize("budget", [60, 0.5])
def test_rerotated_keys_and_new_tokens_stay_in_the_window(short, policy, allocation, budget):
    cache = CompressedCache(short, policy, budget, allocation=allocation, evict="always", rerotate=True)
    ids = prompt(64).repeat(1, 6)
    heads = 6
    with torch.no_grad():
        for chunk in ids.split(64, dim=1):
            short(chunk, past_key_values=cache)
            kept = [head.tokens_kept for head in cache.report().heads]
            assert max(kept) <= WINDOW // 2
            seen = cache.get_seq_length()
            assert sum(kept) == heads * (min(60, seen) if budget == 60 else min(64, seen // 2))
            assert max(spans(cache)) <= WINDOW // 2
        for token in prompt(90)[0]:
            short(token.view(1, 1), past_key_values=cache)
            assert max(spans(cache)) <= WINDOW


def test_inputs_that_leave_the_window_are_rejected(short):
    ids = prompt(90).repeat(1, 2)
    cache = CompressedCache(short, "capkv", 40, evict="always", rerotate=True)
    message = r"input must have at most {} tokens with rerotate=True, .* window has 128 .* holds {} entries, got {}"
    with torch.no_grad():
        with pytest.raises(ValueError, match=message.format(128, 0, 129)):
            short(ids[:, :129], past_key_values=cache)
        short(ids[:, :90], past_key_values=cache)
        with pytest.raises(ValueError, match=message.format(88, 40, 89)):
            short(ids[:, :89], past_key_values=cache)
        short(ids[:, :88], past_key_values=cache)
        # Nothing is evicted after the prefill, so that generated tokens fill the window.
        once = CompressedCache(short, "capkv", 40, rerotate=True)
        short(ids[:, :90], past_key_values=once)
        short(ids[:, :88], past_key_values=once)
        with pytest.raises(ValueError, match=message.format(0, 128, 1)):
            short(ids[:, :1], past_key_values=once)


def test_budgets_of_more_than_half_the_window_are_rejected(short):
    for policy in ("capkv", "capkv-profile"):
        with pytest.raises(ValueError, match=r"budget must be at most 64 tokens with rerotate=True, .*, got 120"):
            CompressedCache(short, policy, 120, evict="always", rerotate=True)
        CompressedCache(short, policy, 64, evict="always", rerotate=True)
        CompressedCache(short, policy, 120, evict="always")
