"""What a user allows, and which tokens are protected whatever their score."""

from __future__ import annotations

from dataclasses import dataclass

_SINKS = 4
_WINDOW_SHARE, _WINDOW_LEAST, _WINDOW_MOST = 0.15, 4, 32


def tokens_allowed(budget: float, seen: int) -> int:
    """Return how many of `seen` tokens the budget allows: never more than it says, at least 1."""
    if isinstance(budget, int):
        return min(budget, seen)
    # The small term keeps 0.1 * 30 from becoming 2.
    return max(1, int(budget * seen + 1e-9))


@dataclass(frozen=True)
class Protection:
    """The first tokens (attention sinks) and the last (recent window), which are always kept.

    None stands for the default: 4 sinks, and a window of 15 % of the budget but between 4 and 32 tokens. The
    defaults shrink to fit a small budget; numbers given by a user do not.
    """

    sinks: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("sinks", self.sinks), ("window", self.window)):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} is {value!r}; accepted: a whole number of tokens, or None")
            if value < 0:
                raise ValueError(f"{name} is {value}; accepted: 0 or more tokens")

    @property
    def least(self) -> int:
        """Smallest budget in tokens that holds what is protected."""
        return max(1, self._sinks + (_WINDOW_LEAST if self.window is None else self.window))

    @property
    def _sinks(self) -> int:
        return _SINKS if self.sinks is None else self.sinks

    def check(self, budget: float) -> None:
        """Raise unless the budget is a fraction in (0, 1] or tokens enough for what is protected.

        Raises:
            TypeError: it is not a number.
            ValueError: it is out of range.

        """
        accepted = "accepted: tokens (a whole number, at least 1) or a fraction of the prompt (0 < budget ≤ 1.0)"
        if isinstance(budget, bool) or not isinstance(budget, (int, float)):
            raise TypeError(f"budget is {budget!r} of type {type(budget).__name__}; {accepted}")
        if isinstance(budget, float):
            if not 0 < budget <= 1:
                raise ValueError(f"budget is {budget}; {accepted}. Tokens have no decimal point")
            return
        if budget < 1:
            raise ValueError(f"budget is {budget}; {accepted}")
        if budget < self.least:
            raise ValueError(
                f"budget is {budget} tokens, smaller than what is protected: {self._sinks} sinks and a recent "
                f"window of {self.least - self._sinks} need {self.least}. Raise budget, or lower sinks and window"
            )

    def sizes(self, budget: int, published_window: int | None = None) -> tuple[int, int]:
        """Return (sinks, window) for a row's budget.

        Args:
            budget: tokens that the row may keep.
            published_window: the window that the policy's authors always keep, used if the user named none.

        Raises:
            ValueError: numbers given by the user do not fit into the budget.

        """
        given = (self.sinks or 0) + (self.window or 0)
        if given > budget:
            raise ValueError(
                f"budget is {budget} tokens here, smaller than what is protected: sinks={self.sinks}, "
                f"window={self.window}. Raise budget, or lower sinks and window"
            )
        sinks = min(_SINKS, budget // 2) if self.sinks is None else self.sinks
        if self.window is not None:
            return min(sinks, budget - self.window), self.window
        window = published_window
        if window is None:
            window = min(max(round(_WINDOW_SHARE * budget), _WINDOW_LEAST), _WINDOW_MOST)
        return sinks, min(window, budget - sinks)
