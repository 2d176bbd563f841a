"""Compare every kernel with float64 on the device. Log weights of two policies are computed from their formulas."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from suffice.kv import get_policy
from suffice.kv.attention.quantized_attention import ExactEntries, attend_quantized
from suffice.kv.backend.triton_backend import TRITON_BACKEND, fused_log_weights
from suffice.kv.policy.attention_stats import AttentionStats
from suffice.kv.policy.layer_context import EntryPositions
from suffice.kv.storage.base import Entries
from suffice.kv.storage.quantized_entries import QuantizedEntries
from suffice.kv.storage.ragged import PackedEntries, RaggedStorage, Tail
from suffice.kv.storage.vector_format import VectorFormat

if TYPE_CHECKING:
    from gpu import Run

MAX_ERRORS = {"log weights": 1e-4, "leverage": 1e-3, "capacity": 1e-4, "ragged attention": 1e-2, "compaction": 0.0}
# Rotated queries and the numbers that integers stand for are rounded to bfloat16, whose error is small beside that of 4
# bits. Of quantization, the error is the share of bytes that differ from those of plain PyTorch, because of ties.
MAX_ERRORS |= {"quantized attention": 3e-2, "quantization": 1e-3}
RIDGE = 0.1


def exact_log_weights(queries: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """Return the log weights of the policy `capkv`, for rows with at least 516 tokens.

    Args:
        queries: [batch, heads, tokens, dim].
        keys: [batch, kv_heads, tokens, dim].
        valid: boolean [batch, tokens].

    Returns:
        [batch, kv_heads, tokens].

    """
    heads, tokens, dim = keys.shape[1:]
    queries = queries.unflatten(1, (heads, -1))
    window = F.avg_pool1d(_window_attention(queries, keys, valid, 16), 5, stride=1, padding=2)
    recent = queries[..., -min(512, tokens) :, :].flatten(2, 3)
    variance = recent.var(2, correction=0)
    expected = keys @ recent.mean(2)[..., None] / dim**0.5 + keys.square() @ variance[..., None] / (2 * dim)
    return _sum_terms((window.log(), expected.squeeze(-1), -4 * _cosine(keys, valid)), (1, 1, 2), valid)


def exact_profile_log_weights(queries: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """Return the log weights of the policies `capkv-spread` and `capkv-profile`; see `exact_log_weights`."""
    heads, tokens, dim = keys.shape[1:]
    queries = queries.unflatten(1, (heads, -1))
    recent = queries[..., -min(512, tokens) :, :]
    logits = keys @ recent.mean(3).mT / dim**0.5 + keys.square() @ recent.var(3, correction=0).mT / (2 * dim)
    first = tokens - valid.sum(-1)
    normalized = valid & (torch.arange(tokens, device=keys.device) >= first[:, None] + 4)
    log_sum = logits.masked_fill(~normalized[:, None, :, None], float("-inf")).logsumexp(2, keepdim=True)
    expected = (logits - log_sum).logsumexp(-1)
    sampled = torch.zeros_like(expected)
    for row in range(len(keys)):
        start = int(first[row])
        length = tokens - start
        for number in range(1, 17):
            query = start + (number * length + 15) // 16 - 1
            end = query - 31
            if end > start:
                attention = (queries[row, :, :, query] @ keys[row, :, start:end].mT / dim**0.5).softmax(-1)
                sampled[row, :, start:end] += attention.mean(1)
    terms = (_window_attention(queries, keys, valid, 8).log(), expected, -4 * _cosine(keys, valid), sampled.log())
    return _sum_terms(terms, (3, 1, 1, 1), valid)


def _window_attention(queries: Tensor, keys: Tensor, valid: Tensor, window_size: int) -> Tensor:
    index = torch.arange(keys.shape[2], device=keys.device)
    hidden = (index > index[-window_size:, None]) | ~valid[:, None, None, None]
    logits = queries[..., -window_size:, :] @ keys[:, :, None].mT / keys.shape[3] ** 0.5
    return logits.masked_fill(hidden, float("-inf")).softmax(-1).mean((2, 3))


def _cosine(keys: Tensor, valid: Tensor) -> Tensor:
    unit = F.normalize(keys, dim=-1) * valid[:, None, :, None]
    return (unit @ F.normalize(unit.sum(2), dim=-1)[..., None]).squeeze(-1)


def _sum_terms(log_terms: tuple[Tensor, ...], factors: tuple[float, ...], valid: Tensor) -> Tensor:
    """Return the log of the sum of the terms, each divided by its sum over the tokens and multiplied by its factor."""
    masked = [x.masked_fill(~valid[:, None], float("-inf")) for x in log_terms]
    shares = [x - x.logsumexp(-1, keepdim=True) + math.log(c) for x, c in zip(masked, factors, strict=True)]
    return torch.stack(shares).logsumexp(0)


def check(run: Run) -> None:
    """Fill `run.result["errors"]` with the largest errors, and `run.result["wrong"]` with those that are too large."""
    run.result["wrong"] = []
    if not (run.device.type == "cuda" or run.is_interpreted):
        run.skip("correctness", "no CUDA device; with TRITON_INTERPRET=1 the kernels run on the CPU")
        return
    errors: dict[str, float] = {}
    for dtype, dim in ((torch.bfloat16, 128), (torch.bfloat16, 64), (torch.float16, 128), (torch.float32, 64)):
        if not (run.small and dtype == torch.float16):
            found = _errors(run, dtype, dim)
            errors |= {f"{name}, {str(dtype).removeprefix('torch.')} {dim}": error for name, error in found.items()}
    for name, error in errors.items():
        print(f"error of {name}: {error:.2g}")
    wrong = [f"{name}: {error:.2g}" for name, error in errors.items() if not error <= MAX_ERRORS[name.split(",")[0]]]
    run.result["errors"] = errors
    run.result["wrong"] = wrong


def _errors(run: Run, dtype: torch.dtype, dim: int) -> dict[str, float]:
    """Return the largest error of every kernel for one dtype and head dimension."""
    from suffice.kv.kernels.compaction import move_to_front
    from suffice.kv.kernels.decode_plan import DecodePlan
    from suffice.kv.kernels.decoding import decode
    from suffice.kv.kernels.leverage import factorize, factorize_subset, quadratic_forms

    errors: dict[str, float] = {}
    tokens = 533 if run.small else 5003
    generator = torch.Generator(run.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=run.device, generator=generator).to(dtype)

    keys, values = draw(2, 2, tokens, dim) * 2, draw(2, 2, tokens, dim)
    queries = draw(2, 8, tokens, dim) * 2
    starts = torch.tensor([0, 17], device=run.device)
    valid = torch.arange(tokens, device=run.device) >= starts[:, None]
    exists = valid[:, None].expand(-1, 2, -1)
    stats = AttentionStats(queries, keys, values, positions=EntryPositions(valid=valid))
    for policy, exact_function in (("capkv-profile", exact_profile_log_weights), ("capkv", exact_log_weights)):
        log_weights = exact_function(queries.double(), keys.double(), valid)
        result = fused_log_weights(get_policy(policy).weights, stats)
        assert result is not None
        errors[f"log weights, {policy}"] = float((result - log_weights)[exists].abs().max())

    weights = (log_weights - log_weights.amax(-1, keepdim=True)).exp()
    gram = values.double().mT @ (values.double() * weights[..., None])
    noise = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    matrix = gram + noise[..., None, None] * torch.eye(dim, device=run.device, dtype=torch.float64)
    exact = (values.double() * torch.linalg.solve(matrix, values.double().mT).mT).sum(-1)
    factor = factorize(values, log_weights.float(), RIDGE)
    inner = quadratic_forms(values, log_weights.float(), factor)
    errors["leverage"] = float(((inner - exact) / exact)[exists].abs().max())

    kept = torch.randperm(tokens - 17, device=run.device)[: tokens // 4].add(17).sort().values.expand(2, 2, -1)
    kept_values, kept_weights = values.double()[:, :, kept[0, 0]], weights[:, :, kept[0, 0]]
    capacities = [
        torch.linalg.slogdet(x / noise[..., None, None] + torch.eye(dim, device=run.device)).logabsdet
        for x in (kept_values.mT @ (kept_values * kept_weights[..., None]), gram)
    ]
    share = factorize_subset(values, log_weights.float(), kept, factor).capacity / factor.capacity
    errors["capacity"] = float((share - capacities[0] / capacities[1]).abs().max())

    lengths = [[tokens, 3], [tokens // 2, 0]]
    packed_keys, packed_values = (draw(sum(map(sum, lengths)), dim) for _ in range(2))
    tail = Tail(draw(2, 2, 5, dim), draw(2, 2, 5, dim), torch.zeros(2, 5, dtype=torch.int32, device=run.device))
    query, scaling = draw(2, 8, dim), dim**-0.5
    positions = torch.zeros(len(packed_keys), dtype=torch.int32, device=run.device)
    storage = RaggedStorage(PackedEntries(packed_keys, packed_values, positions, lengths), tail)
    spans = [(start, count - storage.tail_length) for start, count in storage.spans]
    plan = DecodePlan.from_heads(spans, storage.tail_length, run.device)
    out = decode(query, *storage.buffers, storage.tail_positions, plan, scaling=scaling)
    sizes = [size for row in lengths for size in row]
    largest = 0.0
    for number, (k, v) in enumerate(zip(packed_keys.split(sizes), packed_values.split(sizes), strict=True)):
        row, head = divmod(number, 2)
        k, v = (torch.cat((a, b[row, head])).double() for a, b in ((k, tail.keys), (v, tail.values)))
        group = slice(4 * head, 4 * head + 4)
        expected = (scaling * query[row, group].double() @ k.mT).softmax(-1) @ v
        largest = max(largest, float(((out[row, group] - expected).abs() / (1 + expected.abs())).max()))
    errors["ragged attention"] = largest

    kept = torch.randperm(tokens, device=run.device)[: tokens // 3].sort().values.expand(2, 2, -1)
    moved = keys.clone()
    move_to_front(moved, kept)
    errors |= _quantization_errors(keys, values, queries[:, :, -1:])
    errors["compaction"] = float((moved[:, :, : tokens // 3] - keys[:, :, kept[0, 0]]).abs().max())
    return errors


def _quantization_errors(keys: Tensor, values: Tensor, query: Tensor) -> dict[str, float]:
    """Return the errors of quantization to 4 bits and of the attention over quantized entries."""
    form, vectors = VectorFormat(keys.shape[-1], 4), keys.flatten(0, 2)
    found, expected = TRITON_BACKEND.quantize(vectors, form)[0], form.quantize(vectors)[0]
    differing = float((found.codes != expected.codes).float().mean())
    slots = torch.arange(keys.shape[2], device=keys.device).expand(keys.shape[:3])
    entries = Entries(keys, values, slots)
    # Heads of unequal length, one of them empty. Some of the exact entries are empty slots.
    lengths = torch.tensor([[keys.shape[2], 3], [keys.shape[2] // 2, 0]], device=keys.device)
    index = slots.where(slots < lengths[..., None], -1)
    quantized = QuantizedEntries.empty(entries, (4, 4)).append(entries, index)
    exact = ExactEntries(keys[:, :, -9:], values[:, :, -9:], slots[:, :, :9].int() - 2)
    arguments = (quantized, exact, None, keys.shape[-1] ** -0.5)
    expected_output = attend_quantized(query.double(), *arguments)
    output = TRITON_BACKEND.quantized_attention(query, *arguments).double()
    error = float(((output - expected_output).abs() / (1 + expected_output.abs())).max())
    return {"quantization": differing, "quantized attention": error}
