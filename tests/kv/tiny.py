"""Tiny random models of the supported families, their inputs, and a tokenizer."""

from __future__ import annotations

import functools
from typing import Any

import tokenizers
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from suffice.kv.eval.tasks import python_manual

VOCABULARY = 97
TOKENS = 400  # vocabulary of `tokenizer`
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
_CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_SHARED),
    "qwen2": lambda: Qwen2Config(**_SHARED),
    "qwen3": lambda: Qwen3Config(**_SHARED, head_dim=16),
    "mistral": lambda: MistralConfig(**_SHARED, sliding_window=None),
    "phi3": lambda: Phi3Config(**_SHARED),
    "gemma3": lambda: Gemma3TextConfig(
        **{**_SHARED, "num_hidden_layers": 4},
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
    "mixtral": lambda: MixtralConfig(**_SHARED, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
}
FAMILIES = tuple(_CONFIGS)


def build(family: str, attn: str = "sdpa", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a new random model of a family in evaluation mode, with changes to its configuration."""
    torch.manual_seed(seed)
    config = _CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            # With the initial norm weights, all keys would have the same length.
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@functools.cache
def tiny(family: str, attn: str = "sdpa") -> PreTrainedModel:
    """Return a model of a family that all tests share."""
    return build(family, attn)


def prompt(length: int, seed: int = 0, rows: int = 1) -> torch.Tensor:
    """Return random token ids, [rows, length], without padding.

    No token occurs twice in a row of the batch, because equal keys in the first layer would tie under policies that
    score by norms.
    """
    generator = torch.Generator().manual_seed(1000 * seed + length)
    rows_ids = [torch.randperm(VOCABULARY - 2, generator=generator)[:length] + 2 for _ in range(rows)]
    return torch.stack(rows_ids)


def left_padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return prompts of different lengths, each [1, length], as one batch that is padded on the left."""
    width = max(p.shape[1] for p in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, own in enumerate(prompts):
        ids[row, width - own.shape[1] :] = own[0]
        mask[row, width - own.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def answer(model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: Any = None, new: int = 6) -> Any:
    """Return `new` greedily generated tokens, [rows, new]."""
    inputs = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
    with torch.no_grad():
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=new, do_sample=False)
    return out[:, inputs["input_ids"].shape[1] :]


@functools.cache
def tokenizer(chat: bool = False) -> Any:
    """Return a byte-level tokenizer with 400 tokens, trained on part of Python's manual."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([python_manual()[:50_000]], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", clean_up_tokenization_spaces=False)
    if chat:
        made.chat_template = (
            "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}<end>{% endfor %}"
            "{% if add_generation_prompt %}[assistant] {% endif %}"
        )
    return made
