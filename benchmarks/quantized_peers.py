"""Other ways to quantize a KV cache, applied to the keys and values of one layer.

Each function returns the keys and values that a cache would read back, and the bytes that it would store. Scales and
zeros, and entries in full precision, are stored in 16 bits.

* `kivi`: as in KIVI (2402.02750). Keys have a scale and a zero for each channel and 32 tokens, values for each token
  and 32 channels. The last 32 values stay in full precision, and the last 32 to 63 keys, because keys are quantized in
  blocks.
* `per-token`: a scale and a zero for each token and 32 channels, for keys and values, without any transform. The first
  4 and the last 32 entries stay in full precision.
* `quanto`, `hqq`: the quantized layers of transformers, with groups of 64 channels of a token. They quantize the whole
  prompt.
* `fp8`: `float8_e4m3fn` with a scale for each key and for each value. The whole prompt is quantized.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import cache_utils

GROUP_SIZE = 32
LIBRARY_GROUP_SIZE = 64  # the default of transformers' quantized layers
NUM_RECENT = 32
NUM_FIRST = 4
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Quantized:
    """What a cache of one layer reads back and stores.

    Args:
        keys: dequantized keys [batch, num_key_value_heads, tokens, head_dim].
        values: dequantized values [batch, num_key_value_heads, tokens, value_dim].
        num_bytes: bytes of the stored keys and values.

    """

    keys: Tensor
    values: Tensor
    num_bytes: float


@dataclass(frozen=True)
class Peer:
    """A way to quantize.

    Args:
        quantize: takes keys, values and the number of bits.
        bits: the numbers of bits that it supports here.
        package: the package that it needs.

    """

    quantize: Callable[[Tensor, Tensor, int], Quantized]
    bits: tuple[int, ...]
    package: str = "torch"

    @property
    def is_installed(self) -> bool:
        """Whether the package can be imported."""
        try:
            return importlib.util.find_spec(self.package) is not None
        except ModuleNotFoundError:  # a parent package is missing
            return False


def round_to_grid(groups: Tensor, bits: int) -> Tensor:  # [..., group]
    """Quantize each group to evenly spaced numbers from its minimum to its maximum, and dequantize it."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    # Stored in 16 bits.
    low, scale = low.half().float(), ((high - low) / (2**bits - 1)).half().float()
    codes = torch.where(scale > 0, (groups - low) / scale, 0).round().clamp(0, 2**bits - 1)
    return (low + scale * codes).to(groups.dtype)


def per_token_groups(entries: Tensor, bits: int) -> Tensor:  # [batch, heads, tokens, dim]
    """Quantize groups of channels of each token."""
    return round_to_grid(entries.unflatten(-1, (-1, GROUP_SIZE)), bits).flatten(-2)


def per_channel_groups(entries: Tensor, bits: int) -> Tensor:  # [batch, heads, tokens, dim]
    """Quantize groups of tokens of each channel; the number of tokens must be a multiple of the group size."""
    groups = entries.unflatten(2, (-1, GROUP_SIZE)).transpose(3, 4)
    return round_to_grid(groups, bits).transpose(3, 4).flatten(2, 3)


def num_bytes(num_quantized: int, num_full: int, bits: int, group_size: int = GROUP_SIZE) -> float:
    """Return the bytes of quantized numbers with a scale and a zero for each group, and of numbers in 16 bits."""
    return num_quantized * bits / 8 + num_quantized / group_size * 4 + num_full * 2


def kivi(keys: Tensor, values: Tensor, bits: int) -> Quantized:
    num_values = max(0, values.shape[2] - NUM_RECENT)
    num_keys = num_values // GROUP_SIZE * GROUP_SIZE
    old_keys, new_keys = keys[:, :, :num_keys], keys[:, :, num_keys:]
    old_values, new_values = values[:, :, :num_values], values[:, :, num_values:]
    return Quantized(
        torch.cat((per_channel_groups(old_keys, bits), new_keys), dim=2),
        torch.cat((per_token_groups(old_values, bits), new_values), dim=2),
        num_bytes(old_keys.numel() + old_values.numel(), new_keys.numel() + new_values.numel(), bits),
    )


def per_token(keys: Tensor, values: Tensor, bits: int) -> Quantized:
    stop = max(NUM_FIRST, keys.shape[2] - NUM_RECENT)

    def quantize(entries: Tensor) -> Tensor:
        middle = per_token_groups(entries[:, :, NUM_FIRST:stop], bits)
        return torch.cat((entries[:, :, :NUM_FIRST], middle, entries[:, :, stop:]), dim=2)

    num_quantized = sum(entries[:, :, NUM_FIRST:stop].numel() for entries in (keys, values))
    num_full = keys.numel() + values.numel() - num_quantized
    return Quantized(quantize(keys), quantize(values), num_bytes(num_quantized, num_full, bits))


def fp8(keys: Tensor, values: Tensor, bits: int = 8) -> Quantized:
    def quantize(entries: Tensor) -> Tensor:
        scale = (entries.abs().amax(-1, keepdim=True) / torch.finfo(FP8).max).half().float()
        scaled = torch.where(scale > 0, entries / scale, 0).clamp(torch.finfo(FP8).min, torch.finfo(FP8).max)
        return (scaled.to(FP8).float() * scale).to(entries.dtype)

    num_scales = sum(entries[..., 0].numel() for entries in (keys, values))
    return Quantized(quantize(keys), quantize(values), keys.numel() + values.numel() + 2 * num_scales)


def library_layer(name: str, axis: int) -> Callable[[Tensor, Tensor, int], Quantized]:
    """Return a function that quantizes in a layer of transformers.

    Args:
        name: name of the layer's class.
        axis: the axis for which a group consists of channels of one token.

    """

    def quantize(keys: Tensor, values: Tensor, bits: int) -> Quantized:
        layer = getattr(cache_utils, name)(
            nbits=bits, axis_key=axis, axis_value=axis, q_group_size=LIBRARY_GROUP_SIZE, residual_length=NUM_RECENT
        )
        tokens = keys.shape[2]
        # hqq packs the numbers of up to 4 groups into a byte, and fails if some are left over.
        repeated = torch.arange(-(-tokens // 4) * 4).clamp(max=tokens - 1)
        layer.update(keys[:, :, repeated], values[:, :, repeated])
        read = [entries[:, :, :tokens] for entries in layer.update(keys[:, :, :0], values[:, :, :0])]
        return Quantized(*read, num_bytes(keys.numel() + values.numel(), 0, bits, LIBRARY_GROUP_SIZE))

    return quantize


PEERS = {
    "kivi": Peer(kivi, (8, 4, 3, 2)),
    "per-token": Peer(per_token, (8, 4, 3, 2)),
    "quanto": Peer(library_layer("QuantoQuantizedLayer", 0), (4, 2), "optimum.quanto"),
    "hqq": Peer(library_layer("HQQQuantizedLayer", 1), (4, 2), "hqq"),
    "fp8": Peer(fp8, (8,)),
}
