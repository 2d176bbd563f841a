"""Tables of wrong arguments of public functions, and the errors that they raise."""

from __future__ import annotations

import pytest


def each_wrong_argument(cases):
    """Mark a test for each case: call, argument, value, class of the error, and the words with which it begins."""
    return pytest.mark.parametrize(("call", "argument", "value", "error", "words"), cases, ids=_identify)


def expect_error(call, argument, value, error, words):
    """Check the error of a call with a wrong argument."""
    with pytest.raises(error, match=rf"(?s)^{words}"):
        call(**{argument: value})


def _identify(value):
    return value if isinstance(value, str) else value.__name__ if isinstance(value, type) else None
