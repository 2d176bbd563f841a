"""Tables that the commands of `suffice kv` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from suffice.kv.budget.memory_limit import format_memory
from suffice.kv.policy.names import POLICY_NAMES, POLICY_PAPERS, POLICY_USES
from suffice.kv.storage.quantization import Bits, format_bits

if TYPE_CHECKING:
    from suffice.kv.budget.profile import Profile
    from suffice.kv.eval.compare import Comparison


def comparison_table(comparison: Comparison) -> Table:
    """Return a table of the KL divergence of every method and budget on every task, and of the mean ranks.

    If bits or limits on the bytes are given, it also shows them, and the mean share of the full cache's bytes.
    """
    # Imported here, because other commands do not need it.
    from suffice.kv.eval.cache_grid import format_size
    from suffice.kv.eval.compare import Condition, metric_interval

    samples = comparison.settings["samples"]
    table = Table(title=f"KL to the full cache, nats per token: mean of {samples} samples [95 % interval]")
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
            cells = [escape(str(metric_interval(comparison.group(method, each), "kl"))) for each in conditions]
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


def tuning_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    """Return a table of caches that `tune` tried."""
    table = Table(title=title)
    for column in columns:
        is_text = column in ("policy", "allocation")
        table.add_column(column.replace(" ", "\n"), justify="left" if is_text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
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


def policy_table() -> Table:
    """Return a table of the policies with 80 columns at most: when to use each, and its paper."""
    table = Table(title="Policies")
    table.add_column("name", no_wrap=True)
    table.add_column("when to use it", max_width=40)
    table.add_column("paper", max_width=11, overflow="fold")
    for name in POLICY_NAMES:
        table.add_row(name, POLICY_USES[name], POLICY_PAPERS[name])
    return table


def policy_parts_table(descriptions: Sequence[Mapping[str, str]]) -> Table:
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
