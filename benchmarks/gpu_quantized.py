"""Measure decoding with 4 bits against decoding with 16 bits over the same entries, and quantization itself."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suffice.kv.attention.quantized_attention import ExactEntries
from suffice.kv.backend.triton_backend import choose_backend
from suffice.kv.kernels import usable
from suffice.kv.storage.base import Entries
from suffice.kv.storage.quantized_entries import QuantizedEntries
from suffice.kv.storage.ragged import PackedEntries, RaggedStorage, Tail
from suffice.kv.storage.vector_format import VectorFormat

if TYPE_CHECKING:
    from gpu import Run

BITS = 4
EXACT = 36
"""Number of entries of each head that are not quantized: the first tokens, and those in the window."""


def measure(run: Run, bandwidth: float) -> None:
    """Fill `run.result["quantized"]` with the times of decoding and of quantization."""
    rows: list[dict[str, Any]] = []
    run.result["quantized"] = rows
    if not usable(run.random_tensor(1, 64)):
        run.skip("quantized entries", "no kernel for this device")
        return
    head = ("tokens", "batch", "dim", "16 bits ms", "4 bits ms", "faster", "pack of copy")
    print("\n{:>7} {:>5} {:>4} {:>10} {:>9} {:>7} {:>13}".format(*head))
    for dim in (64,) if run.small else (128, 64):
        for tokens in (64,) if run.small else (4096, 32768):
            for batch in (1, 2) if run.small else (1, 4):
                row: dict[str, Any] = {"tokens": tokens, "batch": batch, "dim": dim}
                try:
                    with torch.no_grad():
                        row |= _measure_decoding(run, tokens, batch, dim) | _measure_packing(run, dim, bandwidth)
                except torch.OutOfMemoryError:
                    run.skip(f"quantized entries {tokens} x {batch}, dim {dim}", "out of memory")
                    continue
                rows.append(row)
                if None in row.values():
                    continue
                row["of_ragged"] = row["ragged"] / row["quantized"]
                print(
                    f"{tokens:>7} {batch:>5} {dim:>4} {1000 * row['ragged']:>10.3f} {1000 * row['quantized']:>9.3f} "
                    f"{row['of_ragged']:>7.2f} {row['packing_of_copy']:>13.0%}",
                    flush=True,
                )
                if (tokens, batch, dim) == (32768, 4, 128):
                    run.result["quantized_of_ragged"] = row["of_ragged"]


def _measure_decoding(run: Run, tokens: int, batch: int, dim: int) -> dict[str, float | None]:
    """Return the times of decoding with 16 and with fewer bits, over the same entries."""
    query = run.random_tensor(batch, run.heads, 1, dim)
    keys, values = (run.random_tensor(batch, run.kv_heads, tokens, dim, seed=seed) for seed in (1, 2))
    backend = choose_backend(query, keys, values)
    name = f"decoding {tokens} x {batch}, dim {dim}"

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :, :-EXACT], x[:, :, -EXACT:].contiguous()

    (old_keys, new_keys), (old_values, new_values) = split(keys), split(values)
    slots = torch.arange(tokens - EXACT, device=run.device).expand(batch, run.kv_heads, -1)
    entries = Entries(old_keys, old_values, slots)
    quantized = QuantizedEntries.empty(entries, (BITS, BITS)).append(entries, slots)
    positions = torch.zeros(batch, run.kv_heads, EXACT, dtype=torch.int32, device=run.device)
    exact = ExactEntries(new_keys, new_values, positions)
    attend = partial(backend.quantized_attention, query, quantized, exact, None, dim**-0.5)
    row = {"quantized": run.time(f"{name}, {BITS} bits", attend)}
    del quantized, exact, attend
    packed = [x.flatten(0, 2).contiguous() for x in (old_keys, old_values)]
    packed_positions = torch.zeros(len(packed[0]), dtype=torch.int32, device=run.device)
    lengths = [[tokens - EXACT] * run.kv_heads] * batch
    storage = RaggedStorage(
        PackedEntries(*packed, packed_positions, lengths), Tail(new_keys, new_values, positions[:, 0])
    )
    return row | {"ragged": run.time(name, partial(backend.ragged_attention, query, storage, None, dim**-0.5))}


def _measure_packing(run: Run, dim: int, bandwidth: float) -> dict[str, float | None]:
    """Return the bandwidth of quantizing rotated vectors, relative to that of a copy."""
    from suffice.kv.kernels.packing import quantize_rotated

    form, count = VectorFormat(dim, BITS), 64 if run.small else 2**20
    vectors = run.random_tensor(count, form.padded_dim).float()
    quantize = partial(quantize_rotated, vectors, bits=BITS, group_size=form.group_size, num_scales=form.num_scales)
    seconds = run.time(f"packing, dim {dim}", quantize)
    num_bytes = vectors.nbytes + count * (form.bytes_per_vector + 4)
    return {"packing_of_copy": None if seconds is None else num_bytes / seconds / bandwidth}
