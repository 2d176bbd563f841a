"""Which cache answers right at which bytes: the main result of a comparison."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from suffice.kv.eval.cache_grid import describe_size
from suffice.kv.eval.compare import Comparison, Condition

ENOUGH_SAMPLES = 8
"""With fewer samples, most differences between caches are chance."""


@dataclass(frozen=True)
class CacheScore:
    """What one cache reaches, averaged over all tasks.

    Args:
        name: method and size, such as `h2o at budget 0.25`.
        share_of_bytes: bytes of the cache, as a share of those of the full cache.
        score: score of the generated answers, 0 to 1; None without scored tasks.
        full_score: score of the full cache's answers; None without scored tasks.
        kl: KL divergence from the full cache, in nats per token.

    """

    name: str
    share_of_bytes: float
    score: float | None
    full_score: float | None
    kl: float

    @property
    def is_as_good(self) -> bool:
        """Whether the answers score at least as high as those of the full cache."""
        return self.score is not None and self.full_score is not None and self.score >= self.full_score


def cache_scores(comparison: Comparison) -> list[CacheScore]:
    """Return what each cache reaches, from the fewest bytes to the most."""
    conditions = comparison.conditions
    tasks = list(dict.fromkeys(condition[:2] for condition in conditions))
    scores: list[CacheScore] = []
    for method in comparison.methods:
        for size in dict.fromkeys(condition[2:] for condition in conditions):
            own = [Condition(*task, *size) for task in tasks]
            groups = [comparison.group(method, condition) for condition in own]
            scored = [group for group in groups if "score" in group.values]
            scores.append(
                CacheScore(
                    name=f"{method} at {describe_size(*size)}",
                    share_of_bytes=fmean(comparison.share_of_bytes(method, condition) for condition in own),
                    score=fmean(group.interval("score").mean for group in scored) if scored else None,
                    full_score=fmean(group.interval("full_score").mean for group in scored) if scored else None,
                    kl=fmean(group.interval("kl").mean for group in groups),
                )
            )
    return sorted(scores, key=lambda score: score.share_of_bytes)


def main_result(comparison: Comparison) -> str:
    """Return a sentence on the smallest cache whose answers score as high as those of the full cache.

    Without such a cache, it names the one with the best answers; without scored tasks, the one with the lowest KL.
    """
    scores = cache_scores(comparison)
    closest = min(scores, key=lambda score: score.kl)
    if closest.score is None:
        return (
            f"{closest.name} stays closest to the full cache: KL {closest.kl:.3f} nats per token with "
            f"{closest.share_of_bytes:.1%} of its bytes. No answers were scored."
        )
    as_good = next((score for score in scores if score.is_as_good), None)
    best = as_good or max(scores, key=lambda score: (score.score or 0, -score.share_of_bytes))
    numbers = (
        f"{best.score:.0%} of what is asked with {best.share_of_bytes:.1%} of the bytes; the full cache answers "
        f"{best.full_score:.0%}."
    )
    if as_good is not None:
        return f"{best.name} is the smallest cache that answers as well as the full cache: {numbers}"
    return f"No cache answers as well as the full cache. The best is {best.name}: {numbers}"


def samples_warning(comparison: Comparison) -> str:
    """Return a warning if there are too few samples; otherwise an empty text."""
    samples = comparison.settings["samples"]
    if samples >= ENOUGH_SAMPLES:
        return ""
    return (
        f"Only {samples} sample{'s' * (samples != 1)} of each task: most differences are chance. Use at least "
        f"{ENOUGH_SAMPLES} samples."
    )
