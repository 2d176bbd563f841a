import doctest
import sys

import pytest

import suffice.information


@pytest.mark.parametrize("module", ["linalg", "capacity", "selection"])
def test_examples_in_docstrings(module: str):
    # By name: the package's attribute `capacity` is the function.
    results = doctest.testmod(sys.modules[f"{suffice.information.__name__}.{module}"])
    assert results.attempted > 0
    assert results.failed == 0
