"""Tables that the commands of `suffice kv` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from rich.table import Table

from suffice.kv.budget.memory_limit import format_memory
from suffice.kv.storage.quantization import Bits, format_bits

if TYPE_CHECKING:
    from suffice.kv.budget.profile import Profile
    from suffice.kv.eval.compare import Comparison
    from suffice.kv.eval.tune import TuningResult


def comparison_table(comparison: Comparison) -> Table:
    """Return a table of the KL divergence of every method and budget on every task, and of the mean ranks.

    If bits or limits on the bytes are given, it also shows them, and the mean share of the full cache's bytes.
    """
    # Imported here, because other commands do not need it.
    from suffice.kv.eval.cache_grid import format_size
    from suffice.kv.eval.compare import Condition

    samples = comparison.settings["samples"]
    table = Table(title=f"KL to the full cache, nats per token: mean of {samples} samples ± half of the 95 % interval")
    table.add_column("method", no_wrap=True)
    bits_column = ("bits",) if comparison.is_quantized else ()
    bytes_column = ("bytes",) if comparison.is_quantized or comparison.has_limits else ()
    for column in ("memory" if comparison.has_limits else "budget", *bits_column, *bytes_column):
        table.add_column(column, justify="right", no_wrap=True)
    tasks = list(dict.fromkeys((condition.task, condition.mode) for condition in comparison.conditions))
    for task, mode in tasks:
        table.add_column(task if mode == "continuation" else f"{task}\n{mode}", justify="right", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    sizes = list(dict.fromkeys(condition[2:] for condition in comparison.conditions))
    for method, rank in comparison.mean_ranks().items():
        for size in sizes:
            budget, bits, memory = size
            conditions = [Condition(*task, *size) for task in tasks]
            intervals = [comparison.group(method, condition).interval("kl") for condition in conditions]
            cells = [
                f"{interval.mean:.3f}" + (f" ± {interval.high - interval.mean:.3f}" if samples > 1 else "")
                for interval in intervals
            ]
            label = format_size(budget, None, None) if memory is None else format_memory(memory)
            if bytes_column:
                share = fmean(comparison.share_of_bytes(method, condition) for condition in conditions)
                cells = [f"{share:.1%}", *cells]
            if bits_column:
                cells = [_bits_cell(bits, memory), *cells]
            is_first = size == sizes[0]
            table.add_row(method if is_first else "", label, *cells, f"{rank:.1f}" if is_first else "")
    return table


def _bits_cell(bits: Bits | None, memory: float | None) -> str:
    return "chosen" if bits is None and memory is not None else format_bits(bits)


def trial_table(result: TuningResult) -> Table:
    """Return a table of the trials of `tune`."""
    metric = "KL" if result.metric == "kl" else "agreement"
    table = Table(title=f"{result.num_prompts} prompts, target {metric} {result.target:g}")
    is_quantized = any(trial.bits is not None for trial in result.trials)
    size = "budget" if result.closest.memory is None else "memory"
    has_repair = any(trial.repair for trial in result.trials)
    extra = (*(("bits",) if is_quantized else ()), *(("repair",) if has_repair else ()))
    for column in ("policy", "allocation", size, *extra, f"mean {metric}", "bound", "on target", "MB", "safe"):
        is_text = column in ("policy", "allocation")
        table.add_column(column.replace(" ", "\n"), justify="left" if is_text else "right", no_wrap=True)
    for trial in result.trials:
        table.add_row(
            trial.policy,
            trial.allocation,
            f"{trial.budget:g}" if trial.memory is None else format_memory(trial.memory),
            *((_bits_cell(trial.bits, trial.memory),) if is_quantized else ()),
            *(("yes" if trial.repair else "no",) if has_repair else ()),
            f"{trial.mean:.4f}",
            f"{trial.bound:.4f}",
            f"{trial.within:.0%}",
            f"{trial.bytes / 1e6:.1f}",
            "yes" if trial.safe else "no",
        )
    return table


def profile_table(profile: Profile) -> Table:
    """Return a table of the smallest, mean and largest attention of the heads of each layer."""
    table = Table(title=f"Head profile: {profile.source}")
    for column in ("layer", "smallest", "mean", "largest"):
        table.add_column(column, justify="right")
    for layer, heads in enumerate(profile.attention):
        numbers = (min(heads), sum(heads) / len(heads), max(heads))
        table.add_row(str(layer), *(f"{number:.4f}" for number in numbers))
    return table


def policy_table(descriptions: Sequence[Mapping[str, str]]) -> Table:
    """Return a table of the parts of each policy."""
    table = Table(title="Policies: weights × directions × estimator")
    for column in ("name", "weights", "directions", "estimator", "paper"):
        table.add_column(column, overflow="fold", no_wrap=column in ("name", "paper"))
    for parts in descriptions:
        # Selection and allocation are added if they differ from the defaults.
        extra = [parts[part] for part in ("selection", "allocation") if parts[part] not in ("top", "equal")]
        estimator = ", ".join((parts["estimator"], *extra))
        table.add_row(parts["name"], parts["weights"], parts["directions"], estimator, parts["paper"])
    return table
