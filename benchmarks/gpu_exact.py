"""Every kernel against float64 on the device; log weights of two policies step by step are the truth for theirs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from suffice.kv import DEFAULT_POLICY, Signals, get_policy
from suffice.kv.policy import fused
from suffice.kv.storage.ragged import RaggedStorage

if TYPE_CHECKING:
    from gpu import Run


def exact_log_weights(queries: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """Log weights of the policy `capkv`, of rows with at least 516 tokens, [batch, kv_heads, tokens]."""
    heads, tokens, dim = keys.shape[1:]
    queries = queries.unflatten(1, (heads, -1))
    window = F.avg_pool1d(_window(queries, keys, valid, 16), 5, stride=1, padding=2)
    recent = queries[..., -min(512, tokens) :, :].flatten(2, 3)
    spread = recent.var(2, correction=0)
    expected = keys @ recent.mean(2)[..., None] / dim**0.5 + keys.square() @ spread[..., None] / (2 * dim)
    return _sum((window.log(), expected.squeeze(-1), -4 * _cosine(keys, valid)), (1, 1, 2), valid)


def exact_spread_log_weights(queries: Tensor, keys: Tensor, valid: Tensor) -> Tensor:
    """Log weights of the policies `capkv-spread` and `capkv-profile`, as above."""
    heads, tokens, dim = keys.shape[1:]
    queries = queries.unflatten(1, (heads, -1))
    recent = queries[..., -min(512, tokens) :, :]
    logits = keys @ recent.mean(3).mT / dim**0.5 + keys.square() @ recent.var(3, correction=0).mT / (2 * dim)
    first = tokens - valid.sum(-1)
    inner = valid & (torch.arange(tokens, device=keys.device) >= first[:, None] + 4)
    normal = logits.masked_fill(~inner[:, None, :, None], float("-inf")).logsumexp(2, keepdim=True)
    expected = (logits - normal).logsumexp(-1)
    sampled = torch.zeros_like(expected)
    for row in range(len(keys)):
        own = tokens - int(first[row])
        for number in range(1, 17):
            place = int(first[row]) + (number * own + 15) // 16 - 1
            begin, end = int(first[row]), place - 31
            if end > begin:
                weights = (queries[row, :, :, place] @ keys[row, :, begin:end].mT / dim**0.5).softmax(-1)
                sampled[row, :, begin:end] += weights.mean(1)
    terms = (_window(queries, keys, valid, 8).log(), expected, -4 * _cosine(keys, valid), sampled.log())
    return _sum(terms, (3, 1, 1, 1), valid)


def _window(queries: Tensor, keys: Tensor, valid: Tensor, width: int) -> Tensor:
    number = torch.arange(keys.shape[2], device=keys.device)
    hidden = (number > number[-width:, None]) | ~valid[:, None, None, None]
    logits = queries[..., -width:, :] @ keys[:, :, None].mT / keys.shape[3] ** 0.5
    return logits.masked_fill(hidden, float("-inf")).softmax(-1).mean((2, 3))


def _cosine(keys: Tensor, valid: Tensor) -> Tensor:
    unit = F.normalize(keys, dim=-1) * valid[:, None, :, None]
    return (unit @ F.normalize(unit.sum(2), dim=-1)[..., None]).squeeze(-1)


def _sum(terms: tuple[Tensor, ...], factors: tuple[float, ...], valid: Tensor) -> Tensor:
    logs = [x.masked_fill(~valid[:, None], float("-inf")) for x in terms]
    shares = [x - x.logsumexp(-1, keepdim=True) + math.log(c) for x, c in zip(logs, factors, strict=True)]
    return torch.stack(shares).logsumexp(0)


def check(run: Run) -> None:
    """Compare every kernel with float64 on the device."""
    run.result["wrong"] = []
    if not (run.device.type == "cuda" or run.interpreted):
        run.skip("correctness", "no CUDA; with TRITON_INTERPRET=1 the kernels run on the CPU")
        return
    from suffice.kv.kernels.compaction import move_to_front
    from suffice.kv.kernels.decoding import Plan, decode
    from suffice.kv.kernels.leverage import factorize, inner_products, part_factor

    errors: dict[str, float] = {}
    tokens = 533 if run.small else 5003
    for dtype, dim in ((torch.bfloat16, 128), (torch.bfloat16, 64), (torch.float16, 128), (torch.float32, 64)):
        if run.small and dtype == torch.float16:
            continue
        name = f"{str(dtype).removeprefix('torch.')} {dim}"
        generator = torch.Generator(run.device).manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype = dtype, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, device=run.device, generator=generator).to(dtype)

        keys, values = draw(2, 2, tokens, dim) * 2, draw(2, 2, tokens, dim)
        queries = draw(2, 8, tokens, dim) * 2
        starts = torch.tensor([0, 17], device=run.device)
        valid = torch.arange(tokens, device=run.device) >= starts[:, None]
        there = valid[:, None].expand(-1, 2, -1)
        for policy, exact_of in ((DEFAULT_POLICY, exact_spread_log_weights), ("capkv", exact_log_weights)):
            log = exact_of(queries.double(), keys.double(), valid)
            found = _fused(get_policy(policy), Signals(queries, keys, values, valid=valid))
            errors[f"log weights, {policy} {name}"] = float((found - log)[there].abs().max())
        weights = (log - log.amax(-1, keepdim=True)).exp()
        gram = values.double().mT @ (values.double() * weights[..., None])
        noise = 0.1 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        matrix = gram + noise[..., None, None] * torch.eye(dim, device=run.device, dtype=torch.float64)
        exact = (values.double() * torch.linalg.solve(matrix, values.double().mT).mT).sum(-1)
        factor = factorize(values, log.float(), 0.1)
        inner = inner_products(values, log.float(), factor)
        errors[f"leverage, {name}"] = float(((inner - exact) / exact)[there].abs().max())
        kept = torch.randperm(tokens - 17, device=run.device)[: tokens // 4].add(17).sort().values.expand(2, 2, -1)
        part, some = values.double()[:, :, kept[0, 0]], weights[:, :, kept[0, 0]]
        shares = [
            torch.linalg.slogdet(x / noise[..., None, None] + torch.eye(dim, device=run.device)).logabsdet
            for x in (part.mT @ (part * some[..., None]), gram)
        ]
        found = part_factor(values, log.float(), kept, factor).capacity / factor.capacity
        errors[f"capacity, {name}"] = float((found - shares[0] / shares[1]).abs().max())
        lengths = [[tokens, 3], [tokens // 2, 0]]
        packed = tuple(draw(sum(map(sum, lengths)), dim) for _ in range(2))
        tail = (draw(2, 2, 5, dim), draw(2, 2, 5, dim), torch.zeros(2, 5, dtype=torch.int32, device=run.device))
        query, scale = draw(2, 8, dim), dim**-0.5
        positions = torch.zeros(len(packed[0]), dtype=torch.int32, device=run.device)
        storage = RaggedStorage(*packed, positions, lengths, tail)
        plan = Plan.of([(start, count - storage.tail) for start, count in storage.spans], storage.tail, run.device)
        out = decode(query, *storage.tensors, storage.tail_positions, plan, scale)
        sizes = [size for row in lengths for size in row]
        worst = 0.0
        for number, (k, v) in enumerate(zip(packed[0].split(sizes), packed[1].split(sizes), strict=True)):
            row, head = divmod(number, 2)
            k, v = (torch.cat((a, b[row, head])).double() for a, b in ((k, tail[0]), (v, tail[1])))
            own = slice(4 * head, 4 * head + 4)
            right = (scale * query[row, own].double() @ k.mT).softmax(-1) @ v
            worst = max(worst, float(((out[row, own] - right).abs() / (1 + right.abs())).max()))
        errors[f"ragged attention, {name}"] = worst
        kept = torch.randperm(tokens, device=run.device)[: tokens // 3].sort().values.expand(2, 2, -1)
        moved = keys.clone()
        move_to_front(moved, kept)
        errors[f"compaction, {name}"] = float((moved[:, :, : tokens // 3] - keys[:, :, kept[0, 0]]).abs().max())
    bounds = {"log weights": 1e-4, "leverage": 1e-3, "capacity": 1e-4, "ragged attention": 1e-2, "compaction": 0.0}
    wrong = [f"{name}: {error:.2g}" for name, error in errors.items() if not error <= bounds[name.split(",")[0]]]
    for name, error in errors.items():
        print(f"error of {name}: {error:.2g}")
    run.result["errors"] = errors
    run.result["wrong"] = wrong


def _fused(policy: Any, signals: Signals) -> Tensor:
    allowed = fused.usable
    fused.usable = lambda *tensors: True  # under the interpreter too
    try:
        found = fused.fused_log_weights(policy.weights, signals)
    finally:
        fused.usable = allowed
    assert found is not None
    return found
