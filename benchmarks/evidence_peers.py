"""kvpress's presses on the samples of benchmarks/evidence.py: same tasks, seeds, budgets, metric, same prefill.

Presses of one pass choose in the prefill that our own caches share, so differences from ours are paired. Presses that
replay the context make passes of their own before; they stand in a table of their own. `make bench-evidence-peers` is
the short form, in an environment that has kvpress:

    python benchmarks/evidence_peers.py --samples 4
    python benchmarks/evidence_peers.py --samples 12 --folder out/evidence-peers --write
    python benchmarks/evidence_peers.py --check --write     # the same presses run as kvpress documents it

It keeps every finished run in its folder and goes on from there. `--write` puts the tables into docs/evidence.md and
the numbers into docs/results/kv-peers.json. The last line printed is one JSON object.
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
from evidence import FIRST_SEED, haystack, losses, table
from machine import machine
from suffice.kv.eval.compare import TASKS, Comparison, finished
from suffice.kv.eval.fidelity import Cell, compare, evaluate
from suffice.kv.eval.run_kinds import OWN, digest
from suffice.kv.eval.runs import loaded
from suffice.kv.eval.tasks import make
from suffice.study import PlannedRun, RunKind, Store, run_study
from suffice.study.job import RunContext
from suffice.study.results import group_records

MEASURED = (("capkv", "profile"), ("capkv", OWN))  # ours, in the same prefill
OURS = "/".join(MEASURED[0])
BUDGETS = (0.75, 0.5, 0.25, 0.1)
PAGE, NUMBERS = Path("docs/evidence.md"), Path("docs/results/kv-peers.json")
START, END = "<!-- written by benchmarks/evidence_peers.py -->", "<!-- end peers -->"


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse unknown presses; the haystack enters by its content, kvpress by its version."""
    peers.check_presses(settings["presses"])
    return {**settings, "digest": digest(settings["haystack"]), "kvpress": version("kvpress")}


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
    description="Read one example, and measure how close what each press of kvpress keeps stays to the full cache.",
)


def sample(settings: Mapping[str, Any], seed: int) -> tuple[Any, Any, Any, Tensor]:
    """Return model, tokenizer, example, and the tokens that are prefilled, as `evaluate` does it."""
    model, tokenizer = loaded(None, "cpu", settings["dtype"], "sdpa")
    text = Path(settings["haystack"]).read_text(encoding="utf-8")
    example = make(settings["task"], tokenizer, tokens=settings["tokens"], seed=seed, haystack=text)
    parts = example.prompt(tokenizer)
    return model, tokenizer, example, parts.document if settings["mode"] == "agnostic" else parts.ids[:, :-1]


def measure(settings: Mapping[str, Any], seed: int, context: RunContext) -> dict[str, Any]:
    """Measure every press and ours on one example; rows as those of `suffice kv compare`."""
    model, tokenizer, example, ids = sample(settings, seed)
    context.log(f"{settings['task']}, {settings['mode']}, sample {seed}")
    prefill, budgets, presses = peers.Prefill(), settings["budgets"], settings["presses"]
    chat = example.question is not None
    cells = peers.cells(model, presses, budgets, prefill, ids, chat, seed)
    names = [(name, OWN, budget) for name in presses for budget in budgets]
    for policy, split in MEASURED if settings["ours"] else ():
        cells += [Cell(policy, budget, None if split == OWN else split) for budget in budgets]
        names += [(policy, split, budget) for budget in budgets]
    with prefill.watch(model):
        rows = evaluate(model, tokenizer, example, cells, mode=settings["mode"], answer=False)
    kept = ("kl", "log_likelihood_change", "top1", "tokens_kept", "seconds")
    return {
        "rows": [
            {
                "settings": {"policy": name, "allocation": split, "budget": budget},
                "values": {**{key: row[key] for key in kept}, "share": row["tokens_kept"] / ids.shape[1]},
            }
            for (name, split, budget), row in zip(names, rows[1:], strict=True)
        ]
    }


def check(settings: Mapping[str, Any], seed: int, budget: float) -> dict[str, dict[str, float]]:
    """Run each press as kvpress documents it, on one example, and compare with what it keeps in our prefill.

    `same`: share of the entries it keeps that ours keeps for it too, and the other way round, the lower of both;
    `kl`, ours, and `kl_official`, read from kvpress's own cache by the stock model.
    """
    model, tokenizer, example, ids = sample(settings, seed)
    presses = settings["presses"]
    prefill, chat, gold = peers.Prefill(), example.question is not None, example.gold(tokenizer)
    cells = peers.cells(model, presses, [budget], prefill, ids, chat, seed)
    caught: dict[str, list[Tensor]] = {name: [] for name in presses}
    cells = [
        Cell(replace(cell.policy, selection=Caught(cell.policy.selection, caught[name].append)), budget)
        for name, cell in zip(presses, cells, strict=True)
    ]
    with prefill.watch(model):
        rows = evaluate(model, tokenizer, example, cells, mode=settings["mode"], answer=False)
    rest = torch.cat((example.prompt(tokenizer).ids[:, ids.shape[1] :], gold), dim=1)

    def read(cache: Any) -> Tensor:
        places = torch.arange(ids.shape[1], ids.shape[1] + rest.shape[1])[None]
        with torch.no_grad():
            out = model(rest, past_key_values=cache, position_ids=places, logits_to_keep=gold.shape[1] + 1)
        return out.logits[0, :-1].float().log_softmax(-1)

    whole = transformers.DynamicCache()
    with torch.no_grad():
        model.model(input_ids=ids, past_key_values=whole)
    reference = read(whole)
    found: dict[str, dict[str, float]] = {}
    for name, row in zip(presses, rows[1:], strict=True):
        cache, kept = peers.official(model, name, budget, ids, chat, seed)
        one = found[name] = {"same": overlap(caught[name], kept, ids.shape[1]), "kl": row["kl"]}
        if len({layer.keys.shape[2] for layer in cache.layers}) == 1:  # the stock model has one mask for all layers
            one["kl_official"] = compare(reference, read(cache), gold[0])["kl"]
        for layer in model.model.layers:
            peers.take_mask(layer.self_attn)
        print(f"{name}: {one}", flush=True)
    return found


class Caught(peers.Selection):
    """Chooses as another selection, and tells what."""

    def __init__(self, inner: peers.Selection, tell: Callable[[Tensor], None]) -> None:
        self.inner, self.tell = inner, tell

    def choose(self, policy: Any, stats: Any, budget: Any) -> Tensor:
        kept = self.inner.choose(policy, stats, budget)
        self.tell(kept)
        return kept


def overlap(one: Sequence[Tensor], other: Sequence[Tensor], tokens: int) -> float:
    """Return the share of kept entries that both have; positions of each layer, −1 for none."""

    def mask(kept: Tensor) -> Tensor:
        return torch.zeros(*kept.shape[:2], tokens + 1).scatter_(2, kept.where(kept >= 0, tokens), 1)[..., :-1].bool()

    masks = [(mask(mine), mask(theirs)) for mine, theirs in zip(one, other, strict=True)]
    both = sum(int((mine & theirs).sum()) for mine, theirs in masks)
    return both / max(sum(int(side.sum()) for side in sides) for sides in zip(*masks, strict=True))


def results(options: argparse.Namespace, settings: Mapping[str, Any]) -> dict[str, Comparison]:
    """Do what is missing, and return what was found: presses of one pass, and of more."""
    classes = {
        "one pass": [name for name in options.presses if name in peers.ONE_PASS],
        "more passes": [name for name in options.presses if name in peers.MORE_PASSES],
    }
    plan: dict[str, list[dict[str, Any]]] = {
        name: [
            KIND.complete({**settings, "presses": presses, "ours": name == "one pass", "task": task, "mode": mode})
            for task, mode in TASKS
        ]
        for name, presses in classes.items()
        if presses or name == "one pass"
    }
    seeds = range(options.seed, options.seed + options.samples)
    every = [PlannedRun(one, seed) for seed in seeds for part in plan.values() for one in part]
    watch = lambda progress, line: print(line, flush=True) if line else None  # noqa: E731
    # A name of its own: a look at some samples leaves a longer study alone.
    name = f"peers-{options.seed}-{options.samples}"
    run_study(options.folder, KIND, every, name=name, retry_failed=True, on_progress=watch)
    with Store(options.folder, read_only=True) as store:
        groups = group_records(finished(list(store.records(name))))
    shared = {**settings, "samples": options.samples, "seed": options.seed}
    ours = [one for one in groups if one.settings["policy"] not in peers.PRESSES]
    return {
        name: Comparison(
            shared, [one for one in groups if one.settings["policy"] in classes[name]] + (ours if classes[name] else [])
        )
        for name in plan
    }


def markdown(found: Mapping[str, Comparison], checked: Mapping[str, Any]) -> str:
    """Return a table for each class, what beats ours, and what keeps more or less than it was told."""
    lines = [f"{next(iter(found.values())).settings['samples']} samples a cell.", ""]
    for name, view in found.items():
        lines += [f"### Presses of {name}", "", *table(view, OURS), "", *losses(view, OURS), ""]
    uneven = [
        f"`{name}` ({', '.join(f'{share:.1%}' for share in shares)})"
        for view in found.values()
        for name, shares in kept_shares(view).items()
        if any(abs(share / budget - 1) > 0.02 for share, budget in zip(shares, view.settings["budgets"], strict=True))
    ]
    lines += [
        fill(f"Kept more than 2 % more or less than told, means over the tasks: {', '.join(uneven) or 'none'}.", 120),
        "",
    ]
    if checked:
        rows = checked["presses"].values()
        gap = max(abs(row["kl"] - row["kl_official"]) for row in rows if "kl_official" in row)
        same, least = sum(row["same"] == 1 for row in rows), min(row["same"] for row in rows)
        text = (
            f"Beside kvpress's own way to run them (sample {checked['seed']}, {checked['mode']}, "
            f"{checked['budget']:.0%}): {same} of {len(rows)} presses keep the very same entries"
            f"{'' if same == len(rows) else f', the least alike {least:.2%} of them'}; KL read from kvpress's cache by "
            f"the stock model differs by at most {gap:.1e} nats."
        )
        lines += [fill(text, 120), ""]
    left = [f"{name} ({why})" for name, why in peers.WITHOUT.items()]
    return "\n".join([*lines, fill(f"Left out: {'; '.join(left)}.", 120)])


def kept_shares(found: Comparison) -> dict[str, list[float]]:
    """Return what each contestant kept of the prompt, for each budget, in the mean over tasks."""
    return {
        name: [
            sum(own) / len(own)
            for budget in found.settings["budgets"]
            if (own := [found.find(name, cell).interval("share").mean for cell in found.cells if cell[2] == budget])
        ]
        for name in found.contestants
    }


def facts(found: Mapping[str, Comparison], checked: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the file holds."""
    settings = next(iter(found.values())).settings
    return {
        "settings": {key: value for key, value in settings.items() if key != "haystack"},
        "kvpress": version("kvpress"),
        "transformers": transformers.__version__,
        "machine": machine(),
        "classes": {
            name: {
                "mean_rank": view.ranks(),
                "kl": [
                    {key: row[key] for key in ("policy", "allocation", "task", "mode", "budget", "mean", "low", "high")}
                    for row in view.rows()
                    if row["metric"] == "kl"
                ],
                "minus_ours": [{key: row[key] for key in row if key != "metric"} for row in view.against(OURS)],
                "kept": kept_shares(view),
            }
            for name, view in found.items()
        },
        "check": dict(checked),
        "left_out": peers.WITHOUT,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    parser.add_argument("--tokens", type=int, default=900)
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    parser.add_argument("--presses", nargs="+", default=list(peers.PRESSES), metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path("out/evidence-peers"))
    parser.add_argument("--check", action="store_true", help="run the presses as kvpress documents it, and compare")
    parser.add_argument("--write", action="store_true", help="into docs/")
    options = parser.parse_args()
    try:
        peers.check_presses(options.presses)
    except ValueError as error:
        sys.exit(str(error))
    if options.samples < 1 or not all(0 < budget < 1 for budget in options.budgets):
        sys.exit(f"samples is {options.samples}, budgets {options.budgets}; accepted: at least 1, shares below 1")
    if fresh := peers.unknown_presses():
        print(f"new in this kvpress, neither measured nor left out for a reason: {', '.join(fresh)}")
    torch.set_num_threads(1)
    place = haystack(options.folder, "float32")
    settings = {"tokens": options.tokens, "haystack": place, "budgets": options.budgets, "dtype": "float32"}
    before = json.loads(NUMBERS.read_text(encoding="utf-8")) if NUMBERS.exists() else {}
    checked = before.get("check", {})
    if options.check:
        task, mode, budget = "multikey", "agnostic", 0.25
        own = {**settings, "task": task, "mode": mode, "presses": options.presses}
        about = {"task": task, "mode": mode, "budget": budget, "seed": options.seed}
        # Beside what was checked before, if it was on the same sample.
        earlier = checked.get("presses", {}) if all(checked.get(key) == about[key] for key in about) else {}
        checked = {**about, "presses": {**earlier, **check(own, options.seed, budget)}}
        if options.write:
            NUMBERS.write_text(json.dumps({**before, "check": checked}, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(checked))
        return
    found = results(options, settings)
    said = markdown(found, checked)
    print(said)
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        first, last = page.split(START)[0], page.split(END)[1]
        PAGE.write_text(f"{first}{START}\n\n{said}\n\n{END}{last}", encoding="utf-8")
        NUMBERS.write_text(json.dumps(facts(found, checked), indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: view.ranks() for name, view in found.items()}))


if __name__ == "__main__":
    main()
