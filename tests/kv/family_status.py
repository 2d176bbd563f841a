"""The expected status of each family of models: supported, refused with an error, or not tested for a reason."""

from __future__ import annotations

from dataclasses import dataclass

# The most used families, which every run of the tests checks.
FAST = (
    *("llama", "mistral", "mistral3", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5"),
    *("qwen3_5_moe", "gemma", "gemma2", "gemma3", "gemma3n_text", "gemma4", "phi", "phi3", "gpt_oss", "deepseek_v2"),
    *(
        "deepseek_v3",
        "glm4",
        "glm4_moe",
        "granite",
        "granitemoehybrid",
        "lfm2",
        "falcon",
        "falcon_h1",
        "olmo2",
        "olmo3",
    ),
    *("smollm3", "cohere2", "nemotron_h", "jamba", "kimi_k25", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "gpt2"),
    *("bart", "t5", "whisper"),
)


@dataclass(frozen=True)
class Refusal:
    """A kind of models that are refused.

    Args:
        reason: what the support page says.
        pattern: regular expression that the error must contain.
        families: the families.

    """

    reason: str
    pattern: str
    families: tuple[str, ...]


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "it has no attention, and so no KV cache",
        "must have a KV cache, got",
        ("falcon_mamba", "mamba", "mamba2"),
    ),
    Refusal(
        "its attention does not go through the attention interface of transformers",
        "must call transformers' attention interface",
        (
            *("big_bird", "blip", "bloom", "codegen", "cpmant", "falcon", "fsmt", "git", "gpt_neox_japanese"),
            *("gptj", "led", "megatron-bert", "mpt", "mvp", "prophetnet", "rembert", "roformer", "speecht5"),
            *("trocr", "xglm"),
        ),
    ),
    Refusal(
        "some layers share one attention module, or have none that calls the attention interface of transformers",
        "must have an attention module in each layer of its cache",
        ("gpt_neo", "hrm_text", "openai-gpt", "xlm"),
    ),
    Refusal(
        "transformers cannot make a cache from its configuration",
        "must have a configuration from which a DynamicCache can be made",
        ("blt", "pi0"),
    ),
    Refusal(
        "it makes a cache of its own kind",
        "must use the DynamicCache of transformers",
        ("minimax", "reformer", "rwkv", "xlnet", "xlstm"),
    ),
    Refusal(
        "its attention changes keys or values after they come from the cache",
        "must pass the keys and values of its cache to its attention as they are",
        ("diffllama", "idefics", "jetmoe", "moonshine", "moonshine_streaming", "t5gemma2"),
    ),
    Refusal(
        "it computes a mask from the values in the cache",
        "must read the keys and values of its cache in its attention only",
        ("doge",),
    ),
    Refusal(
        "its attention adds a bias to the logits, or reads something other than queries, keys, values and a mask",
        "must have attention that depends on queries, keys, values and a mask only",
        (
            *("dots3_note", "dots3_note_text", "inkling2", "inkling2_text", "inkling_mm_model", "inkling_text"),
            *("longt5", "minimax_m3_vl", "minimax_m3_vl_text", "mt5", "pix2struct", "pop2piano"),
            *("switch_transformers", "t5", "udop", "umt5"),
        ),
    ),
    Refusal(
        "an indexer selects the entries that its layers read",
        "whose cache consists of DynamicIndexedLayer",
        (
            *("axk2", "deepseek_v32", "glm5_next", "glm_moe_dsa", "hy_v4", "mistral_large4", "qwen4_exp"),
            *("qwen4_exp_text",),
        ),
    ),
    Refusal(
        "its layers keep compressed or reference states instead of keys and values",
        "whose cache consists of (DeepseekV4|UnlimitedOcr)",
        ("deepseek_v4", "unlimited_ocr"),
    ),
    Refusal(
        "its decoder needs the output of the encoder, so that no head profile can be measured",
        "must run on tokens alone, so that its head profile can be measured",
        ("canary", "cohere_asr", "t5gemma"),
    ),
)

_AUDIO = "it takes audio only"
_IMAGE = "it needs an image"
_INSIDE = "its `generate` runs the language model inside it: make a cache of `model.language_model`"

# Families that do not run with their own cache if text is the only input: the reason, and a pattern of the error.
NOT_RUNNABLE: dict[str, tuple[str, str]] = {
    "blip-2": (_INSIDE, "missing 1 required positional argument: 'pixel_values'"),
    "dia": (_AUDIO, "shape '.*' is invalid"),
    "diffusion_gemma": ("it generates blocks of tokens by diffusion", "stack"),
    "instructblip": (_INSIDE, "missing 2 required positional arguments: 'pixel_values'"),
    "instructblipvideo": (_INSIDE, "missing 2 required positional arguments: 'pixel_values'"),
    "kosmos-2": (_IMAGE, "You have to specify either `pixel_values` or `image_embeds`"),
    "kyutai_speech_to_text": (_AUDIO, "The size of tensor a"),
    "musicgen": (_AUDIO, "shape '.*' is invalid"),
    "musicgen_melody": (_AUDIO, "shape '.*' is invalid"),
    "qwen2_5_omni": ("only its thinker has a cache: see qwen2_5_omni_thinker", "_forward_unimplemented"),
    "qwen3_omni_moe": ("only its thinker has a cache: see qwen3_omni_moe_thinker", "_forward_unimplemented"),
    "vibevoice": ("it needs the package diffusers", "requires `diffusers`"),
    "voxtral_realtime": (_AUDIO, "exactly one of input_features or encoder_inputs_embeds"),
}

# Families that do not work yet. Remove a family from this list when it works.
KNOWN_FAILURES: tuple[str, ...] = ()
KNOWN_FAILURES_OLDEST: tuple[str, ...] = ()  # with transformers before 5.23


def refusal_of(family: str) -> Refusal | None:
    """Return how a family is refused; None if it is not."""
    return next((refusal for refusal in REFUSALS if family in refusal.families), None)
