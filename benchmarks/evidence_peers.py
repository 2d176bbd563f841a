"""Measure kvpress's presses on the samples of benchmarks/evidence.py: same tasks, seeds, budgets, metric and prefill.

Presses with one pass choose in the prefill that Suffice's own caches share, so differences are paired by sample.
Presses that replay the context run passes of their own before; they have a table of their own. `make
bench-evidence-peers` is the short form, in an environment with kvpress:

    python benchmarks/evidence_peers.py --samples 4
    python benchmarks/evidence_peers.py --samples 12 --folder out/evidence-peers --write
    python benchmarks/evidence_peers.py --check --write     # compare with the presses run as kvpress documents it

Finished runs are kept in the folder, and a second call continues. `--write` puts the tables into
docs/results/evidence.md and the numbers into docs/results/kv-peers.json. The last line of the output is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
import transformers
from torch import Tensor

import peers
from evidence import FIRST_SEED, describe_losses, kl_table, write_haystack
from machine import machine
from suffice.kv.eval.cache_grid import OWN_ALLOCATION
from suffice.kv.eval.compare import DEFAULT_TASKS, Comparison
from suffice.kv.eval.fidelity import CacheConfig, evaluate, teacher_forced_metrics
from suffice.kv.eval.run_kinds import file_digest
from suffice.kv.eval.run_options import RunOptions, run_samples
from suffice.kv.eval.samples import load_cached
from suffice.kv.eval.tasks import make_example
from suffice.kv.hf.loading import ModelSource
from suffice.study import PlannedRun, RunContext, RunKind
from suffice.study.results import group_records

OUR_METHODS = (("capkv", "profile"), ("capkv", OWN_ALLOCATION))  # measured in the same prefill
OUR_METHOD = "/".join(OUR_METHODS[0])
BUDGETS = (0.75, 0.5, 0.25, 0.1)
PAGE, NUMBERS = Path("docs/results/evidence.md"), Path("docs/results/kv-peers.json")
START, END = "<!-- written by benchmarks/evidence_peers.py -->", "<!-- end peers -->"


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check the names of presses; add the digest of the haystack and the version of kvpress."""
    peers.check_presses(settings["presses"])
    return {**settings, "digest": file_digest(settings["haystack"]), "kvpress": version("kvpress")}


KIND = RunKind(
    name="kv.peers",
    function="evidence_peers:measure",
    check="evidence_peers:check_settings",
    settings={
        "task": "text",
        "mode": "continuation",
        "tokens": 900,
        "haystack": None,
        "presses": list(peers.ONE_PASS),
        "ours": True,
        "budgets": list(BUDGETS),
        "dtype": "float32",
    },
    description="Measure how close the entries that each press of kvpress keeps stay to the full cache on one example.",
)


def load_sample(settings: Mapping[str, Any], seed: int) -> tuple[Any, Any, Any, Tensor]:
    """Return model, tokenizer, example, and the token ids that `evaluate` prefills."""
    model, tokenizer = load_cached(ModelSource(dtype=settings["dtype"]))
    haystack = Path(settings["haystack"]).read_text(encoding="utf-8")
    example = make_example(settings["task"], tokenizer, tokens=settings["tokens"], seed=seed, haystack=haystack)
    prompt = example.prompt(tokenizer)
    return model, tokenizer, example, prompt.document if settings["mode"] == "agnostic" else prompt.input_ids[:, :-1]


def measure(settings: Mapping[str, Any], seed: int, context: RunContext) -> dict[str, Any]:
    """Measure every press and our methods on one example; the rows are like those of `suffice kv compare`."""
    model, tokenizer, example, input_ids = load_sample(settings, seed)
    context.log(f"{settings['task']}, {settings['mode']}, sample {seed}")
    call, budgets, presses = peers.AttentionCall(), settings["budgets"], settings["presses"]
    chat = example.question is not None
    configs = peers.press_configs(model, presses, budgets, call, input_ids, chat, seed)
    names = [(name, OWN_ALLOCATION, budget) for name in presses for budget in budgets]
    for policy, allocation in OUR_METHODS if settings["ours"] else ():
        own = None if allocation == OWN_ALLOCATION else allocation
        configs += [CacheConfig(policy, budget, own) for budget in budgets]
        names += [(policy, allocation, budget) for budget in budgets]
    with call.follow(model):
        rows = evaluate(model, tokenizer, example, configs, mode=settings["mode"], answer=False)
    metrics = ("kl", "log_likelihood_change", "top1", "tokens_kept", "seconds")
    return {
        "rows": [
            {
                "settings": {"policy": name, "allocation": allocation, "budget": budget},
                "values": {
                    **{metric: row[metric] for metric in metrics},
                    "share": row["tokens_kept"] / input_ids.shape[1],
                },
            }
            for (name, allocation, budget), row in zip(names, rows[1:], strict=True)
        ]
    }


def check_against_kvpress(settings: Mapping[str, Any], seed: int, budget: float) -> dict[str, dict[str, float]]:
    """Run each press on one example as kvpress documents it, and compare with the same press in our prefill.

    Returns:
        For each press: `same`, the share of entries that both keep, relative to the one that keeps more; `kl`, from
        our cache; `kl_official`, from kvpress's cache read by the stock model.

    """
    model, tokenizer, example, input_ids = load_sample(settings, seed)
    presses, chat, gold = settings["presses"], example.question is not None, example.answer_ids(tokenizer)
    call = peers.AttentionCall()
    kept: dict[str, list[Tensor]] = {name: [] for name in presses}
    configs: list[CacheConfig] = []
    for name, config in zip(
        presses, peers.press_configs(model, presses, [budget], call, input_ids, chat, seed), strict=True
    ):
        selection = RecordingSelection(config.policy.selection, kept[name].append)
        configs.append(CacheConfig(replace(config.policy, selection=selection), budget))
    with call.follow(model):
        rows = evaluate(model, tokenizer, example, configs, mode=settings["mode"], answer=False)
    rest = torch.cat((example.prompt(tokenizer).input_ids[:, input_ids.shape[1] :], gold), dim=1)

    def log_probs(cache: Any) -> Tensor:
        positions = torch.arange(input_ids.shape[1], input_ids.shape[1] + rest.shape[1])[None]
        with torch.no_grad():
            output = model(rest, past_key_values=cache, position_ids=positions, logits_to_keep=gold.shape[1] + 1)
        return output.logits[0, :-1].float().log_softmax(-1)

    full_cache = transformers.DynamicCache()
    with torch.no_grad():
        model.model(input_ids=input_ids, past_key_values=full_cache)
    reference = log_probs(full_cache)
    results: dict[str, dict[str, float]] = {}
    for name, row in zip(presses, rows[1:], strict=True):
        cache, official = peers.run_with_kvpress(model, name, budget, input_ids, chat, seed)
        result = results[name] = {"same": overlap(kept[name], official, input_ids.shape[1]), "kl": row["kl"]}
        if len({layer.keys.shape[2] for layer in cache.layers}) == 1:  # the stock model has one mask for all layers
            result["kl_official"] = teacher_forced_metrics(reference, log_probs(cache), gold[0])["kl"]
        for layer in model.model.layers:
            peers.take_mask(layer.self_attn)
        print(f"{name}: {result}", flush=True)
    return results


class RecordingSelection(peers.Selection):
    """Selects like another selection, and passes the selected positions to a function."""

    def __init__(self, inner: peers.Selection, record: Callable[[Tensor], None]) -> None:
        self.inner, self.record = inner, record

    def select(self, estimator: Any, objective: Any, budget: Any) -> Tensor:
        kept = self.inner.select(estimator, objective, budget)
        self.record(kept)
        return kept


def overlap(first: Sequence[Tensor], second: Sequence[Tensor], tokens: int) -> float:
    """Return the number of entries that both keep, divided by the larger number that one of them keeps.

    Args:
        first: positions kept in each layer, −1 for none.
        second: the same of another cache.
        tokens: number of tokens in the prompt.

    """

    def mask(kept: Tensor) -> Tensor:
        return torch.zeros(*kept.shape[:2], tokens + 1).scatter_(2, kept.where(kept >= 0, tokens), 1)[..., :-1].bool()

    masks = [(mask(one), mask(other)) for one, other in zip(first, second, strict=True)]
    common = sum(int((one & other).sum()) for one, other in masks)
    return common / max(sum(int(side.sum()) for side in sides) for sides in zip(*masks, strict=True))


def print_line(progress: Any, line: str) -> None:
    """Print what a worker reports."""
    if line:
        print(line, flush=True)


def run(options: argparse.Namespace, settings: Mapping[str, Any]) -> dict[str, Comparison]:
    """Measure the missing samples, and return the comparisons of presses with one pass and with several passes."""
    presses_by_class = {
        "one pass": [name for name in options.presses if name in peers.ONE_PASS],
        "several passes": [name for name in options.presses if name in peers.SEVERAL_PASSES],
    }
    settings_by_class: dict[str, list[dict[str, Any]]] = {
        name: [
            KIND.complete({**settings, "presses": presses, "ours": name == "one pass", "task": task, "mode": mode})
            for task, mode in DEFAULT_TASKS
        ]
        for name, presses in presses_by_class.items()
        if presses or name == "one pass"
    }
    seeds = range(options.seed, options.seed + options.samples)
    plan = [PlannedRun(one, seed) for seed in seeds for part in settings_by_class.values() for one in part]
    run_options = RunOptions(
        options.folder, on_progress=lambda progress, line: print(line, flush=True) if line else None
    )
    # Each set of samples has a name of its own, so that a short run does not replace a longer study.
    records = run_samples(options.folder, KIND, plan, f"peers-{options.seed}-{options.samples}", run_options)
    groups = group_records(records)
    shared = {**settings, "samples": options.samples, "seed": options.seed}
    ours = [group for group in groups if group.settings["policy"] not in peers.PRESSES]
    comparisons: dict[str, Comparison] = {}
    for name in settings_by_class:
        own = [group for group in groups if group.settings["policy"] in presses_by_class[name]]
        comparisons[name] = Comparison(shared, own + (ours if presses_by_class[name] else []))
    return comparisons


def markdown(comparisons: Mapping[str, Comparison], check: Mapping[str, Any]) -> str:
    """Return a table for each class of presses, the significant losses, and the presses that miss the budget."""
    lines = [f"{next(iter(comparisons.values())).settings['samples']} samples per condition.", ""]
    for name, comparison in comparisons.items():
        losses = describe_losses(comparison, OUR_METHOD)
        lines += [f"### Presses with {name}", "", *kl_table(comparison, OUR_METHOD), "", *losses, ""]
    uneven = [
        f"`{method}` ({', '.join(f'{share:.1%}' for share in shares)})"
        for comparison in comparisons.values()
        for method, shares in kept_shares(comparison).items()
        if any(
            abs(share / budget - 1) > 0.02 for share, budget in zip(shares, comparison.settings["budgets"], strict=True)
        )
    ]
    text = f"Kept over 2 % more or less than the budget (means over the tasks): {', '.join(uneven) or 'none'}."
    lines += [fill(text, 120), ""]
    if check:
        rows = check["presses"].values()
        max_gap = max(abs(row["kl"] - row["kl_official"]) for row in rows if "kl_official" in row)
        num_same, min_same = sum(row["same"] == 1 for row in rows), min(row["same"] for row in rows)
        text = (
            f"kvpress's own way to run the presses (sample {check['seed']}, {check['mode']}, {check['budget']:.0%}): "
            f"{num_same} of {len(rows)} presses keep exactly the same entries"
            f"{'' if num_same == len(rows) else f', the others at least {min_same:.2%} of them'}; KL read from "
            f"kvpress's cache by the stock model differs by at most {max_gap:.1e} nats."
        )
        lines += [fill(text, 120), ""]
    left_out = [f"{name} ({reason})" for name, reason in peers.LEFT_OUT.items()]
    return "\n".join([*lines, fill(f"Left out: {'; '.join(left_out)}.", 120)])


def kept_shares(comparison: Comparison) -> dict[str, list[float]]:
    """Return the share of the prompt that each method keeps at each budget, as a mean over tasks."""
    return {
        method: [
            sum(shares) / len(shares)
            for budget in comparison.settings["budgets"]
            if (
                shares := [
                    comparison.group(method, condition).interval("share").mean
                    for condition in comparison.conditions
                    if condition.budget == budget
                ]
            )
        ]
        for method in comparison.methods
    }


def numbers(comparisons: Mapping[str, Comparison], check: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of the JSON file."""
    settings = next(iter(comparisons.values())).settings
    columns = ("policy", "allocation", "task", "mode", "budget", "mean", "low", "high")
    return {
        "settings": {name: value for name, value in settings.items() if name != "haystack"},
        "kvpress": version("kvpress"),
        "transformers": transformers.__version__,
        "machine": machine(),
        "classes": {
            name: {
                "mean_rank": comparison.mean_ranks(),
                "kl": [
                    {column: row[column] for column in columns} for row in comparison.rows() if row["metric"] == "kl"
                ],
                "differences": [
                    {column: row[column] for column in row if column != "metric"}
                    for row in comparison.differences(OUR_METHOD)
                ],
                "kept": kept_shares(comparison),
            }
            for name, comparison in comparisons.items()
        },
        "check": dict(check),
        "left_out": peers.LEFT_OUT,
    }


def update_check(
    options: argparse.Namespace, settings: Mapping[str, Any], earlier: Mapping[str, Any]
) -> dict[str, Any]:
    """Check the presses against kvpress; keep earlier results of other presses on the same sample."""
    sample = {"task": "multikey", "mode": "agnostic", "budget": 0.25, "seed": options.seed}
    is_same_sample = all(earlier.get(name) == value for name, value in sample.items())
    presses = earlier.get("presses", {}) if is_same_sample else {}
    own = {**settings, "task": sample["task"], "mode": sample["mode"], "presses": options.presses}
    return {**sample, "presses": {**presses, **check_against_kvpress(own, options.seed, sample["budget"])}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--presses", nargs="+", default=list(peers.PRESSES), metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path("out/evidence-peers"))
    parser.add_argument("--check", action="store_true", help="compare with the presses run as kvpress documents it")
    parser.add_argument("--write", action="store_true", help="write the results into docs/")
    options = parser.parse_args()
    try:
        peers.check_presses(options.presses)
    except ValueError as error:
        sys.exit(str(error))
    if options.samples < 1:
        sys.exit(f"samples must be at least 1, got {options.samples}")
    if not all(0 < budget < 1 for budget in options.budgets):
        sys.exit(f"budgets must be fractions between 0 and 1, got {options.budgets}")
    if unknown := peers.unknown_presses():
        print(f"presses of this kvpress that are neither measured nor left out for a reason: {', '.join(unknown)}")
    torch.set_num_threads(1)
    haystack = write_haystack(options.folder, ModelSource(dtype="float32"))
    settings = {"tokens": options.tokens, "haystack": haystack, "budgets": options.budgets, "dtype": "float32"}
    stored = json.loads(NUMBERS.read_text(encoding="utf-8")) if NUMBERS.exists() else {}
    check = stored.get("check", {})
    if options.check:
        check = update_check(options, settings, check)
        if options.write:
            NUMBERS.write_text(json.dumps({**stored, "check": check}, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(check))
        return
    comparisons = run(options, settings)
    text = markdown(comparisons, check)
    print(text)
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(START)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")
        NUMBERS.write_text(json.dumps(numbers(comparisons, check), indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: comparison.mean_ranks() for name, comparison in comparisons.items()}))


if __name__ == "__main__":
    main()
