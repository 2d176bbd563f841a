"""Tiny random models of every family that transformers registers for generation.

`build(family)` shrinks the family's default configuration by rules and draws random weights. Configurations that the
rules cannot shrink are listed in `_EXCEPTIONS`, and families that cannot be built here in `NOT_BUILDABLE`, each with
the reason.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 128
LAYERS = 4
WINDOW = 16  # of layers with sliding-window attention
_HIDDEN = 64
_HEAD_DIM = 16
_STD = 0.2  # standard deviation of weights, with which attention is neither uniform nor concentrated on one token
_MAPPINGS = (  # a family that is in several has the class of the first
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
)

# Families that cannot be built here.
_TIMM = "its vision tower needs the package timm"
_ASSISTANT = "it drafts tokens for another model, whose keys and values it reads"
NOT_BUILDABLE: dict[str, str] = {
    "fast_vlm": _TIMM,
    "gemma3n": _TIMM,
    "perception_lm": _TIMM,
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
}

# ---- Rules -----------------------------------------------------------------------------------------------------------

# For each name of an integer in a configuration, the largest value to use.
_SIZES: dict[str, int] = {}
for _size, _names in (
    (
        _HIDDEN,
        "hidden_size d_model n_embd dim embed_dim emb_dim word_embed_proj_dim embedding_size out_hidden_size "
        "text_hidden_size projection_dim encoder_hidden_size projector_hidden_size intermediate_size ffn_dim "
        "encoder_ffn_dim decoder_ffn_dim d_ff mlp_dim n_inner ffn_hidden_size moe_intermediate_size "
        "shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size intermediate_size_mlp "
        "dense_intermediate_size dim_ff projector_intermediate_size moe_shared_expert_intermediate_size "
        "mlp_hidden_size lru_width codebook_dim audio_hidden_size attention_hidden_size base_channels latent_channels "
        "image_token_embed_dim num_embeddings hidden_dim upsample_initial_channel shape_embed_dim dff d_inner "
        "pronunciation_embed_dim embedding_dim vision_output_dim projector_input_dim projector_output_dim "
        "vision_hidden_size ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels output_channels "
        "conv_dim hidden_sizes hidden_size_global cross_hidden_size downsample_hidden_size output_dim "
        "thinker_hidden_size encoder_hash_byte_group_vocab enc_dim enc_emb_dim downsample_channels adapter_in_dim "
        "adapter_out_dim adapter_input_size",
    ),
    (
        2 * _HIDDEN,
        "mamba_d_ssm",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
        "swa_num_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts "
        "linear_num_value_heads num_query_tokens mm_tokens_per_image resampler_n_latents cross_num_attention_heads "
        "zero_expert_num",
    ),
    (
        2,
        "num_key_value_heads swa_num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk "
        "moe_k top_k_experts moe_top_k linear_num_key_heads linear_num_heads index_n_heads type_vocab_size",
    ),
    (
        1,
        "n_group num_group num_expert_group topk_group",
    ),
    (
        8,
        "mamba_n_heads mamba_num_heads n_mamba_heads qk_rope_head_dim rotary_dim patch_size",
    ),
    (
        _HEAD_DIM,
        "head_dim swa_head_dim global_head_dim v_head_dim qk_nope_head_dim kv_channels d_kv dim_head index_head_dim "
        "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_d_state state_size ssm_state_size "
        "mamba_chunk_size chunk_size num_mel_bins hidden_size_per_layer_input mamba_d_head mamba_head_dim "
        "mamba_headdim cross_head_dim num_filters n_filters",
    ),
    (
        24,
        "q_lora_rank",
    ),
    (
        32,
        "kv_lora_rank image_size",
    ),
    (
        2048,
        "max_position_embeddings n_positions max_source_positions max_target_positions seq_length",
    ),
    (
        VOCABULARY,
        "vocab_size vocab_size_per_layer_input encoder_vocab_size decoder_vocab_size src_vocab_size tgt_vocab_size "
        "shape_vocab_size pronunciation_vocab_size num_embeds",
    ),
    (
        WINDOW,
        "sliding_window sliding_window_size attention_window_size attention_chunk_size",
    ),
):
    _SIZES |= dict.fromkeys(_names.split(), _size)
_WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size")
_DEPTHS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth", "layers"),
    *("num_decoder_layers", "num_encoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers"),
)
_DROPPED = ("id2label", "label2id", "torch_dtype", "dtype", "transformers_version", "architectures", "_name_or_path")


def _mrope(*section: int) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}


# Changes to the small configuration of a model type, also if it is part of another configuration. They are needed where
# the rules do not give a valid model.
_EXCEPTIONS: dict[str, dict[str, Any]] = {
    # Configurations whose default values do not give a valid model.
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
        "layer_types": ["full_attention"] * LAYERS,
    },
    "dbrx": {"attn_config": {"model_type": "", "kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense"] + ["sparse"] * 3, "num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": _HIDDEN},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "2/4", "spatial_target_layers": [1]},
    "hunyuan_v1_dense": {"head_dim": _HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": _HEAD_DIM},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "ministral": {"head_dim": _HEAD_DIM},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "nemotron": {"num_key_value_heads": 2, "head_dim": _HEAD_DIM},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 9},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 9},
    "step3p5": {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": WINDOW},
    "xmod": {"default_language": "en_XX"},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": _HIDDEN},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    # Sizes that depend on one another.
    "dots3_note_text": {"head_dim": _HEAD_DIM + 8},
    "ernie4_5_vl_moe_text": {"rope_parameters": _mrope(3, 3, 2)},
    "glm4v_text": {"rope_parameters": _mrope(4, 2, 2)},
    "glm_ocr_text": {"rope_parameters": _mrope(4, 2, 2)},
    "paddleocr_vl_text": {"rope_parameters": _mrope(4, 2, 2)},
    "qwen2_5_omni_text": {"rope_parameters": _mrope(4, 2, 2)},
    "qwen2_5_vl_text": {"rope_parameters": _mrope(4, 2, 2)},
    "qwen2_vl_text": {"rope_parameters": _mrope(4, 2, 2)},
    "hunyuan_vl_text": {"head_dim": _HEAD_DIM, "rope_parameters": _mrope(4, 2, 2)},
    "glm4v_moe_text": {"rope_parameters": _mrope(2, 1, 1) | {"partial_rotary_factor": 0.5}},
    "blenderbot": {"decoder_layers": 2, "encoder_layers": 2, "num_hidden_layers": 2},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "zamba": {"attention_hidden_size": 2 * _HIDDEN, "attention_head_dim": 2 * _HIDDEN // 4},
    "zamba2": {
        "hybrid_layer_ids": [2, 3],
        "attention_hidden_size": 2 * _HIDDEN,
        "attention_head_dim": 2 * _HIDDEN // 4,
    },
    "falcon_h1": {"mamba_d_head": 16},
    "mamba2": {"num_heads": 8},
    "mimi": {"upsample_groups": 64},
    "molmo2_adapter": {"vision_feature_layer": [3, 2]},
    "vibevoice_acoustic_tokenizer": {"num_filters": 2, "depths": [1] * 7},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "depths": [1] * 7},
    "xlnet": {"d_head": _HEAD_DIM},
}
_EXCEPTIONS_OF_PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3_omni_moe": {"talker_config": {"spatial_merge_size": 2}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
}


@functools.cache
def model_classes() -> dict[str, str]:
    """Return the name of the model class of each family, by model type."""
    found: dict[str, str] = {}
    for mapping in _MAPPINGS:
        for family, names in getattr(modeling_auto, mapping, {}).items():
            for name in (names,) if isinstance(names, str) else names:
                if family not in found or not _takes(found[family], family):
                    found[family] = name
    return found


def _takes(class_name: str, family: str) -> bool:
    """Return whether a model class takes the configuration of the whole family, not only that of its text model."""
    expected = getattr(transformers, class_name).config_class
    return expected is None or expected is CONFIG_MAPPING[family]


def families() -> list[str]:
    """Return the model types of all families."""
    return sorted(set(model_classes()) - set(NOT_BUILDABLE))


def _layer_indices(config: dict[str, Any], depth: int) -> list[int]:
    """Return which layers of a configuration to keep: at least one of every kind, and at least `LAYERS`."""
    lists = [value for value in config.values() if _is_per_layer(value, depth)]
    shared = config.get("num_kv_shared_layers") or 0
    lists.append([index >= depth - shared for index in range(depth)])
    kinds = list(zip(*lists, strict=True))
    seen: dict[Any, int] = {}
    ranked: list[tuple[int, int]] = []
    for index, kind in enumerate(kinds):
        seen[kind] = seen.get(kind, 0) + 1
        ranked.append((seen[kind], index))
    number = max(LAYERS, min(len(seen), 2 * LAYERS))
    return sorted(index for _, index in sorted(ranked)[:number])


def _is_per_layer(value: Any, depth: int) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != depth:
        return False
    return not any(isinstance(entry, (list, dict)) for entry in value) and len(set(value)) <= LAYERS


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    """Return the dictionary of a configuration with small sizes."""
    depth_name = next((name for name in _DEPTHS if isinstance(config.get(name), int)), None)
    depth = config[depth_name] if depth_name else len(config.get("layers_block_type") or ())
    layers = _layer_indices(config, depth)
    small = {name: _shrink_entry(name, value, depth, layers) for name, value in config.items() if name not in _DROPPED}
    if config.get("num_kv_shared_layers"):
        small["num_kv_shared_layers"] = sum(index >= depth - config["num_kv_shared_layers"] for index in layers)
    if "qk_rope_head_dim" in config:  # latent attention: other head dimensions derive from these
        if config.get("head_dim") == config["qk_rope_head_dim"]:
            small["head_dim"] = small["qk_rope_head_dim"]
        if "qk_head_dim" in config:
            small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    if config.get("num_key_value_heads") == config.get("num_attention_heads") is not None:
        small["num_key_value_heads"] = small["num_attention_heads"]
    model_type = config.get("model_type", "")
    for part, changes in _EXCEPTIONS_OF_PARTS.get(model_type, {}).items():
        small[part] |= changes
    return {**small, **_EXCEPTIONS.get(model_type, {})}


def _shrink_entry(name: str, value: Any, depth: int, layers: list[int]) -> Any:
    if isinstance(value, dict):
        if name == "per_layer_config":
            own = {int(key): entry for key, entry in value.items()}
            return {str(new): shrink(own[old]) for new, old in enumerate(layers) if old in own}
        if name.startswith("rope_"):
            return _shrink_rope(value)
        return shrink(value) if name.endswith("_config") or "model_type" in value else value
    if name == "is_decoder":
        return True  # otherwise, models such as BERT attend to later tokens and have no cache
    if isinstance(value, int) and not isinstance(value, bool):
        if name in _DEPTHS:
            return len(layers) if value == depth else min(value, LAYERS)
        if name.endswith(("token_id", "token_index")) and value >= VOCABULARY:
            return 3 + sum(map(ord, name)) % 100
        return min(value, _SIZES.get(name, value))
    if isinstance(value, (list, tuple)):
        if name.endswith("token_id"):
            return [min(entry, 1) for entry in value]
        if depth and len(value) == depth:
            value = [value[index] for index in layers]
        if name in _SIZES and all(isinstance(entry, int) for entry in value):
            return [min(entry, _SIZES[name]) for entry in value]
    return value


def _shrink_rope(value: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, entry in value.items():
        if isinstance(entry, dict):
            small[name] = _shrink_rope(entry)
        elif name == "mrope_section" and len(entry) == 3:
            small[name] = [4, 2, 2]
        elif name in ("short_factor", "long_factor") and isinstance(entry, list):
            small[name] = entry[: _HEAD_DIM // 2]
        else:
            small[name] = entry
    return small


# ---- Models ----------------------------------------------------------------------------------------------------------


def tiny_config(family: str, window: int = WINDOW) -> PreTrainedConfig:
    """Return a small configuration of a family.

    Args:
        family: the model type.
        window: length of sliding windows.

    """
    config_class = CONFIG_MAPPING[family]
    config = config_class.from_dict(shrink(config_class().to_dict()))
    expected = getattr(transformers, model_classes()[family]).config_class
    for part in config.sub_configs:
        if expected is not type(config) and type(getattr(config, part)) is expected:
            config = getattr(config, part)
    for part in (config, *(getattr(config, name) for name in config.sub_configs)):
        for name in _WINDOWS:
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, window)
    return config


def implementations(family: str) -> tuple[str, ...]:
    """Return the attention implementations that the model class of a family accepts, `sdpa` first."""
    return tuple(name for name in ("sdpa", "eager") if _create(family, name) is not None)


def build(family: str, seed: int = 0, window: int = WINDOW) -> PreTrainedModel:
    """Return a new random model of a family in evaluation mode, with `sdpa` if the family supports it.

    Raises:
        ValueError: the family supports neither `sdpa` nor `eager`.

    """
    for implementation in ("sdpa", "eager"):
        model = _create(family, implementation, seed, window)
        if model is not None:
            randomize(model, seed)
            return model.eval()
    raise ValueError(f"{family} supports neither sdpa nor eager attention")


def _create(family: str, implementation: str, seed: int = 0, window: int = WINDOW) -> PreTrainedModel | None:
    """Return a model with the weights of its own initialization; None if it does not support the implementation."""
    torch.manual_seed(seed)
    model_class = getattr(transformers, model_classes()[family])
    try:
        return model_class._from_config(tiny_config(family, window), attn_implementation=implementation)
    except ValueError as error:
        if "does not support an attention implementation" not in str(error):
            raise
        return None


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Draw weights that make attention uneven and norms different, so that errors change the output."""
    generator = torch.Generator().manual_seed(seed)

    def noise(parameter: torch.Tensor) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)

    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        is_matrix = type(owner).__name__ in ("Linear", "Conv1D", "Embedding") or "expert" in name
        if parameter.ndim >= 2 and is_matrix and parameter.is_floating_point():
            parameter.data = _STD * noise(parameter)
        elif parameter.ndim == 1 and ("norm" in name or "ln" in name or "sink" in name):
            parameter.data += 0.3 * noise(parameter)
        elif parameter.ndim == 1 and name.endswith("bias") and type(owner).__name__ == "Linear":
            parameter.data += 0.1 * noise(parameter)
