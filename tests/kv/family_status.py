"""The expected status of each family of models: supported, refused with an error, or not tested for a reason.

`REFUSALS` are models that no compressed cache can be made for, `LIMITS` those that lack a feature.
"""

from __future__ import annotations

import re
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


# ---- Features --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A kind of models for which the answer to some checks differs from whether the default is supported.

    Args:
        checks: the checks, from `family_checks.CHECKS`.
        support: their answer.
        families: the families.
        reason: what the support page says; empty if its legend says it.
        pattern: regular expression that the reason of the check must contain.

    """

    checks: tuple[str, ...]
    support: str
    families: tuple[str, ...]
    reason: str = ""
    pattern: str = ""


# Families with an encoder, whose decoder reads its output. Those in NOT_RUNNABLE are left out.
ENCODER_DECODERS: tuple[str, ...] = (
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "canary", "cohere_asr", "encoder-decoder"),
    *("florence2", "fsmt", "led", "longt5", "m2m_100", "marian", "mbart"),
    *("moonshine", "moonshine_streaming", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x"),
    *("pix2struct", "plbart", "pop2piano", "pp_formulanet", "prophetnet", "seamless_m4t", "seamless_m4t_v2"),
    *("speech-encoder-decoder", "speech_to_text", "speecht5", "switch_transformers", "t5", "t5gemma", "t5gemma2"),
    *("udop", "umt5", "vision-encoder-decoder", "whisper"),
)
_NO_PROFILE: tuple[str, ...] = (
    "canary",
    "cohere_asr",
    "t5gemma",
)
_LATENTS: tuple[str, ...] = (
    *("axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k25", "kimi_linear"),
    *("longcat_flash", "minicpm3", "mistral4", "youtu"),
)
# In their default configuration; checkpoints may have other layers.
_SLIDING: tuple[str, ...] = (
    "idefics2",
    "ministral",
    "mistral",
    "moshi",
    "recurrent_gemma",
)
_NOT_REPLAYED: tuple[str, ...] = tuple(
    family for family in ENCODER_DECODERS if family in _NO_PROFILE or refusal_of(family) is None
)

_NO_ENCODER = Difference(("cross",), "–", (), pattern="it has no encoder")
DIFFERENCES: tuple[Difference, ...] = (
    Difference(("equal",), "yes", _NO_PROFILE),
    Difference(
        ("always", "bits", "repair", "flash"),
        "part",
        _NO_PROFILE,
        "with `capkv` only: its decoder needs the output of the encoder, so that no head profile can be measured",
        "so that its head profile can be measured",
    ),
    # Refused by the cache of self-attention only.
    Difference(
        ("cross",),
        "yes",
        (
            "canary",
            "cohere_asr",
        ),
    ),
    Difference(
        ("cross",),
        "no",
        ("fsmt", "t5gemma2"),
        "no decoder with cross-attention is found in it",
        "must have a decoder with cross-attention",
    ),
    Difference(
        ("cross",),
        "no",
        ("t5gemma",),
        "its attention changes the keys and values between the cache and the attention function",
        "must pass the keys and values of its cache to its attention as they are",
    ),
    Difference(
        ("replay",),
        "no",
        _NOT_REPLAYED,
        "a replay supports decoders without an encoder only",
        "supports decoders without an encoder only",
    ),
    Difference(
        ("replay",),
        "no",
        _SLIDING,
        "all its layers have a sliding window in its default configuration, so that the repeated text cannot read the "
        "whole prompt",
        "all of whose layers have a sliding window",
    ),
    Difference(
        ("repair",),
        "no",
        _SLIDING,
        "all its layers have a sliding window in its default configuration, which the entries that a repair replaces "
        "leave",
        "all of whose layers have a sliding window",
    ),
    Difference(
        ("replay",),
        "part",
        _LATENTS,
        'with `allocation="equal"` only: its heads share cached latents, so that there cannot be one threshold for all '
        "heads of the model",
        "caches latents that all heads share",
    ),
    Difference(("repair",), "no", _LATENTS, "its heads share cached latents", "heads share cached latents"),
    Difference(
        ("replay",),
        "part",
        (
            *("bert", "bert-generation", "biogpt", "camembert", "ctrl", "data2vec-text", "dbrx"),
            *("electra", "ernie", "fuyu", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neox"),
            *("kosmos-2.5", "lfm2", "lfm2_moe", "lfm2_vl", "modernbert-decoder", "opt", "persimmon"),
            *("phi", "roberta", "roberta-prelayernorm", "roc_bert", "xlm-roberta", "xlm-roberta-xl", "xmod"),
        ),
        "with `kvzip` only: its attention has no linear layer `o_proj`, which the scores of `kvgrad` need",
        "no linear layer named `o_proj`",
    ),
    Difference(
        ("flash",),
        "–",
        (
            *("axk2", "big_bird", "bigbird_pegasus", "bloom", "codegen", "deepseek_v32", "deepseek_v4"),
            *("doge", "dots3_note", "dots3_note_text", "evolla", "fsmt", "git", "glm5_next"),
            *(
                "glm_moe_dsa",
                "gpt_neox_japanese",
                "hy_v4",
                "inkling2",
                "inkling2_text",
                "inkling_mm_model",
                "inkling_text",
            ),
            *("led", "llama4", "llama4_text", "longt5", "megatron-bert", "minimax_m3_vl", "minimax_m3_vl_text"),
            *("mistral_large4", "mllama", "mpt", "mt5", "mvp", "nllb-moe", "pix2struct"),
            *("pop2piano", "pp_formulanet", "qwen4_exp", "qwen4_exp_text", "rembert", "roformer", "seamless_m4t"),
            *("seamless_m4t_v2", "speech_to_text", "speecht5", "step3p7", "switch_transformers", "t5", "t5gemma2"),
            *("trocr", "udop", "umt5", "xglm"),
        ),
        pattern="transformers does not let it use FlashAttention",
    ),
    Difference(
        ("flash",),
        "–",
        (
            "gpt-sw3",
            "gpt2",
        ),
        "not tested: transformers does not run it with FlashAttention in float32, with its own cache either",
        "does not run with flash_attention_2",
    ),
)


def difference_of(family: str, check: str) -> Difference | None:
    """Return how the answer to a check differs from whether the default is supported; None if it does not."""
    if check == "cross" and family not in ENCODER_DECODERS:
        return _NO_ENCODER
    return next((one for one in DIFFERENCES if family in one.families and check in one.checks), None)


def expected_support(family: str, check: str) -> str:
    """Return the expected answer to a check of a feature, for a family that can be tested."""
    difference = difference_of(family, check)
    if difference is not None:
        return difference.support
    return "yes" if refusal_of(family) is None else "no"


def reason_of(family: str, check: str, reason: str) -> str:
    """Return what the support page says of the reason that a check of a family gave.

    Raises:
        ValueError: another reason was expected.

    """
    expected = difference_of(family, check) or refusal_of(family)
    if expected is None or not re.search(expected.pattern, reason):
        raise ValueError(f"the reason of check {check!r} for {family} must be the expected one, got {reason!r}")
    return expected.reason
