import doctest
import sys

import pytest

import suffice.information


@pytest.mark.parametrize("module", ["linalg", "capacity", "selection", "alignment"])
def test_examples_in_docstrings(module: str):
    # Import by name, because the package's attribute `capacity` is the function and not the module.
    results = doctest.testmod(sys.modules[f"{suffice.information.__name__}.{module}"])
    assert results.attempted > 0
    assert results.failed == 0
