"""The protocol of kvpress's leaderboard, with the policies of Suffice: RULER, compressed before the question is seen.

    python benchmarks/leaderboard.py --model Qwen/Qwen3-8B --data simonjegou/ruler --device cuda --dtype bfloat16
    python benchmarks/leaderboard.py --make-data out/made-600 --tokens 600 --samples 3 --seed 1
    python benchmarks/leaderboard.py --data out/made-600 --policies capkv-profile kvzip snapkv --ratios .5 .75

The context is the beginning of a user message. Its prefill fills the caches of all policies and compression ratios,
and the cache without compression. Copies of these answer each question about the context greedily. Answers are scored
by the strings that they contain. A compression ratio is the share of the entries that are evicted.

Results are stored after each context, and the same command continues a run that was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from filelock import FileLock, Timeout

import suffice
from leaderboard_answers import (
    Context,
    check_lengths,
    fill_caches,
    generate_from_each,
    relative_bytes,
    tokenize_contexts,
)
from leaderboard_data import Sample, first_of_each_task, make_data, read_samples
from leaderboard_results import ResultsFolder, write_leaderboard
from suffice.cli.kv_options import parse_bits_option
from suffice.kv import DEFAULT_POLICY, CacheConfig, get_policy, load_model
from suffice.kv.budget.memory_limit import parse_memory
from suffice.kv.hf.packaged_models import DEFAULT_MODEL, PACKAGED_MODELS, packaged_model_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RATIOS = (0.25, 0.5, 0.75, 0.875)
BASELINE = "no_press"  # kvpress's name of the cache without compression
_SECONDS_BETWEEN_TABLES = 60.0


@dataclass(frozen=True)
class Entrant:
    """A cache on the leaderboard.

    Args:
        name: name of the policy, with `repair`, the bits and `memory` if they are given; `no_press` if it keeps all.
        ratio: share of the entries that are evicted or, with a limit on the bytes, of the bytes that are saved.
        config: the configuration of the cache.

    """

    name: str
    ratio: float
    config: CacheConfig


def plan_entrants(
    policies: Sequence[str], ratios: Sequence[float], memory: Sequence[float], bits: str, *, repair: bool = False
) -> list[Entrant]:
    """Return the cache without compression, and the caches of all policies and sizes.

    Args:
        policies: names of policies.
        ratios: shares of the entries that are evicted.
        memory: fractions of the bytes of the full cache that may be used.
        bits: number of bits of each stored number, such as `4` or `5,4` (keys, values), or `none`.
        repair: whether kept entries are repaired.

    Raises:
        ValueError: a value is not accepted, or two caches have the same name and ratio.

    """
    parsed_bits = parse_bits_option(bits)
    suffix = ("-repair" if repair else "") + ("" if parsed_bits is None else f"-bits{bits.replace(',', '-')}")
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise ValueError(f"--ratios must be between 0 and 1, the share of entries that are evicted, got {ratio:g}")
    for limit in memory:
        try:
            parse_memory(limit)
        except ValueError:
            raise ValueError(
                f"--memory must be fractions of the full cache, above 0 and up to 1, got {limit:g}"
            ) from None
    entrants = [Entrant(BASELINE, 0.0, CacheConfig("full", 1.0))]
    for given in policies:
        try:
            policy = get_policy(given)
        except ValueError as error:
            raise ValueError(f"--policies: {error}") from None
        if policy.keep_all:
            raise ValueError(f"--policies must be policies that evict, got {given!r}. It is always measured")
        for ratio in ratios:
            # Rounded, so that 1 − 0.9 is 0.1.
            config = CacheConfig(policy.name, round(1 - ratio, 9), bits=parsed_bits, repair=repair)
            entrants.append(Entrant(f"{policy.name}{suffix}", ratio, config))
        for limit in memory:
            config = CacheConfig(policy.name, memory=limit, bits=parsed_bits, repair=repair)
            entrants.append(Entrant(f"{policy.name}{suffix}-memory", round(1 - limit, 9), config))
    names = [folder_name("", "", entrant) for entrant in entrants]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--policies, --ratios and --memory must give different caches, got {twice[0]!r} twice")
    return entrants


def folder_name(data_dir: str, model: str, entrant: Entrant, fraction: float = 1.0) -> str:
    """Return the name of a folder with results, as kvpress forms it."""
    parts = ["ruler", data_dir, model.replace("/", "--"), entrant.name, f"{entrant.ratio:.2f}"]
    return "__".join([*parts, *([f"fraction{fraction:.3f}"] if fraction < 1 else [])])


def plan_folders(
    options: argparse.Namespace, samples: Sequence[Sample], fraction: float, entrants: Sequence[Entrant]
) -> list[tuple[CacheConfig, ResultsFolder]]:
    """Return the configuration and the folder of each cache. Nothing is written yet.

    Raises:
        ValueError: a folder holds results of other settings.

    """
    is_folder = Path(options.data).is_dir()
    data_dir = Path(options.data).resolve().name if is_folder else options.data_dir
    digest = hashlib.sha256(repr(list(samples)).encode()).hexdigest()[:16]
    folders: list[tuple[CacheConfig, ResultsFolder]] = []
    for entrant in entrants:
        config = {
            "dataset": "ruler",
            "data_dir": data_dir,
            "model": options.model,
            "device": options.device,
            "press_name": entrant.name,
            "compression_ratio": entrant.ratio,
            "fraction": fraction,
            "max_new_tokens": None,
            "max_context_length": None,
            "query_aware": False,
            "output_dir": str(options.output),
            "press_init_command": str(entrant.config),
            "suffice": {
                "version": suffice.__version__,
                "torch": str(torch.__version__),
                "transformers": transformers.__version__,
                "dtype": options.dtype,
                "samples": len(samples),
                "data": digest,
            },
        }
        name = folder_name(data_dir, options.model, entrant, fraction)
        folders.append((entrant.config, ResultsFolder(options.output / name, config)))
    return folders


def print_leaderboard(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows of `leaderboard.csv` as a Markdown table."""
    columns = list(dict.fromkeys(name for row in rows for name in row if name not in ("model", "data")))
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for row in rows:
        print(f"| {' | '.join(str(row.get(name, '')) for name in columns)} |")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model without the model.

    Raises:
        ValueError: there is no such model.

    """
    source = str(packaged_model_folder(name)) if name in PACKAGED_MODELS else name
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model must be a folder with a model or a known model id, got {name!r}: {error}") from error
    return tokenizer


def parse_options(arguments: Sequence[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Return the parser and the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="Hugging Face model id or folder")
    parser.add_argument("--data", help="folder with .parquet, .csv or .jsonl files, or id of a data set of the hub")
    parser.add_argument("--data-dir", default="4096", help="folder within the data set of the hub")
    parser.add_argument("--policies", nargs="+", default=[DEFAULT_POLICY], help="`suffice kv policies` lists them")
    parser.add_argument("--ratios", type=float, nargs="+", help="shares of entries that are evicted")
    parser.add_argument("--memory", type=float, nargs="+", default=[], help="fractions of the bytes of the full cache")
    parser.add_argument("--bits", default="none", help="bits of each stored number, such as 4, or 5,4 (keys, values)")
    parser.add_argument("--repair", action="store_true", help="repair kept entries")
    parser.add_argument("--output", type=Path, default=Path("out/leaderboard"))
    parser.add_argument("--samples", type=int, help="samples of each task (default: all; 20 with --make-data)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--attn-implementation", default="sdpa")
    parser.add_argument("--make-data", type=Path, metavar="FOLDER", help="only make data, in this folder")
    parser.add_argument("--tokens", type=int, default=4096, help="length of the prompts of --make-data")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first sample of --make-data")
    return parser, parser.parse_args(arguments)


def check_options(options: argparse.Namespace) -> None:
    """Check options that belong together.

    Raises:
        ValueError: an option is missing, or out of range.

    """
    if (options.data is None) == (options.make_data is None):
        raise ValueError("--data or --make-data must be given, and not both")
    if options.samples is not None and options.samples < 1:
        raise ValueError(f"--samples must be at least 1, got {options.samples}")
    if options.tokens < 1:
        raise ValueError(f"--tokens must be at least 1, got {options.tokens}")


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        contexts: the contexts with their questions.
        folders: configuration and results of each cache.

    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    contexts: list[Context]
    folders: list[tuple[CacheConfig, ResultsFolder]]


def prepare(options: argparse.Namespace, stack: contextlib.ExitStack) -> Plan:
    """Check everything, load the model, and lock the folder for results until the stack is closed.

    Raises:
        ValueError: an option, the data or the folder are not accepted. Most errors are raised before the model is
            loaded.

    """
    ratios = options.ratios if options.ratios is not None else () if options.memory else RATIOS
    entrants = plan_entrants(options.policies, ratios, options.memory, options.bits, repair=options.repair)
    all_samples = read_samples(options.data, options.data_dir)
    samples = first_of_each_task(all_samples, options.samples)
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"--output must be a folder, got {str(options.output)!r}, which is a file")
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        stack.enter_context(FileLock(options.output / ".lock", timeout=0))
    except Timeout:
        raise ValueError(
            f"--output must not be in use, got {str(options.output)!r}, into which another run writes. Choose another "
            "folder for each run"
        ) from None
    folders = plan_folders(options, samples, len(samples) / len(all_samples), entrants)
    model, tokenizer = load_model(
        options.model,
        device=options.device,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        on_progress=print,
    )
    contexts = tokenize_contexts(tokenizer, samples)
    for config, _ in folders:
        config.build(model)  # raises an error if the model does not support the configuration
    check_lengths(model, tokenizer, contexts, replay=any(get_policy(c.policy).replay_kinds for c, _ in folders))
    for _, folder in folders:
        folder.open()
    return Plan(model, tokenizer, contexts, folders)


def answer_all(plan: Plan, on_progress: Callable[[int], None] = lambda _: None) -> None:
    """Answer all questions that are not finished yet, and store the answers after each context.

    Args:
        plan: what is measured.
        on_progress: called with the number of contexts that are finished.

    """
    for number, context in enumerate(plan.contexts, 1):
        indices = {sample.index for sample in context.samples}
        todo = [(config, folder) for config, folder in plan.folders if not indices <= folder.finished]
        if todo:
            caches = fill_caches(plan.model, plan.tokenizer, context, [config for config, _ in todo])
            num_bytes = [relative_bytes(cache) for cache in caches]
            texts: list[list[str]] = []  # by question and cache
            for sample, question in zip(context.samples, context.questions, strict=True):
                generated = generate_from_each(plan.model, caches, question, sample.max_new_tokens)
                texts.append([str(plan.tokenizer.decode(ids, skip_special_tokens=True)) for ids in generated])
            for (_, folder), own, share in zip(todo, zip(*texts, strict=True), num_bytes, strict=True):
                folder.append(zip(context.samples, own, strict=True), share)
        on_progress(number)


def measure(plan: Plan, output: Path) -> None:
    """Answer all questions, and write the results."""
    start = last_table = time.monotonic()

    def on_progress(number: int) -> None:
        nonlocal last_table
        now = time.monotonic()
        print(f"{number} of {len(plan.contexts)} contexts, {now - start:.0f} s", flush=True)
        if now - last_table > _SECONDS_BETWEEN_TABLES:
            write_leaderboard(output)
            last_table = now

    answer_all(plan, on_progress)
    for _, folder in plan.folders:
        folder.write_metrics()
    print_leaderboard(write_leaderboard(output))


def main(arguments: Sequence[str] | None = None) -> None:
    parser, options = parse_options(arguments)
    with contextlib.ExitStack() as stack:
        try:
            check_options(options)
            if options.make_data is not None:
                count = 20 if options.samples is None else options.samples
                tokenizer = load_tokenizer(options.model)
                path = make_data(options.make_data, tokenizer, tokens=options.tokens, samples=count, seed=options.seed)
                print(f"wrote {path}")
                return
            plan = prepare(options, stack)
        except ValueError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
        measure(plan, options.output)


if __name__ == "__main__":
    main()
