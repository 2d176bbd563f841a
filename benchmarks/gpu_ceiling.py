"""Compute from machine code how close to the memory bound the kernels can get on an H100. Nothing is run on a GPU.

    python benchmarks/gpu_ceiling.py [--dims 128 64] [--group 4] [--dtype bfloat16] [--json FILE]

All kernels are compiled for sm_90, which needs no GPU. For the kernels that read the cache, the script finds the loop
over the tokens in the machine code, and counts the clocks of each part of a multiprocessor for one token: instruction
issue, pipes of half and of eighth rate, matrix units, and memory. The ceiling is the clocks of the memory divided by
the largest of them. No run can be better. A real run, in which the parts wait for each other, is worse. Shared memory
and caches are not counted. For a kernel without such a loop, all instructions of a program are counted.

The kernels are compiled for the default policy and groups of 4 query heads, as in Llama-3-8B. The script needs Triton,
whose package contains the disassembler. The last line of the output is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from suffice.kv.attention.quantized_attention import ExactEntries
from suffice.kv.kernels.compaction import move_to_front
from suffice.kv.kernels.decode_plan import DecodePlan
from suffice.kv.kernels.decoding import decode
from suffice.kv.kernels.error_feedback import round_with_feedback
from suffice.kv.kernels.leverage import factorize, factorize_subset, quadratic_forms
from suffice.kv.kernels.mixture import MixtureInputs, MixtureTerms, mixture_log_weights
from suffice.kv.kernels.packing import quantize_rotated
from suffice.kv.kernels.quantized_decoding import decode_quantized
from suffice.kv.storage.base import LOGIT_BIAS, Entries
from suffice.kv.storage.quantized_entries import QuantizedEntries
from suffice.kv.storage.vector_format import VectorFormat
from suffice.link.sparse.kernels.match_neighbors import match_neighbors
from suffice.link.sparse.kernels.segment_min import segment_min

WINDOW, SAMPLED = 8, 16  # window and sampled queries of each head in the default policy
BITS = 4  # of quantized keys and values
# Numbers of an H100 SXM, from NVIDIA's data sheet and the throughput table of the CUDA programming guide (9.0).
BANDWIDTH, PROCESSORS, CLOCK = 3.35e12, 132, 1.98e9
MULTIPLICATIONS = 2048  # 16-bit multiplications of the matrix units, per multiprocessor and clock
# Warp instructions per multiprocessor and clock.
ISSUE_RATE, HALF_RATE, EIGHTH_RATE = 4, 2, 0.5
HALF_RATE_NAMES = ["FSEL", "FSET", "FMNMX", "ISETP", "FSETP", "SEL", "LOP3", "SHF", "PRMT", "VIADD", "IADD3"]
HALF_RATE_NAMES += ["PLOP3", "F2FP"]
EIGHTH_RATE_NAMES = ["MUFU", "F2F", "I2F", "F2I"]
SCORING = ("key_sums_kernel", "key_scores_kernel", "gram_kernel", "quadratic_form_kernel")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel, and the constants with which it was compiled."""

    kernel: Any
    options: dict[str, Any]

    @property
    def longest_loop(self) -> bool:
        """Whether the loop over the tokens is not the shortest one, which reads entries that are not quantized."""
        return "KEY_BITS" in self.options


def compile_all(dim: int, group: int, dtype: torch.dtype) -> dict[str, Compiled]:
    """Compile every kernel for a head dimension; return them by name."""
    compiled: dict[str, Compiled] = {}
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        compiled.setdefault(self.__name__, Compiled(kernel, options))

    target = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    driver.set_active(target)
    JITFunction.run = compile_only
    try:
        _launch_all(dim, group, dtype)
    finally:
        JITFunction.run = run
    return compiled


def _launch_all(dim: int, group: int, dtype: torch.dtype) -> None:
    """Call every function that launches kernels."""
    tokens = 512
    keys = torch.zeros(1, 2, tokens, dim, dtype=dtype)
    starts = torch.zeros(1, 2, dtype=torch.int32)
    ends = torch.full((1, 2, WINDOW + SAMPLED), tokens, dtype=torch.int32)
    sampled = torch.zeros(1, SAMPLED, dtype=torch.long)
    queries = keys.repeat(1, group, 1, 1)
    num_skipped = torch.zeros(1, dtype=torch.int32)
    inputs = MixtureInputs(queries, keys, 0.1, WINDOW, tokens, num_skipped, starts, ends, sampled, starts)
    mixture_log_weights(inputs, MixtureTerms(1, 4.0, 3.0, 1.0, 1.0))
    weights = torch.zeros(1, 2, tokens)
    factor = factorize(keys, weights, 0.1)
    quadratic_forms(keys, weights, factor, 1.0)
    factorize_subset(keys, weights, torch.zeros(1, 2, 9, dtype=torch.long), factor)
    plan = DecodePlan.from_heads([(0, 400), (404, 600)], 4, torch.device("cpu"))
    entries, positions = keys.view(-1, dim), torch.zeros(1, 4, dtype=torch.int32)
    query = torch.zeros(1, 2 * group, dim, dtype=dtype)
    decode(query, entries, entries, positions, plan, scaling=0.1)
    sinks = torch.zeros(2 * group)
    decode(query, entries, entries, positions, plan, scaling=0.1, softcap=50.0, sink_logits=sinks)
    bias = torch.zeros(1, 2, tokens)
    plan = DecodePlan.from_heads([(0, 400), (404, 600)], 4, torch.device("cpu"), bias.flatten())
    decode(query, entries, entries, positions, plan, scaling=0.1, softcap=50.0)
    move_to_front(keys, torch.zeros(1, 2, 9, dtype=torch.long))
    slots = torch.arange(tokens).expand(1, 2, -1)
    quantized = QuantizedEntries.empty(Entries(keys, keys, slots), (BITS, BITS)).append(
        Entries(keys, keys, slots), slots
    )
    decode_quantized(query, quantized, ExactEntries(keys, keys, slots.int()), scaling=0.1)
    repaired = replace(quantized, columns={LOGIT_BIAS: bias.flatten()})
    decode_quantized(query, repaired, ExactEntries(keys, keys, slots.int(), logit_bias=bias), scaling=0.1)
    form = VectorFormat(dim, BITS)
    vectors = torch.zeros(tokens, form.padded_dim)
    quantize_rotated(vectors, bits=BITS, group_size=form.group_size, num_scales=form.num_scales)
    scales, factors = torch.ones(tokens, form.num_groups), torch.eye(form.padded_dim)[None]
    round_with_feedback(vectors, scales, factors, [tokens], 2**BITS - 1)
    numbers = torch.zeros(8, dtype=torch.long)
    match_neighbors(numbers, numbers, numbers, numbers, common=True)
    match_neighbors(numbers, numbers, numbers, numbers, common=False)
    segment_min(numbers, numbers, torch.zeros(8, 128))


def bytes_read(dim: int, group: int, size: int) -> dict[str, int]:
    """Return the bytes that each kernel reads and writes for one token of a KV head."""
    entry, features = dim * size, 4 * (group + 1)
    form = VectorFormat(dim, BITS)
    return {
        "key_sums_kernel": entry + features,
        "key_scores_kernel": entry + features + 16,
        "gram_kernel": entry + 4,
        "quadratic_form_kernel": entry + 8,
        "attention_parts_kernel": 2 * entry,
        "quantized_parts_kernel": 2 * form.bytes_per_vector,
        "packing_kernel": 4 * form.padded_dim + form.bytes_per_vector + 4,
    }


def ceiling(compiled: Compiled, bytes_per_token: int) -> dict[str, float]:
    """Return the clocks of each part of a multiprocessor for one token of a KV head, and the resulting ceiling."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.kernel.asm["cubin"])
        file.flush()
        usage = _run_tool("cuobjdump", "-res-usage", file.name)
        body = _token_loop(_run_tool("nvdisasm", "-c", file.name), compiled.longest_loop)
    warps, tokens = compiled.kernel.metadata.num_warps, compiled.options["BLOCK_N"]
    counts = Counter(name.split(".")[0] for name in body)

    def clocks(instructions: list[str], rate: float) -> float:
        return warps * sum(counts[name] for name in instructions) / rate / tokens

    clocks_by_part = {
        "issue": warps * len(body) / ISSUE_RATE / tokens,
        "half rate": clocks(HALF_RATE_NAMES, HALF_RATE),
        "eighth rate": clocks(EIGHTH_RATE_NAMES, EIGHTH_RATE),
        "matrix": warps * sum(map(_multiplications, body)) / MULTIPLICATIONS / tokens,
        "memory": bytes_per_token / (BANDWIDTH / PROCESSORS / CLOCK),
    }
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
    return clocks_by_part | {
        "ceiling": clocks_by_part["memory"] / max(clocks_by_part.values()),
        "registers": registers,
        "bytes_spilled": stack,
    }


def _run_tool(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


def _token_loop(code: str, longest: bool) -> list[str]:
    """Return the instructions of the loop over the tokens: the shortest or longest loop that uses the matrix units.

    If there is none, return all instructions.
    """
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)(.*);", line):
            instructions.append((found[1], found[2]))
    for number, (name, operands) in enumerate(instructions):
        target = re.search(r"\.L_x_\d+", operands) if name.startswith("BRA") else None
        if target and labels.get(target[0], number) < number:
            body = [instruction for instruction, _ in instructions[labels[target[0]] : number + 1]]
            if any(map(_multiplications, body)):
                loops.append(body)
    if not loops:
        return [name for name, _ in instructions if name != "NOP"]
    return (max if longest else min)(loops, key=len)


def _multiplications(name: str) -> float:
    """Return the number of multiplications of one warp's matrix instruction, 0 for other instructions."""
    if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        rows, columns, depth = map(int, found.groups())
        return rows * columns * depth / 4  # computed by four warps together
    if name.startswith("HMMA.16816"):
        return 16 * 8 * 16
    return 16 * 8 * 8 if name.startswith("HMMA.1688") else 0


def main() -> None:
    """Print the table and the JSON object."""
    parser = argparse.ArgumentParser(description="Compute ceilings of the kernels on an H100 from their machine code.")
    parser.add_argument("--dims", nargs="+", type=int, default=[128, 64], help="head dimensions")
    parser.add_argument("--group", type=int, default=4, help="query heads per KV head")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float16"], help="data type of keys and values"
    )
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    result: dict[str, Any] = {
        "gpu": "H100 SXM, sm_90",
        "group": options.group,
        "dtype": options.dtype,
        "triton": triton.__version__,
    }
    parts = ("issue", "half rate", "eighth rate", "matrix", "memory")
    print(f"{'dim':>4} {'kernel':>22} " + " ".join(f"{part:>11}" for part in parts) + "  ceiling registers spilled")
    for dim in options.dims:
        kernels = compile_all(dim, options.group, dtype)
        rows = {
            name: ceiling(kernels[name], size) for name, size in bytes_read(dim, options.group, dtype.itemsize).items()
        }
        for name, row in rows.items():
            clocks = " ".join(f"{row[part]:>11.1f}" for part in parts)
            tail = f"{row['ceiling']:>8.0%} {row['registers']:>9} {row['bytes_spilled']:>7}"
            print(f"{dim:>4} {name:>22} {clocks} {tail}")
        scoring = [rows[name] for name in SCORING]
        needed = 4 * dim * dtype.itemsize / (BANDWIDTH / PROCESSORS / CLOCK)
        whole = needed / sum(max(row[part] for part in parts) for row in scoring)
        print(f"{dim:>4} {'scoring':>22} {whole:.0%} of the bound of reading K and V twice")
        names = ("attention_parts_kernel", "quantized_parts_kernel")
        decoding, quantized = (max(rows[name][part] for part in parts) for name in names)
        print(f"{dim:>4} decoding with {BITS} bits can be {decoding / quantized:.2f} times as fast as with 16 bits")
        result[str(dim)] = {
            "kernels": rows,
            "scoring": whole,
            "quantized_speedup": decoding / quantized,
            "compiled": sorted(kernels),
        }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
