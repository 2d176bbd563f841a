"""A stream far longer than the model's context window, with a budget that holds at all times.

English text is read in chunks. After each chunk, the processor time, the memory of the process and the mean negative
log-likelihood (NLL) of the chunk's tokens are recorded. At the end, the model continues the text greedily.

Run with `make bench-kv`. Options: --tokens 100000, --budget 2048, --chunk 512, --policy capkv-profile, --json PATH,
--figure PATH.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from machine import forget_peak, machine, status
from suffice.kv import DEFAULT_POLICY, CompressedCache, load_model
from suffice.report import color_of, new_figure, save_figure
from suffice.report.style import figure_style

FIRST_STEADY = 10_000  # the token from which memory must stay constant


def read(model: Any, cache: CompressedCache, ids: Tensor, chunk: int) -> list[dict[str, float]]:
    """Read all tokens; return the measurements of each chunk."""
    rows = []
    for start in range(0, ids.shape[1], chunk):
        part = ids[:, start : start + chunk]
        start_time = time.process_time()
        with torch.no_grad():
            logits = model(part, past_key_values=cache, use_cache=True).logits[0]
        seconds = time.process_time() - start_time
        report = cache.report()
        rows.append(
            {
                "tokens": start + part.shape[1],
                "seconds": seconds * chunk / part.shape[1],
                "rss": status("VmRSS"),
                "peak": status("VmHWM"),
                "kept": report.tokens_kept,
                "cache_bytes": report.bytes_kept,
                # Without the first token of the chunk, which the chunk before it predicts.
                "nll": float(torch.nn.functional.cross_entropy(logits[:-1], part[0, 1:])),
            }
        )
        del logits
        if len(rows) % 10 == 0:
            print(f"{rows[-1]['tokens']} tokens: {seconds:.1f} s per chunk, NLL {rows[-1]['nll']:.2f}", flush=True)
    return rows


def generate(model: Any, cache: CompressedCache, token: Tensor, new: int) -> Tensor:
    """Return `new` greedily generated tokens, [new]."""
    tokens = []
    for _ in range(new):
        with torch.no_grad():
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(token))
    return torch.tensor(tokens)


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the growth of memory, and times and likelihoods early and late in the stream."""
    early = [row for row in rows if row["tokens"] <= FIRST_STEADY]
    late = [row for row in rows if row["tokens"] > FIRST_STEADY]
    full = [row for row in early if row["kept"] == early[-1]["kept"]]  # chunks at which the budget is used up
    last = late[-len(late) // 4 :]
    return {
        "stream_peak_growth_percent": 100 * (rows[-1]["peak"] / early[-1]["peak"] - 1),
        "stream_rss_growth_percent": 100 * (rows[-1]["rss"] / early[-1]["rss"] - 1),
        "stream_cache_mb": max(row["cache_bytes"] for row in rows) / 1e6,
        "stream_seconds_last_over_first": statistics.median(row["seconds"] for row in last)
        / statistics.median(row["seconds"] for row in full),
        "stream_nll_first_8k": statistics.mean(row["nll"] for row in rows if row["tokens"] <= 8192),
        "stream_nll_beyond_8k": statistics.mean(row["nll"] for row in rows if row["tokens"] > 8192),
        "stream_nll_beyond_8k_worst": max(row["nll"] for row in rows if row["tokens"] > 8192),
    }


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Draw time, memory and likelihood by token."""
    x = [row["tokens"] / 1000 for row in rows]
    figure, panels = new_figure(11, 3.2, columns=3)
    shown = {
        "seconds per chunk": [row["seconds"] for row in rows],
        "process memory, MB": [row["rss"] / 1e6 for row in rows],
        "NLL, nats per token": [row["nll"] for row in rows],
    }
    with figure_style():
        for panel, (name, y) in zip(panels, shown.items(), strict=True):
            panel.plot(x, y, color=color_of(DEFAULT_POLICY), linewidth=1.2)
            panel.axvline(8.192, color=color_of("full"), linewidth=0.8, linestyle=":")
            panel.set(xlabel="thousand tokens read", title=name, ylim=(0, 1.15 * max(y)))
            panel.grid(alpha=0.25)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--policy", default=DEFAULT_POLICY)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    if options.tokens < 2 * FIRST_STEADY:
        parser.error(f"--tokens must be at least {2 * FIRST_STEADY}, got {options.tokens}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokenizer = load_model(dtype="float32", on_progress=lambda line: print(line, flush=True))
    text = "\n\n".join(value for _, value in sorted(pydoc_data.topics.topics.items()))
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    ids = ids.repeat(1, -(-options.tokens // ids.shape[1]))[:, : options.tokens]
    cache = CompressedCache(model, options.policy, options.budget, evict="always", rerotate=True)
    forget_peak()  # loading the model takes more memory than reading
    rows = read(model, cache, ids, options.chunk)
    continuation = str(tokenizer.decode(generate(model, cache, ids[:, -1:], new=80)))
    result = {**summary(rows), **{name: getattr(options, name) for name in ("tokens", "budget", "chunk", "policy")}}
    print(f"\n{tokenizer.decode(ids[0, -60:])}\n>>> {continuation}\n")
    for name, value in result.items():
        print(f"{name:<32} {value if isinstance(value, str) else f'{value:.4g}'}")
    if options.figure:
        draw(rows, options.figure)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        stored = {**result, "machine": machine(), "continuation": continuation, "chunks": rows}
        options.json.write_text(json.dumps(stored, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
