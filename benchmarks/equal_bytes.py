"""How close caches stay to the full cache if all of them may take the same number of bytes.

Each policy gets the same fraction of the bytes of the full cache in 16 bits: once with entries in 16 bits, and once
with quantized entries, whose number and bits follow from the limit as with `memory=`. Our policies are also measured
with repair. Policies that need one pass over the prompt, and policies that need a replay, are in tables of their own.
Samples and measure are those of benchmarks/bits.py, which also measures quantization without eviction on them.

    python benchmarks/equal_bytes.py --samples 1                                     # a few minutes
    python benchmarks/equal_bytes.py --samples 20 --write
    python benchmarks/equal_bytes.py --seed 1020 --samples 20 --add --write          # 20 more
    python benchmarks/equal_bytes.py --groups replay --samples 10 --write            # only one table

Each model is measured in a process of its own. Finished samples are kept in the folder, and a second call continues.
`--write` puts the tables of a group of policies into its section of docs/results/equal-bytes.md, and the numbers into
docs/results/equal-bytes-GROUP.json, with the values of each sample. `--add` joins them with the new samples. `--figure`
draws docs/images/equal-bytes.png from the numbers of both groups.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure

from bits import rounded, run_in_processes, write
from evidence import FIRST_SEED, TOKENS, write_haystack
from fidelity_sample import MODES, FidelitySample, stored_bytes
from machine import machine
from suffice.kv import DEFAULT_POLICY, CompressedCache
from suffice.kv.cache.prefill import prefill
from suffice.kv.eval.run_kinds import text_digest
from suffice.kv.eval.run_options import RunOptions, run_samples
from suffice.kv.hf.loading import ModelSource
from suffice.kv.hf.packaged_models import PACKAGED_MODELS
from suffice.kv.policy.names import DEFAULT_REPLAY_POLICY
from suffice.report.style import color_of, figure_style, save_figure
from suffice.study import PlannedRun, RunContext, RunKind
from suffice.study.results import Group, Interval, group_records

METRICS = ("kl", "top1", "bytes")
LIMITS = (1 / 4, 1 / 8, 1 / 10, 1 / 20, 1 / 40)
PAGE = Path("docs/results/equal-bytes.md")
FIGURE = Path("docs/images/equal-bytes.png")


@dataclass(frozen=True)
class PolicyGroup:
    """Policies of one table.

    Args:
        title: title of the table.
        ours: our policy, also measured with repair.
        rivals: names of other policies.

    """

    title: str
    ours: str
    rivals: tuple[str, ...]

    @property
    def methods(self) -> list[Method]:
        """All methods, first the one that all others are compared with."""
        ours = [Method(self.ours, is_quantized, repair) for is_quantized in (True, False) for repair in (True, False)]
        return ours + [Method(name, is_quantized) for is_quantized in (True, False) for name in self.rivals]


@dataclass(frozen=True)
class Method:
    """A way to fill the bytes.

    Args:
        policy: name of the policy.
        is_quantized: whether entries are quantized; otherwise they have 16 bits.
        repair: whether entries are repaired.

    """

    policy: str
    is_quantized: bool
    repair: bool = False

    @property
    def name(self) -> str:
        """Name in tables and in stored results."""
        bits = "quantized" if self.is_quantized else "16 bits"
        return f"{self.policy}, {bits}{', repair' if self.repair else ''}"

    def make_cache(self, sample: FidelitySample, limit: float) -> CompressedCache:
        """Return an empty cache that takes at most a fraction of the bytes of the full cache."""
        if self.is_quantized:
            return sample.limited_cache(limit, "prefill", self.policy, repair=self.repair)
        return sample.exact_cache(limit, self.policy, repair=self.repair)


GROUPS = {
    "one-pass": PolicyGroup(
        "Policies with one pass over the prompt",
        DEFAULT_POLICY,
        ("capkv-profile", "capkv", "keydiff", "expected-attention", "snapkv"),
    ),
    "replay": PolicyGroup("Policies with a replay", DEFAULT_REPLAY_POLICY, ("kvzip", "kvgrad")),
}


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check the names of the mode and of the group; add the digest of the haystack."""
    for name, known in (("mode", MODES), ("group", GROUPS)):
        if settings[name] not in known:
            raise ValueError(f"{name} must be among {', '.join(known)}, got {settings[name]!r}")
    return {**settings, "digest": text_digest(settings["haystack"])}


KIND = RunKind(
    name="kv.equal_bytes",
    function="equal_bytes:measure",
    check="equal_bytes:check_settings",
    settings={"model": "", "mode": "text", "group": "one-pass", "tokens": TOKENS, "haystack": None},
    description="Measure how close caches of the same bytes stay to the full cache on one example.",
)


def measure(settings: Mapping[str, Any], seed: int, context: RunContext) -> dict[str, Any]:
    """Measure every method with every limit on one example."""
    sample = FidelitySample(settings["model"], settings["mode"], settings["tokens"], seed, settings["haystack"])
    context.log(f"{settings['model']}, {settings['mode']}, {settings['group']}, sample {seed}")
    full = sample.compare(sample.full, sample.full_bytes)
    rows: list[dict[str, Any]] = [{"settings": {"method": "full", "limit": 1.0}, "values": full}]
    methods = [(method, limit) for method in GROUPS[settings["group"]].methods for limit in LIMITS]
    caches = [method.make_cache(sample, limit) for method, limit in methods]
    inputs = {"input_ids": sample.prefilled}
    prefill(sample.model, inputs, caches, tokenizer=sample.tokenizer, share_statistics=True)
    while caches:  # each cache is freed as soon as it was compared
        (method, limit), cache = methods.pop(), caches.pop()
        values = sample.compare(cache, stored_bytes(cache))
        rows.append({"settings": {"method": method.name, "limit": limit}, "values": values})
    return {"rows": rows, "tokens": sample.num_tokens}


def run(options: argparse.Namespace, name: str, model: str) -> list[Group]:
    """Measure the missing samples of a group of policies on a model, and return the values of all."""
    folder = options.folder / model.replace("/", "--")
    haystack = folder / "haystack.txt"
    shared = {
        "model": model,
        "group": name,
        "tokens": options.tokens,
        "haystack": str(haystack) if haystack.exists() else write_haystack(folder, ModelSource(model, dtype="float32")),
    }
    seeds = range(options.seed, options.seed + options.samples)
    plan = [PlannedRun(KIND.complete({**shared, "mode": mode}), seed) for seed in seeds for mode in MODES]
    study = f"equal-bytes-{name}-{options.tokens}-{options.seed}-{options.samples}"
    run_options = RunOptions(folder, on_progress=lambda progress, line: print(line, flush=True) if line else None)
    return group_records(run_samples(folder, KIND, plan, study, run_options))


class Results:
    """The results of one model and one group of policies.

    Args:
        groups: values of all samples. Groups of the same cell and method are joined.
        policies: the group of policies.

    """

    def __init__(self, groups: Iterable[Group], policies: PolicyGroup) -> None:
        self._groups: dict[tuple[str, str, float], Group] = {}
        self.methods = [method.name for method in policies.methods]
        for group in groups:
            mode, method, limit = (group.settings[name] for name in ("mode", "method", "limit"))
            if method not in self.methods:  # the full cache, which has no rows in the page
                continue
            joined = self._groups.setdefault((mode, method, limit), Group({}))
            for metric in METRICS:
                joined.values.setdefault(metric, {}).update(group.values[metric])
        self.cells = [(mode, limit) for mode in MODES for limit in LIMITS]
        seeds = {tuple(sorted(group.values["kl"])) for group in self._groups.values()}
        if len(seeds) != 1:
            raise ValueError(f"all methods must have samples of the same seeds, got {sorted(seeds)}")
        self.seeds = seeds.pop()

    def mean(self, mode: str, limit: float, method: str, metric: str = "kl") -> float:
        """Return the mean of a metric over the samples of a cell."""
        return self._groups[mode, method, limit].interval(metric).mean

    def difference(self, mode: str, limit: float, method: str) -> Interval | None:
        """Return the paired difference of the KL divergence from that of the first method; None without an interval."""
        ours = self._groups[mode, self.methods[0], limit]
        difference = self._groups[mode, method, limit].difference(ours, "kl")
        if method == self.methods[0] or difference is None or not difference.interval.has_bounds:
            return None
        return difference.interval

    def sign(self, mode: str, limit: float, method: str) -> str:
        """Return `+` or `−` if a method is significantly farther from, or closer to, the full cache than the first."""
        difference = self.difference(mode, limit, method)
        if difference is None:
            return ""
        return "+" if difference.low > 0 else "−" if difference.high < 0 else ""

    def ranks(self) -> dict[str, float]:
        """Return the mean rank of each method's KL divergence over all cells; 1 is the smallest."""
        ranks = dict.fromkeys(self.methods, 0.0)
        for cell in self.cells:
            for rank, method in enumerate(sorted(self.methods, key=lambda method: self.mean(*cell, method)), 1):
                ranks[method] += rank / len(self.cells)
        return ranks

    def kl_table(self) -> list[str]:
        """Return the lines of a table of mean KL divergences and mean ranks."""
        ranks = self.ranks()
        return self._table(lambda *cell: f"{self.mean(*cell):.3f}{self.sign(*cell)}", lambda name: f"{ranks[name]:.1f}")

    def top1_table(self) -> list[str]:
        """Return the lines of a table of the share of tokens at which cache and full cache prefer the same one."""
        return self._table(
            lambda *cell: f"{self.mean(*cell, 'top1'):.0%}",
            lambda name: f"{statistics.fmean(self.mean(*cell, name, 'top1') for cell in self.cells):.0%}",
        )

    def _table(self, text: Callable[[str, float, str], str], last: Callable[[str], str]) -> list[str]:
        head = [f"{mode} {limit_text(limit)}" for mode, limit in self.cells]
        lines = [f"| cache | {' | '.join(head)} | mean (rank) |", "|---" * (len(head) + 2) + "|"]
        for method in self.methods:
            cells = [text(*cell, method) for cell in self.cells]
            lines.append(f"| {method} | {' | '.join(cells)} | {last(method)} |")
        return lines

    def losses(self) -> list[str]:
        """Return a line for each cell in which another method is significantly closer than the first one."""
        return [
            f"* {method}: {mode} at {limit_text(limit)}, {self.mean(mode, limit, method):.3g} in place of "
            f"{self.mean(mode, limit, self.methods[0]):.3g}"
            for mode, limit in self.cells
            for method in self.methods
            if self.sign(mode, limit, method) == "−"
        ]

    def rows(self) -> Iterable[dict[str, Any]]:
        """Yield the numbers of each cell for the JSON file."""
        for (mode, limit), method in itertools.product(self.cells, self.methods):
            group = self._groups[mode, method, limit]
            row: dict[str, Any] = {"mode": mode, "method": method, "limit": limit}
            row["kl"] = rounded(asdict(group.interval("kl")))
            row |= rounded({name: group.interval(name).mean for name in ("top1", "bytes")})
            row["values"] = {
                name: [float(f"{group.values[name][seed]:.4g}") for seed in self.seeds] for name in METRICS
            }
            if difference := self.difference(mode, limit, method):
                row["kl_minus_ours"] = rounded(asdict(difference))
            yield row


def limit_text(limit: float) -> str:
    """Return a limit as text, such as `1/10`."""
    return f"1/{1 / limit:g}"


def ranges(seeds: Sequence[int]) -> str:
    """Return seeds as text, such as `1000 to 1019`."""
    firsts = [seed for seed in seeds if seed - 1 not in seeds]
    lasts = [seed for seed in seeds if seed + 1 not in seeds]
    return ", ".join(f"{a} to {b}" if a < b else str(a) for a, b in zip(firsts, lasts, strict=True))


def stored_groups(name: str, model: str, tokens: int) -> list[Group]:
    """Return the values of a model's samples in the JSON file of a group of policies."""
    content = json.loads(json_path(name).read_text(encoding="utf-8"))
    if "seeds" not in content or content["tokens"] != tokens:
        sys.exit(f"{json_path(name)} must have the values of samples with {tokens} tokens for --add")
    return [
        Group(
            {key: row[key] for key in ("mode", "method", "limit")},
            {key: dict(zip(content["seeds"], row["values"][key], strict=True)) for key in METRICS},
        )
        for row in content["rows"]
        if row["model"] == model
    ]


def markdown(results: Mapping[str, Results], options: argparse.Namespace) -> str:
    """Return the tables of a group of policies for each model."""
    seeds = next(iter(results.values())).seeds
    lines = [f"{len(seeds)} samples per cell, seeds {ranges(seeds)}, prompts of about {options.tokens} tokens.", ""]
    for model, result in results.items():
        losses = result.losses()
        verdict = "Significantly closer than" if losses else "No cache is significantly closer in any column than"
        lines += [f"### {model}: KL divergence", "", *result.kl_table(), ""]
        lines += [f"{verdict} `{result.methods[0]}`{':' if losses else '.'}", "", *losses, *[""][: len(losses)]]
        lines += [f"### {model}: tokens as with the full cache", "", *result.top1_table(), ""]
    return "\n".join(lines)


def draw(contents: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the KL divergence against the bytes, both on a log scale: one panel for each model and mode.

    Args:
        contents: the JSON files of the groups of policies.
        path: where the figure is written.

    """
    kl = {
        (content["group"], row["model"], row["mode"], row["method"], row["limit"]): row["kl"]["mean"]
        for content in contents
        for row in content["rows"]
    }
    models = list(dict.fromkeys(key[1] for key in kl))
    lines = [line for content in contents for line in _lines(content["group"], kl)]
    with figure_style():
        figure = Figure(figsize=(9.6, 3.0 * len(models)), layout="constrained")
        panels = figure.subplots(len(models), len(MODES), sharex=True, squeeze=False)
        for (row, model), (column, mode) in itertools.product(enumerate(models), enumerate(MODES)):
            axes = panels[row, column]
            for group, method, style in lines:
                values = [kl[group, model, mode, method.name, limit] for limit in LIMITS]
                axes.plot(LIMITS, values, style, markersize=4, color=color_of(method.policy), label=method.name)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks(LIMITS, [limit_text(limit) if limit != 1 / 8 else "" for limit in LIMITS])  # 1/8 is close
            axes.minorticks_off()
            axes.set_title(f"{model}: {mode}")
        for axes in panels[-1]:
            axes.set_xlabel("bytes, relative to 16 bits")
        for axes in panels[:, 0]:
            axes.set_ylabel("KL divergence (nats per token)")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        save_figure(figure, path)


def _lines(group: str, kl: Mapping[tuple[str, str, str, str, float], float]) -> list[tuple[str, Method, str]]:
    """Return group, method and style of the lines of a group: our policy, and the best published one of each kind."""
    policies = GROUPS[group]

    def mean_log(method: Method) -> float:
        return statistics.fmean(math.log(value) for key, value in kl.items() if key[3] == method.name)

    rivals = [name for name in policies.rivals if not name.startswith("capkv")]
    best = {
        is_quantized: min((Method(name, is_quantized) for name in rivals), key=mean_log)
        for is_quantized in (True, False)
    }
    return [
        (group, Method(policies.ours, True, repair=True), "o-"),
        (group, Method(policies.ours, True), "o--"),
        (group, best[True], "s--"),
        (group, best[False], "s:"),
    ]


def json_path(group: str) -> Path:
    """Return the path of the numbers of a group of policies."""
    return PAGE.with_name(f"{PAGE.stem}-{group}.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(PACKAGED_MODELS))
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--seed", type=int, default=FIRST_SEED)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, default=1, help="threads of each model's process")
    parser.add_argument("--folder", type=Path, default=Path("out/equal-bytes"))
    parser.add_argument("--write", action="store_true", help="write the results into the page")
    parser.add_argument("--add", action="store_true", help="join with the samples that were written before")
    parser.add_argument("--figure", action="store_true", help="draw the figure from the written results, nothing else")
    options = parser.parse_args()
    if options.figure:
        draw([json.loads(json_path(group).read_text(encoding="utf-8")) for group in GROUPS], FIGURE)
        return
    if options.samples < 1:
        sys.exit(f"samples must be at least 1, got {options.samples}")
    torch.set_num_threads(options.threads)
    if len(options.models) > 1:
        run_in_processes(options.models, options.threads)
    for name in options.groups:
        stored = {model: stored_groups(name, model, options.tokens) if options.add else [] for model in options.models}
        results = {
            model: Results([*before, *run(options, name, model)], GROUPS[name]) for model, before in stored.items()
        }
        if len({result.seeds for result in results.values()}) > 1:
            sys.exit("models must have samples of the same seeds for one table")
        content = {
            "group": name,
            "seeds": next(iter(results.values())).seeds,
            "tokens": options.tokens,
            "machine": machine(),
            "transformers": transformers.__version__,
            "rows": [{"model": model, **row} for model, result in results.items() for row in result.rows()],
        }
        text = markdown(results, options)
        print(text)
        if options.write:
            start = f"<!-- written by benchmarks/equal_bytes.py --groups {name} -->"
            write(PAGE, text, content, start, json_path(name))
        print(json.dumps(content))


if __name__ == "__main__":
    main()
