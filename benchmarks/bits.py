"""How close quantized caches stay to the full cache, by bits and by entries, beside other ways to quantize.

The samples are those of benchmarks/evidence.py: the continuation of a text, and questions that are seen after eviction
(agnostic) or before it (aware). The measure is the KL divergence from the full cache's next-token distribution, in nats
per token of the right continuation or answer. All caches of a sample are made from the same prompt, so differences are
paired by sample. Keys and values of the layers that a cache compresses are quantized; others are left as they are.

`bytes` are the stored bytes of these layers, relative to all entries in 16 bits. The models run in float32 here, so
whatever is stored in full precision (the first 4 and the last 32 entries, means, scales) counts as 16 bits. Packed
numbers and the positions of entries count as they are.

    python benchmarks/bits.py --samples 2 --entries 1 0.36 --bits 4      # a few minutes
    make bench-bits                                                      # with the packages of all peers
    python benchmarks/bits.py --samples 20 --write

Each model is measured in a process of its own. Finished samples are kept in the folder, and a second call continues.
`--write` puts the tables into docs/results/kv-bits.md and the numbers into docs/results/kv-bits.json; with `--page`,
into another page. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from evidence import FIRST_SEED, TOKENS, write_haystack
from fidelity_sample import MODES, FidelitySample, stored_bytes
from machine import machine
from quantized_peers import PEERS
from suffice.kv import DEFAULT_POLICY, CompressedCache
from suffice.kv.cache.prefill import prefill
from suffice.kv.eval.run_kinds import text_digest
from suffice.kv.eval.run_options import RunOptions, run_samples
from suffice.kv.hf.loading import ModelSource
from suffice.kv.hf.packaged_models import PACKAGED_MODELS
from suffice.study import PlannedRun, RunContext, RunKind
from suffice.study.results import Group, Interval, group_records

FULL_BITS = 16  # not quantized
REPAIRED = ", repair"  # behind the name of a policy
CHOSEN = "chosen"  # bits that follow from a limit on the bytes
PAGE = Path("docs/results/kv-bits.md")
START, END = "<!-- written by benchmarks/bits.py -->", "<!-- end -->"


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check the names of the mode and of the peers; add the digest of the haystack."""
    if settings["mode"] not in MODES:
        raise ValueError(f"modes must be among {', '.join(MODES)}, got {settings['mode']!r}")
    for name in settings["peers"]:
        if name not in PEERS or not PEERS[name].is_installed:
            known = ", ".join(name for name, peer in PEERS.items() if peer.is_installed)
            raise ValueError(f"peers must be among {known}, which are installed here, got {name!r}")
    return {**settings, "digest": text_digest(settings["haystack"])}


KIND = RunKind(
    name="kv.bits",
    function="bits:measure",
    check="bits:check_settings",
    settings={
        "model": "",
        "mode": "text",
        "tokens": TOKENS,
        "haystack": None,
        "policies": [DEFAULT_POLICY],
        "entries": [1.0],
        "bits": [4],
        "memory": [],
        "peers": [],
        "repair": False,
    },
    description="Measure how close quantized caches stay to the full cache on one example.",
)


def measure(settings: Mapping[str, Any], seed: int, context: RunContext) -> dict[str, Any]:
    """Measure every cache and every peer on one example."""
    sample = FidelitySample(settings["model"], settings["mode"], settings["tokens"], seed, settings["haystack"])
    context.log(f"{settings['model']}, {settings['mode']}, sample {seed}")
    rows: list[dict[str, Any]] = []

    def add_row(method: str, entries: float, bits: int | str, cache: Any, num_bytes: float) -> None:
        values = sample.compare(cache, num_bytes)
        rows.append({"settings": {"method": method, "entries": entries, "bits": bits}, "values": values})

    def fill(caches: Sequence[CompressedCache]) -> None:
        if caches:
            inputs = {"input_ids": sample.prefilled}
            prefill(sample.model, inputs, caches, tokenizer=sample.tokenizer, share_statistics=True)

    bits_with_full = [FULL_BITS, *settings["bits"]]
    names = [
        (policy + suffix, entries, bits)
        for policy in settings["policies"]
        for suffix in (("", REPAIRED) if settings["repair"] else ("",))
        for entries in settings["entries"]
        for bits in bits_with_full
    ]
    caches = [make_cache(sample.model, *name) for name in names]
    fill(caches)
    for name, cache in zip(names, caches, strict=True):
        add_row(*name, cache, stored_bytes(cache))
    limited = [(limit, evict) for limit in settings["memory"] for evict in ("always", "prefill")]
    caches = [sample.limited_cache(limit, evict, DEFAULT_POLICY) for limit, evict in limited]
    fill(caches)
    for (limit, evict), cache in zip(limited, caches, strict=True):
        add_row(f"memory={limit:g}, evict={evict!r}", limit, CHOSEN, cache, stored_bytes(cache))
        report = cache.report()
        key_bits, value_bits = cache.compressed_layers[0].storage.bits
        rows[-1]["values"] |= {
            "entries_kept": report.tokens_kept / report.tokens_seen,
            "key_bits": key_bits,
            "value_bits": value_bits,
        }
    for method in settings["peers"]:
        for bits in peer_bits(method, settings["bits"]):
            add_row(method, 1.0, bits, *quantized_copy(sample.full, sample.layers, method, bits))
    return {"rows": rows, "tokens": sample.num_tokens}


def parse_bits(text: str) -> int | str:
    """Return a number of bits, or a pair (bits of keys, bits of values) as it is."""
    return text if "," in text else int(text)


def make_cache(model: Any, method: str, entries: float, bits: int | str) -> CompressedCache:
    """Return an empty cache for a method: the name of a policy, with `REPAIRED` behind it for a cache with repair."""
    pair = tuple(map(int, bits.split(","))) if isinstance(bits, str) else bits
    options: dict[str, Any] = {} if bits == FULL_BITS else {"bits": pair}
    policy, repair = method.removesuffix(REPAIRED), method.endswith(REPAIRED)
    return CompressedCache(model, policy, float(entries), measure_capacity=False, repair=repair, **options)


def peer_bits(method: str, bits: Sequence[int | str]) -> list[int]:
    """Return the numbers of bits with which a peer is measured: those that it supports, or its only one."""
    supported = PEERS[method].bits
    return list(supported) if len(supported) == 1 else [number for number in supported if number in bits]


def quantized_copy(full: Any, compressed: Sequence[Any], method: str, bits: int) -> tuple[Any, float]:
    """Return a copy of a full cache whose layers hold what a peer reads back, and the bytes that the peer stores.

    Args:
        full: the full cache.
        compressed: its layers that are quantized.
        method: name of the peer.
        bits: number of bits.

    """
    cache, num_bytes = copy.deepcopy(full), 0.0
    for layer, original in zip(cache.layers, full.layers, strict=True):
        if any(original is each for each in compressed):
            quantized = PEERS[method].quantize(layer.keys, layer.values, bits)
            layer.keys, layer.values = quantized.keys, quantized.values
            num_bytes += quantized.num_bytes
    return cache, num_bytes


def run(options: argparse.Namespace, model: str) -> list[Group]:
    """Measure the missing samples of a model, and return the values of all."""
    folder = options.folder / model.replace("/", "--")
    haystack = folder / "haystack.txt"
    shared = {
        "model": model,
        "tokens": options.tokens,
        "haystack": str(haystack) if haystack.exists() else write_haystack(folder, ModelSource(model, dtype="float32")),
        "policies": options.policies,
        "entries": options.entries,
        "bits": options.bits,
        "memory": options.memory,
        "peers": options.peers,
        "repair": options.repair,
    }
    seeds = range(options.seed, options.seed + options.samples)
    plan = [PlannedRun(KIND.complete({**shared, "mode": mode}), seed) for seed in seeds for mode in options.modes]
    run_options = RunOptions(folder, on_progress=lambda progress, line: print(line, flush=True) if line else None)
    # Each set of samples has a name of its own, so that a short run does not replace a longer study.
    return group_records(run_samples(folder, KIND, plan, f"bits-{options.seed}-{options.samples}", run_options))


def run_in_processes(models: Sequence[str], threads: int) -> None:
    """Measure each model in a process of its own, with the arguments of this process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    arguments = [argument for argument in sys.argv[1:] if argument != "--write"]
    command = [sys.executable, "-W", "ignore", sys.argv[0], *arguments, "--models"]
    processes = [subprocess.Popen([*command, model], env=environment) for model in models]
    exit_codes = [process.wait() for process in processes]
    if any(exit_codes):
        sys.exit("a model could not be measured; finished samples are kept, and the same command continues")


def find_group(groups: Sequence[Group], mode: str, method: str, entries: float, bits: int | str) -> Group | None:
    wanted = {"mode": mode, "method": method, "entries": entries, "bits": bits}
    return next((group for group in groups if wanted.items() <= dict(group.settings).items()), None)


def row_names(groups: Sequence[Group]) -> list[tuple[str, float, int | str]]:
    """Return method, entries and bits of all rows of a model's table."""
    return list(dict.fromkeys((g.settings["method"], g.settings["entries"], g.settings["bits"]) for g in groups))


def table(groups: Sequence[Group], modes: Sequence[str]) -> list[str]:
    """Return the lines of a model's table. A star marks peers that differ significantly from the default policy."""
    lines = [f"| cache | entries | bits | bytes | {' | '.join(modes)} |", "|---" * (4 + len(modes)) + "|"]
    for method, entries, bits in row_names(groups):
        cells: list[str] = []
        shares: list[float] = []
        for mode in modes:
            group = find_group(groups, mode, method, entries, bits)
            assert group is not None
            shares.append(group.interval("bytes").mean)
            star = ""
            base = find_group(groups, mode, DEFAULT_POLICY, entries, bits)
            if method in PEERS and base is not None and (difference := group.difference(base, "kl")):
                star = "*" if difference.interval.low > 0 or difference.interval.high < 0 else ""
            cells.append(kl_text(group.interval("kl")) + star)
        share = sum(shares) / len(shares)
        if bits == CHOSEN:
            chosen = [find_group(groups, mode, method, entries, bits) for mode in modes]
            kept, key_bits, value_bits = (
                sum(group.interval(name).mean for group in chosen if group is not None) / len(modes)
                for name in ("entries_kept", "key_bits", "value_bits")
            )
            lines.append(
                f"| {method} | {kept:.0%} | {key_bits:.3g}, {value_bits:.3g} | {share:.1%} | {' | '.join(cells)} |"
            )
            continue
        lines.append(f"| {method} | {entries:.0%} | {bits} | {share:.1%} | {' | '.join(cells)} |")
    return lines


def kl_text(interval: Interval) -> str:
    if not interval.has_bounds:
        return f"{interval.mean:.4f}"
    return f"{interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def markdown(groups_by_model: Mapping[str, Sequence[Group]], options: argparse.Namespace) -> str:
    """Return a table for each model."""
    lines = [f"{options.samples} samples per cell, seeds {options.seed} to {options.seed + options.samples - 1}.", ""]
    for model, groups in groups_by_model.items():
        lines += [f"### {model}", "", *table(groups, options.modes), ""]
    return "\n".join(lines)


def numbers(groups_by_model: Mapping[str, Sequence[Group]], options: argparse.Namespace) -> dict[str, Any]:
    """Return the content of the JSON file."""
    rows: list[dict[str, Any]] = []
    for model, groups in groups_by_model.items():
        for group in groups:
            names = {name: group.settings[name] for name in ("mode", "method", "entries", "bits")}
            row = {"model": model, **names, "kl": rounded(asdict(group.interval("kl")))}
            row |= rounded({name: group.interval(name).mean for name in ("top1", "bytes")})
            whole = find_group(groups, names["mode"], names["method"], names["entries"], FULL_BITS)
            if whole is not None and whole is not group and (difference := group.difference(whole, "kl")):
                row["kl_minus_16_bits"] = rounded(asdict(difference.interval))
            rows.append(row)
    return {
        "samples_per_cell": options.samples,
        "first_seed": options.seed,
        "tokens": options.tokens,
        "machine": machine(),
        "transformers": transformers.__version__,
        "rows": rows,
    }


def rounded(numbers_by_name: Mapping[str, float]) -> dict[str, float | None]:
    """Return four digits of each number; None for NaN, the bounds of a single sample."""
    return {name: None if math.isnan(number) else float(f"{number:.4g}") for name, number in numbers_by_name.items()}


def write(page: Path, text: str, content: Mapping[str, Any], start: str = START, json_path: Path | None = None) -> None:
    """Write the tables into their section of a page, and the numbers into a JSON file, a row on each line.

    Args:
        page: the page.
        text: the tables.
        content: the numbers.
        start: first line of the section.
        json_path: the JSON file; None uses the name of the page.

    """
    before, _, after = page.read_text(encoding="utf-8").partition(start)
    page.write_text(f"{before}{start}\n\n{text}\n{END}{after.partition(END)[2]}", encoding="utf-8")
    rows = ",\n".join(json.dumps(row) for row in content["rows"])
    head = json.dumps({name: value for name, value in content.items() if name != "rows"}, indent=1)
    (json_path or page.with_suffix(".json")).write_text(f'{head[:-2]},\n "rows": [\n{rows}\n]\n}}\n', encoding="utf-8")


def main() -> None:
    installed = [name for name, peer in PEERS.items() if peer.is_installed]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(PACKAGED_MODELS))
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--policies", nargs="*", default=[DEFAULT_POLICY])
    parser.add_argument("--entries", type=float, nargs="+", default=[1.0, 0.5, 0.36, 0.25, 0.18], help="fractions")
    parser.add_argument(
        "--bits",
        type=parse_bits,
        nargs="*",
        default=[8, "5,4", 4, "4,3", 3, "3,2", 2],
        help='numbers of bits, or pairs "keys,values"; rows without quantization are added',
    )
    parser.add_argument(
        "--memory", type=float, nargs="*", default=[0.25, 0.125, 0.1, 0.05], help="fractions of the bytes, with 16 bits"
    )
    parser.add_argument("--peers", nargs="*", default=installed, help="default: those whose packages are installed")
    parser.add_argument("--repair", action="store_true", help="also measure every policy with repair")
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--threads", type=int, default=1, help="threads of each model's process")
    parser.add_argument("--folder", type=Path, default=Path("out/bits"))
    parser.add_argument("--write", action="store_true", help="write the results into the page")
    parser.add_argument("--page", type=Path, default=PAGE, help="page whose tables are written")
    options = parser.parse_args()
    if options.samples < 1:
        sys.exit(f"samples must be at least 1, got {options.samples}")
    if not all(0 < entries <= 1 for entries in options.entries):
        sys.exit(f"entries must be fractions above 0 and at most 1, got {options.entries}")
    torch.set_num_threads(options.threads)
    if len(options.models) > 1:
        run_in_processes(options.models, options.threads)
    groups_by_model = {model: run(options, model) for model in options.models}
    text, content = markdown(groups_by_model, options), numbers(groups_by_model, options)
    print(text)
    if options.write:
        write(options.page, text, content)
    print(json.dumps(content))


if __name__ == "__main__":
    main()
