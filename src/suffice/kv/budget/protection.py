"""The budget of a row, and the entries that are always kept."""

from __future__ import annotations

from dataclasses import dataclass

from suffice.plain_numbers import plain_number

_DEFAULT_SINKS = 4
_WINDOW_FRACTION, _MIN_WINDOW, _MAX_WINDOW = 0.15, 4, 32


def num_allowed(budget: float, num_seen: int) -> int:
    """Return how many entries a budget allows.

    Args:
        budget: number of entries (int), or fraction of the tokens seen (float).
        num_seen: number of tokens seen.

    Returns:
        At most `budget` and `num_seen`; at least 1 for a fraction.

    """
    if isinstance(budget, int):
        return min(budget, num_seen)
    # 1e-9 corrects products that are rounded down: 0.29 * 100 is 28.999999999999996.
    return max(1, int(budget * num_seen + 1e-9))


@dataclass(frozen=True)
class Protection:
    """Entries that are always kept: the first tokens (attention sinks) and the last ones (recent window).

    Args:
        sinks: number of first tokens. None means 4, or half of the budget if it is below 8.
        window: number of last tokens. None means 15 % of the budget, at least 4 and at most 32, but no more than the
            budget without the sinks.

    Raises:
        TypeError: an argument is neither an int nor None.
        ValueError: an argument is negative.

    """

    sinks: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        for name, given in (("sinks", self.sinks), ("window", self.window)):
            if given is None:
                continue
            value = plain_number(given)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a number of tokens (int) or None, got {value!r}")
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}")
            object.__setattr__(self, name, value)

    @property
    def min_budget(self) -> int:
        """Smallest budget, in entries, into which the sinks and the window that were given fit."""
        return max(1, (self.sinks or 0) + (self.window or 0))

    def check(self, budget: float) -> float:
        """Check that the budget is a fraction in (0, 1], or a number of entries of at least `min_budget`.

        Returns:
            The budget as an int or a float, also if it is a number of NumPy.

        Raises:
            TypeError: the budget is not a number.
            ValueError: the budget is out of range.

        """
        accepted = "budget must be a number of tokens (int, at least 1) or a fraction of the prompt (0 < float <= 1.0)"
        number = plain_number(budget)
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{accepted}, got {budget!r}")
        if (isinstance(number, float) and not 0 < number <= 1) or number <= 0:
            raise ValueError(f"{accepted}, got {budget!r}")
        if isinstance(number, int) and number < self.min_budget:
            raise ValueError(
                f"budget must be at least {self.min_budget} tokens, because {self.sinks or 0} sinks and a recent "
                f"window of {self.window or 0} are protected, got {number!r}. Raise budget, or lower sinks and window"
            )
        return number

    def sizes(self, budget: int, published_window: int | None = None) -> tuple[int, int]:
        """Return the numbers of first tokens (sinks) and last tokens (window) that are protected in a row.

        Args:
            budget: number of entries that the row may keep.
            published_window: number of last tokens that the published policy keeps. It replaces the default window.

        Raises:
            ValueError: the numbers given by the user do not fit into the budget.

        """
        given = (self.sinks or 0) + (self.window or 0)
        if given > budget:
            raise ValueError(
                f"budget must be at least {given} tokens, because sinks={self.sinks} and window={self.window} are "
                f"protected, got a budget of {budget} for this row. Raise budget, or lower sinks and window"
            )
        sinks = min(_DEFAULT_SINKS, budget // 2) if self.sinks is None else self.sinks
        if self.window is not None:
            return min(sinks, budget - self.window), self.window
        window = published_window
        if window is None:
            window = min(max(round(_WINDOW_FRACTION * budget), _MIN_WINDOW), _MAX_WINDOW)
        return sinks, min(window, budget - sinks)
