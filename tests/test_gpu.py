"""Helpers for GPUs, as far as they can be tested without one."""

import doctest
import sys

import pytest
import torch

from suffice.gpu import async_tensor, block_size, can_use_kernels, disable_kernels, kernels_enabled


def test_examples_in_docstrings():
    results = doctest.testmod(sys.modules["suffice.gpu"])
    assert results.attempted > 0
    assert results.failed == 0


def test_kernels_are_enabled_again_after_an_error():
    def fail_without_kernels():
        with disable_kernels():
            assert not kernels_enabled()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_without_kernels()
    assert kernels_enabled()


def test_kernels_are_not_used_on_the_cpu():
    assert not can_use_kernels(torch.ones(2, 16))


@pytest.mark.parametrize("minimum", [1, 8, 16])
def test_block_size_is_the_smallest_power_of_two(minimum):
    for size in range(1, 300):
        powers = [2**exponent for exponent in range(10)]
        assert block_size(size, minimum) == next(power for power in powers if power >= max(size, minimum))


def test_async_tensor_equals_a_tensor():
    assert async_tensor([[1, 2], [3, 4]], torch.device("cpu")).equal(torch.tensor([[1, 2], [3, 4]]))
